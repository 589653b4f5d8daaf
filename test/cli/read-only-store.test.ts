/** A store on a read-only filesystem: it can be listed, copied, backed up and served, but not changed. */
import fs from 'node:fs';
import path from 'node:path';
import { expect, test } from 'vitest';
import { cli, cliJson, ok, needs, skipBecause, startDaemon, temporaryDirectory } from '../harness/daemon.js';
import { mountReadOnly } from '../harness/filesystems.js';

const MIB = 2 ** 20;
const NOTE = /^sheepgate: note: store [^\n]* is on a read-only filesystem: nothing in it can be changed\n$/;

async function store(): Promise<{ directory: string; image: string }> {
  const directory = path.join(temporaryDirectory(), 'store');
  const image = path.join(temporaryDirectory(), 'image');
  fs.writeFileSync(image, Buffer.alloc(6 * MIB, 5));
  expect((await cli(['import', image, 'disk', '--store', directory])).code).toBe(0);
  expect((await cli(['vdi', 'snapshot', 'disk', 's', '--store', directory])).code).toBe(0);
  return { directory, image };
}

test('a store on a read-only filesystem is listed, exported, backed up and migrated, with a note in one line', async (context) => {
  const { directory, image } = await store();
  const mounted = mountReadOnly(directory);
  if (mounted === undefined) return skipBecause(context, 'mounting needs root');
  const out = temporaryDirectory();
  const same = (name: string): void =>
    expect(fs.readFileSync(path.join(out, name)).equals(fs.readFileSync(image))).toBe(true);
  const done = async (...args: string[]): Promise<string> => {
    const result = await cli([...args, '--store', mounted]);
    expect(result, args.join(' ')).toMatchObject({ code: 0 });
    expect(result.stderr.split('\n').filter((line) => line.includes('read-only'))).toHaveLength(1);
    return result.stdout;
  };
  const listed = await cli(['vdi', 'list', '--store', mounted]);
  expect(listed).toMatchObject({ code: 0, stderr: expect.stringMatching(NOTE) as string });
  expect(listed.stdout).toMatch(/^disk +s /m);
  await done('vdi', 'show', 'disk');
  await done('vdi', 'tree');
  expect(await done('check')).toContain('0 problems');
  for (const spec of ['disk', 'disk@s', 'disk@now']) {
    await done('export', spec, path.join(out, spec));
    same(spec);
  }
  await done('backup', 'disk', '--to', path.join(out, 'backup'), '--no-base');
  expect((await cli(['restore', path.join(out, 'backup'), '--verify'])).code).toBe(0);
  const target = path.join(out, 'target');
  expect((await cli(['migrate', 'disk', '--from', mounted, '--to', target])).code).toBe(0);
  expect((await cliJson<unknown[]>(['vdi', 'list', '--store', target])).length).toBe(2);
});

test('a copy without the empty folders and the lock is read there, and written elsewhere, like the store itself', async (context) => {
  const { directory, image } = await store();
  fs.rmSync(path.join(directory, 'lock'));
  fs.rmdirSync(path.join(directory, 'recent'));
  for (const folder of fs.readdirSync(path.join(directory, 'objects'))) {
    const name = path.join(directory, 'objects', folder);
    if (fs.readdirSync(name).length === 0) fs.rmdirSync(name);
  }
  const mounted = mountReadOnly(directory);
  if (mounted === undefined) return skipBecause(context, 'mounting needs root');
  expect(await cli(['check', '--store', mounted])).toMatchObject({
    code: 0,
    stdout: expect.stringContaining('0 problems') as string,
  });
  const exported = path.join(temporaryDirectory(), 'exported');
  expect((await cli(['export', 'disk', exported, '--store', mounted])).code).toBe(0);
  expect(fs.readFileSync(exported).equals(fs.readFileSync(image))).toBe(true);
  expect(fs.existsSync(path.join(directory, 'recent'))).toBe(false);
  expect((await cli(['import', image, 'other', '--store', directory])).code).toBe(0);
  expect(fs.readdirSync(path.join(directory, 'objects'))).toHaveLength(256);
});

test('a store on a read-only filesystem refuses every change with that reason', async (context) => {
  const { directory, image } = await store();
  const mounted = mountReadOnly(directory);
  if (mounted === undefined) return skipBecause(context, 'mounting needs root');
  for (const args of [
    ['vdi', 'create', 'other', '1M'],
    ['vdi', 'snapshot', 'disk', 't'],
    ['vdi', 'clone', 'disk@s', 'copy'],
    ['vdi', 'rollback', 'disk@s'],
    ['vdi', 'resize', 'disk', '1G'],
    ['vdi', 'delete', 'disk@s'],
    ['import', image, 'disk', '--overwrite'],
    ['backup', 'disk', '--to', path.join(temporaryDirectory(), 'backup')],
    ['check', '--repair'],
  ]) {
    const refused = await cli([...args, '--store', mounted]);
    expect(refused.code, args.join(' ')).toBe(1);
    const last = refused.stderr.trimEnd().split('\n').at(-1);
    expect(last, args.join(' ')).toMatch(args[0] === 'import' ? /read-only/ : /^sheepgate: .*read-only filesystem/);
  }
  expect((await cli(['vdi', 'list', '--store', directory])).stderr).toBe('');
});

needs('qemu-img', 'qemu-io')('a store on a read-only filesystem is served read-only', async (context) => {
  const { directory, image } = await store();
  const mounted = mountReadOnly(directory);
  if (mounted === undefined) return skipBecause(context, 'mounting needs root');
  const runtime = temporaryDirectory();
  const env = { XDG_RUNTIME_DIR: runtime };
  const daemon = await startDaemon({ store: mounted, env });
  await daemon.logged(/on a read-only filesystem/);
  expect(daemon.control.startsWith(runtime)).toBe(true);
  for (const name of ['disk', 'disk@s', 'disk@now']) {
    const compared = await ok('qemu-img', ['compare', '-f', 'raw', '-F', 'raw', image, daemon.uri(name)]);
    expect(compared).toContain('identical');
  }
  expect(await ok('qemu-io', ['-r', '-f', 'raw', '-c', 'read -P 5 0 6M', daemon.uri('disk')])).toContain(
    'read 6291456',
  );
  // Other processes can read at the same time, and none can write.
  expect((await cli(['vdi', 'list', '--store', mounted])).code).toBe(0);
  const refused = await cli(['vdi', 'create', 'other', '1M', '--store', directory]);
  expect(refused).toMatchObject({ code: 1, stderr: expect.stringContaining('holds the store') as string });
  expect((await daemon.stop()).code).toBe(0);
});

test('a store that was not closed shows only flushed data, with a note; a store that a daemon has open is refused', async (context) => {
  const { directory, image } = await store();
  const mounted = mountReadOnly(directory);
  if (mounted === undefined) return skipBecause(context, 'mounting needs root');
  const daemon = await startDaemon({ store: directory });
  const beside = await cli(['vdi', 'list', '--control', daemon.control]);
  expect(beside.code).toBe(0);
  await daemon.kill();
  fs.rmSync(path.join(directory, 'control.sock'), { force: true });
  const listed = await cli(['vdi', 'list', '--store', mounted]);
  expect(listed.stderr).toMatch(/read-only filesystem.*not closed cleanly: writes after the last flush/);
  const exported = path.join(temporaryDirectory(), 'exported');
  expect((await cli(['export', 'disk', exported, '--store', mounted])).code).toBe(0);
  expect(fs.readFileSync(exported).equals(fs.readFileSync(image))).toBe(true);
  // The store was not changed: the next start that may write still has to recover.
  expect((await cli(['vdi', 'list', '--store', directory])).stderr).toContain('not shut down cleanly');
});
