/** `sheepgate store rescue` on the command line: what it prints, its exit codes, and what other commands say of the damaged store. */
import fs from 'node:fs';
import path from 'node:path';
import { expect, test } from 'vitest';
import { cli, startDaemon, temporaryDirectory, type RunResult } from '../harness/daemon.js';

const MIB = 2 ** 20;

interface Made {
  readonly store: string;
  readonly image: string;
  readonly to: string;
  run(...args: string[]): Promise<RunResult>;
}

async function made(): Promise<Made> {
  const directory = temporaryDirectory();
  const image = path.join(directory, 'image');
  fs.writeFileSync(image, Buffer.alloc(9 * MIB, 'content '));
  const store = path.join(directory, 'store');
  const run = (...args: string[]): Promise<RunResult> => cli(args, { store });
  for (const args of [
    ['import', image, 'vm'],
    ['vdi', 'snapshot', 'vm', 'monday'],
  ])
    expect(await run(...args)).toMatchObject({ code: 0 });
  return { store, image, to: path.join(directory, 'new'), run };
}

test('a store without meta.mdb: every command names the way out, and the rescued one has everything', async () => {
  const { store, image, to, run } = await made();
  fs.rmSync(path.join(store, 'meta.mdb'));
  const before = fs.readdirSync(store).sort();
  for (const args of [
    ['vdi', 'list'],
    ['vdi', 'create', 'new', '1M'],
    ['check'],
    ['serve', '--listen', `unix:${path.join(to, '..', 'socket')}`],
  ]) {
    const { code, stdout, stderr } = await run(...args);
    expect({ code, stdout }, args.join(' ')).toEqual({ code: 1, stdout: '' });
    expect(stderr).toContain(`${store}/meta.mdb is missing`);
    expect(stderr).toContain(`sheepgate store rescue ${store} NEW`);
  }
  expect(fs.readdirSync(store).sort()).toEqual(before);

  const dry = await run('store', 'rescue', store, '--dry-run');
  expect(dry).toMatchObject({ code: 0, stderr: '' });
  expect(dry.stdout).toContain('metadata: it is missing');
  expect(dry.stdout).toContain('certain  vm@monday (9 MiB)');
  expect(dry.stdout).toContain('everything is certain');
  expect(fs.existsSync(to)).toBe(false);

  const rescued = await run('store', 'rescue', store, to, '--json');
  expect(rescued.code).toBe(0);
  expect(JSON.parse(rescued.stdout)).toMatchObject({
    store,
    new: to,
    problem: 'it is missing',
    base: 'copy',
    isCertain: true,
    vdis: [
      { name: 'vm', tag: 'monday', isCertain: true },
      { name: 'vm', tag: null, isCertain: true },
    ],
    lost: [],
    objects: 3,
  });
  const exported = path.join(to, '..', 'exported');
  expect(await cli(['export', 'vm@monday', exported], { store: to })).toMatchObject({ code: 0 });
  expect(fs.readFileSync(exported).equals(fs.readFileSync(image))).toBe(true);
  expect((await cli(['check'], { store: to })).code).toBe(0);
});

test('a lost object: exit code 1, its range is printed, reads of it fail, and check lists it', async () => {
  const { store, to, run } = await made();
  fs.rmSync(path.join(store, 'meta.mdb'));
  const objects = path.join(store, 'objects');
  const [first = ''] = fs
    .readdirSync(objects, { recursive: true, encoding: 'utf8' })
    .filter((name) => name.endsWith('00000001'));
  fs.rmSync(path.join(objects, first));
  const rescued = await run('store', 'rescue', store, to);
  expect(rescued.code).toBe(1);
  expect(rescued.stdout).toContain('1 objects are lost');
  expect(rescued.stdout).toContain(`bytes ${4 * MIB} to ${8 * MIB - 1}: lost: reads fail`);
  const { code, stdout } = await cli(['check'], { store: to });
  expect(code).toBe(1);
  expect(stdout).toContain(`lost: vm bytes ${4 * MIB} to ${8 * MIB - 1}`);
});

test('a good store, a store in use, a missing target and none at all are refused with one line', async () => {
  const { store, to, run } = await made();
  const line = async (code: number, ...args: string[]): Promise<string> => {
    const result = await run(...args);
    expect(result.code, result.stderr).toBe(code);
    expect(result.stderr.trimEnd()).not.toContain('\n');
    return result.stderr;
  };
  const empty = temporaryDirectory();
  expect(await line(1, 'store', 'rescue', store, to)).toContain('needs no rescue');
  expect(fs.existsSync(to)).toBe(false);
  expect(await line(2, 'store', 'rescue', store)).toContain('--dry-run');
  expect(await line(1, 'store', 'rescue', path.join(to, 'nothing'), to)).toContain('is not a directory');
  expect(await line(1, 'store', 'rescue', empty, to)).toContain('nothing in');
  const daemon = await startDaemon({ store });
  expect(await line(1, 'store', 'rescue', store, to, '--force')).toContain('in use by process');
  await daemon.stop();
  expect((await run('store', 'rescue', store, to, '--force')).code).toBe(0);
});
