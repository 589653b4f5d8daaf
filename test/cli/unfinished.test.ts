/**
 * The VDI that a killed import or restore leaves, as operators and NBD clients see it: marked, refused, completed by the same
 * command, removed by delete. With and without a daemon, with the command killed and with the daemon killed.
 */
import type { ChildProcess } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { afterEach, beforeAll, describe, expect, test } from 'vitest';
import { NbdClient } from 'nbd-server-ts';
import { BIN, cli, ended, needs, run, startDaemon, temporaryDirectory, waitUntil, spawn } from '../harness/daemon.js';
import {
  deleteAll,
  expectBytes,
  MIB,
  oneLineOf,
  patterned,
  storeWith,
  testStore,
  WAYS,
  type TestStore,
} from './both-ways.js';

interface Listed {
  readonly name: string;
  readonly tag: string | null;
  readonly unfinished: { readonly by: string; readonly since: string } | null;
}

/** Bytes of all objects. Not the file with which a store probes its filesystem while it is opened. */
function objectBytes(store: string): number {
  let sum = 0;
  for (const folder of ['objects', 'overlays']) {
    const root = path.join(store, folder);
    for (const name of fs.existsSync(root) ? fs.readdirSync(root, { recursive: true, encoding: 'utf8' }) : [])
      if (/[0-9a-f]{16}$/.test(name))
        sum += (fs.statSync(path.join(root, name), { throwIfNoEntry: false })?.blocks ?? 0) * 512;
  }
  return sum;
}

/** Listing all folders of a store takes CPU time that the awaited command needs. */
const COUNT_EVERY_MS = 50;

async function seldom<T>(condition: () => T): Promise<T> {
  await delay(COUNT_EVERY_MS);
  return condition();
}

/** Whether the process polls its stdin; see proc_pid_fdinfo(5). */
function waitsForStdin(pid: number): boolean {
  const directory = `/proc/${pid}/fdinfo`;
  return fs.readdirSync(directory).some((fd) => {
    try {
      return /^tfd:\s+0\s/m.test(fs.readFileSync(path.join(directory, fd), 'utf8'));
    } catch {
      return false; // closed since it was listed
    }
  });
}

/** An import from a pipe that has written `data` and stays open; resolves when it has begun to fill `objects` objects. */
async function importing(store: string, data: Buffer, objects: number, ...args: string[]): Promise<ChildProcess> {
  const before = objectBytes(store);
  const child = spawn(process.execPath, [BIN, 'import', '-', 'vm', '--raw', ...args], {
    env: { ...process.env, SHEEPGATE_STORE: store },
    stdio: ['pipe', 'ignore', 'ignore'],
  });
  child.stdin.on('error', () => undefined);
  child.stdin.write(data);
  await waitUntil(() => seldom(() => objectBytes(store) >= before + objects * (MIB / 2)), 'the import has written');
  return child;
}

async function killed(child: ChildProcess, target: TestStore): Promise<void> {
  child.kill('SIGKILL');
  await ended(child);
  // The note about a store that was not shut down cleanly is printed once.
  if (!target.daemon) return void (await target.run(['vdi', 'list']));
  const isClosed = async (): Promise<boolean> => (await target.json('vdi', 'show', 'vm')).open === 0;
  await waitUntil(isClosed, 'the daemon has noticed');
}

const PAUSED_IO = path.resolve(import.meta.dirname, 'paused-io.mjs');

async function stateOf(target: TestStore): Promise<Listed['unfinished'] | undefined> {
  const listed = await target.json<Listed[] & Record<string, unknown>>('vdi', 'list');
  return listed.find(({ name, tag }) => name === 'vm' && tag === null)?.unfinished;
}

async function expectRefusals(target: TestStore, by: string): Promise<void> {
  const began = new RegExp(`vm is unfinished: an? ${by} that began at \\d{4}-.*'sheepgate ${by}' again completes it`);
  for (const args of [
    ['export', 'vm', '-'],
    ['export', 'vm@now', path.join(temporaryDirectory(), 'out')],
    ['backup', 'vm', '--to', path.join(temporaryDirectory(), 'to')],
    ['vdi', 'snapshot', 'vm', 'tag'],
    ['vdi', 'resize', 'vm', '4T'],
    ['vdi', 'create', 'vm', '1M'],
    ['migrate', 'vm', '--from', target.store, '--to', path.join(temporaryDirectory(), 'there')],
  ]) {
    const { code, stderr } = await target.run(args);
    expect({ args, code, stderr }).toEqual({ args, code: 1, stderr: expect.stringMatching(began) as string });
  }
}

describe.each(WAYS)('%s', (way) => {
  let target: TestStore;
  beforeAll(async () => void (target = await testStore(way)));
  afterEach(() => deleteAll(target));

  test.each([1, 9])(
    'an import that was killed after %d MiB is marked, refused, and completed by the same command',
    async (mib) => {
      const content = patterned(9 * MIB, 1);
      const begun = Date.now();
      const child = await importing(target.store, content.subarray(0, mib * MIB), Math.ceil(mib / 4));
      if (target.daemon) {
        expect(await target.ok('vdi', 'show', 'vm')).toMatch(/\nunfinished +import, begun \S+, at work now\n/);
        expect(await target.fails('import', BIN, 'vm')).toMatch(/vm is open by 1 connection/);
        for (const args of [
          ['snapshot', 'vm', 'tag'],
          ['create', 'vm', '1M'],
        ]) {
          const said = await target.fails('vdi', ...args);
          expect(said).toMatch(/vm is unfinished: an import that began at \S+ is at work on it now; wait until/);
          expect(said).not.toMatch(/again completes it|--overwrite/);
        }
      }
      await killed(child, target);
      const unfinished = await stateOf(target);
      expect(unfinished?.by).toBe('import');
      expect(Date.parse(unfinished?.since ?? '')).toBeGreaterThanOrEqual(begun - 1000);
      expect(await target.ok('vdi', 'list')).toMatch(/CREATED +STATE\nvm .* unfinished import\n/);
      expect(await target.ok('vdi', 'show', 'vm')).toMatch(
        /unfinished +import, begun \S+: cannot be opened; 'sheepgate import' again completes it, 'sheepgate vdi delete vm' gives/,
      );
      expect(await target.ok('vdi', 'tree')).toMatch(/vm {2}\(you are here, unfinished import\)/);
      if (mib > 1) await expectRefusals(target, 'import');
      const again = await target.run(['import', '-', 'vm', '--size', '9M'], { input: content });
      expect({ code: again.code, stderr: again.stderr }).toEqual({ code: 0, stderr: '' });
      expect(await stateOf(target)).toBe(null);
      expect(await target.ok('vdi', 'list')).not.toMatch(/STATE|unfinished/);
      expectBytes((await target.run(['export', 'vm', '-'])).stdoutBytes, content);
      expect(await target.ok('check')).toMatch(/ 0 problems/);
    },
  );

  test('the VDI of a killed import is deleted like any VDI, and nothing of it is left', async () => {
    await killed(await importing(target.store, patterned(8 * MIB, 1), 1), target);
    await target.ok('vdi', 'delete', 'vm');
    expect(await target.names()).toEqual([]);
    expect(await target.ok('check')).toMatch(/ 0 objects, 0 problems/);
  });

  test('an import --overwrite that was killed makes the old disk unusable, until it is run again or rolled back', async () => {
    const old = patterned(16 * MIB, 2);
    expect((await target.run(['import', '-', 'vm', '--size', '16M'], { input: old })).code).toBe(0);
    await target.ok('vdi', 'snapshot', 'vm', 'kept');
    await killed(await importing(target.store, patterned(8 * MIB, 3), 1, '--overwrite'), target);
    expect(await target.fails('export', 'vm', '-')).toMatch(
      /it holds a mix of its old data and the new; .* a rollback to one of its snapshots, or 'sheepgate vdi delete vm', gives/,
    );
    expect(await target.ok('vdi', 'show', 'vm')).toMatch(
      /a rollback to one of its snapshots, or 'sheepgate vdi delete vm'/,
    );
    // Another command needs --overwrite.
    expect(await target.fails('vdi', 'create', 'vm', '1M')).toMatch(/exists already/);
    expectBytes((await target.run(['export', 'vm@kept', '-'])).stdoutBytes, old);
    await target.ok('vdi', 'rollback', 'vm@kept');
    expectBytes((await target.run(['export', 'vm', '-'])).stdoutBytes, old);
    await killed(await importing(target.store, patterned(8 * MIB, 3), 1, '--overwrite'), target);
    const image = path.join(temporaryDirectory(), 'image');
    fs.writeFileSync(image, patterned(4 * MIB, 4));
    await target.ok('import', image, 'vm');
    const whole = Buffer.concat([patterned(4 * MIB, 4), Buffer.alloc(12 * MIB)]);
    expectBytes((await target.run(['export', 'vm', '-'])).stdoutBytes, whole);
    expect(await target.names()).toEqual(['vm@kept', 'vm']);
  });

  test('no rollback is advised where there is no snapshot', async () => {
    await target.ok('vdi', 'create', 'vm', '16M');
    await killed(await importing(target.store, patterned(8 * MIB, 3), 1, '--overwrite'), target);
    for (const said of [await target.fails('export', 'vm', '-'), await target.ok('vdi', 'show', 'vm')]) {
      expect(said).toMatch(/'sheepgate import' again completes it, 'sheepgate vdi delete vm' gives it up/);
      expect(said).not.toMatch(/rollback/);
    }
  });

  test('a restore that was killed is marked as a restore, and an import does not continue it', async () => {
    const content = patterned(24 * MIB, 5);
    expect((await target.run(['import', '-', 'original', '--size', '24M'], { input: content })).code).toBe(0);
    const to = path.join(temporaryDirectory(), 'backup');
    await target.ok('backup', 'original', '--to', to);
    const before = objectBytes(target.store);
    const child = spawn(process.execPath, ['--import', PAUSED_IO, BIN, 'restore', to, 'vm'], {
      env: { ...process.env, SHEEPGATE_STORE: target.store, PAUSED_CALL: 'read', PAUSED_UNTIL: `${to}.never` },
      stdio: 'ignore',
    });
    await waitUntil(() => seldom(() => objectBytes(target.store) > before || child.exitCode !== null), 'it restores');
    await killed(child, target);
    expect((await stateOf(target))?.by).toBe('restore');
    await expectRefusals(target, 'restore');
    expect(await target.fails('import', BIN, 'vm')).toMatch(
      /exists already .*'sheepgate restore' again completes it, 'sheepgate vdi delete vm' gives it up, and --overwrite writes/,
    );
    await target.ok('restore', to, 'vm');
    expect(await stateOf(target)).toBe(null);
    expectBytes((await target.run(['export', 'vm', '-'])).stdoutBytes, content);
  });
});

test('when the daemon is killed, the import fails, and the next daemon does not serve the VDI', async () => {
  const store = path.join(temporaryDirectory(), 'store');
  const first = await startDaemon({ store });
  const child = await importing(store, patterned(8 * MIB, 1), 1);
  await first.kill();
  child.stdin?.end();
  expect((await ended(child)).code).toBe(1);
  const second = await startDaemon({ store, args: ['--create', 'vm:8M'] });
  expect(second.log()).toMatch(/exists already, left as it is: unfinished/);
  const client = await NbdClient.connect({ path: second.socket });
  await expect(client.go('vm')).rejects.toThrow(/it is unfinished.*: "vm"/);
  await client.disconnect();
  const target = storeWith(store, second);
  const again = await target.run(['import', '-', 'vm', '--size', '8M', '--raw'], { input: patterned(8 * MIB, 1) });
  expect(again.code, again.stderr).toBe(0);
  const later = await NbdClient.connect({ path: second.socket });
  expect(await later.go('vm')).toMatchObject({ size: 8 * MIB });
  await later.disconnect();
});

needs('qemu-img', 'nbdinfo')(
  'qemu and libnbd are told why they cannot open an unfinished VDI, and do not see it listed',
  async () => {
    const store = path.join(temporaryDirectory(), 'store');
    const daemon = await startDaemon({ store, args: ['--create', 'other:1M'] });
    const target = storeWith(store, daemon);
    const child = await importing(store, patterned(8 * MIB, 1), 1);
    for (const name of ['vm', 'vm@now']) {
      const info = await run('qemu-img', ['info', '-f', 'raw', daemon.uri(name)]);
      expect(info.code).not.toBe(0);
      expect(info.stderr).toMatch(/it is unfinished: .*: "vm/);
    }
    const list = await run('nbdinfo', ['--list', '--json', `nbd+unix://?socket=${daemon.socket}`]);
    expect(list.stdout).toMatch(/"other"/);
    expect(list.stdout).not.toMatch(/"vm/);
    // Not even in the form in which the command itself opens it.
    const { socket } = daemon;
    const client = await NbdClient.connect({ path: socket });
    await expect(client.go('vm/unfinished=0123456789abcdef')).rejects.toThrow();
    await client.disconnect();
    await killed(child, target);
  },
);

describe('a pipe', () => {
  test('that ends early is an error with --size, and its VDI stays marked; a complete one does not', async () => {
    const target = storeWith(path.join(temporaryDirectory(), 'store'), undefined);
    const input = patterned(4 * MIB, 1);
    // A real pipe.
    const piped = { input, asProcess: true };
    const short = await target.run(['import', '-', 'vm', '--size', '8M'], piped);
    expect(oneLineOf(short, 1, 'import')).toMatch(
      /stdin ended after 4194304 of 8388608 bytes; vm is now unfinished and cannot be opened: run import again, or delete it/,
    );
    expect((await stateOf(target))?.by).toBe('import');
    const long = await target.run(['import', '-', 'vm', '--size', '2M'], { input });
    expect(oneLineOf(long, 1, 'import')).toMatch(/the input is longer than the 2097152 bytes/);
    const whole = await target.run(['import', '-', 'vm', '--size', '4M'], piped);
    expect({ code: whole.code, stderr: whole.stderr }).toEqual({ code: 0, stderr: '' });
    expect(await stateOf(target)).toBe(null);
    expectBytes((await target.run(['export', 'vm', '-'], { asProcess: true })).stdoutBytes, input);
  });

  test('from a broken archive does not make a partial disk that looks complete', async () => {
    const store = path.join(temporaryDirectory(), 'store');
    const file = path.join(temporaryDirectory(), 'cut.gz');
    const script = (args: string): string =>
      `head -c 3000000 /dev/urandom | gzip > '${file}'; truncate -s -1000000 '${file}'; ` +
      `zcat '${file}' 2>/dev/null | '${process.execPath}' '${BIN}' import - vm ${args}`;
    const env = { SHEEPGATE_STORE: store };
    const checked = await run('sh', ['-c', script('--size 3000000')], { env });
    expect(checked.code).toBe(1);
    expect(checked.stderr).toMatch(/stdin ended after \d+ of 3000000 bytes/);
    expect((await stateOf(storeWith(store, undefined)))?.by).toBe('import');
    // Without --size there is a note that the length was not checked.
    const unchecked = await run('sh', ['-c', script('')], { env });
    expect(unchecked.code).toBe(0);
    expect(unchecked.stderr).toMatch(
      /note: stdin ended after \d+ bytes, and it is not known whether that was all.*--size/,
    );
  });

  test('whose length is known does not touch a disk that is too small for it', async () => {
    const target = storeWith(path.join(temporaryDirectory(), 'store'), undefined);
    const old = patterned(4 * MIB, 1);
    expect((await target.run(['import', '-', 'vm', '--size', '4M'], { input: old })).code).toBe(0);
    const image = path.join(temporaryDirectory(), 'image');
    fs.writeFileSync(image, patterned(5 * MIB, 2));
    const env = { SHEEPGATE_STORE: target.store };
    const redirected = (args: string): Promise<Awaited<ReturnType<typeof run>>> =>
      run('sh', ['-c', `'${process.execPath}' '${BIN}' ${args}`], { env });
    const untouched = /has \d+ bytes, vm only 4194304; nothing was written/;
    expect(await target.fails('import', image, 'vm', '--overwrite')).toMatch(untouched);
    expect((await redirected(`import - vm --overwrite < '${image}'`)).stderr).toMatch(untouched);
    expect((await redirected(`import - vm --overwrite --size 5M < /dev/zero`)).stderr).toMatch(untouched);
    expectBytes((await target.run(['export', 'vm', '-'])).stdoutBytes, old);
    // Another process has read a part of the file: the rest fits.
    const command = `'${process.execPath}' '${BIN}' import - vm --overwrite --raw`;
    const rest = await run('sh', ['-c', `(dd bs=1M count=1 of=/dev/null status=none; ${command}) < '${image}'`], {
      env,
    });
    expect({ code: rest.code, stderr: rest.stderr }).toEqual({ code: 0, stderr: '' });
    expectBytes((await target.run(['export', 'vm', '-'])).stdoutBytes, patterned(5 * MIB, 2).subarray(MIB));
  });

  test('that is too large for this VDI, or for any VDI, leaves no new store', async () => {
    for (const [size, says] of [
      ['5T', /at most 4398046511104 bytes; a larger --block-size-shift allows more/],
      ['65T', /a VDI can have at most 70368744177664/],
    ] as const) {
      const store = path.join(temporaryDirectory(), 'store');
      const failed = await cli(['import', '-', 'vm', '--size', size], { store, input: Buffer.alloc(MIB) });
      expect(failed).toMatchObject({ code: 1, stderr: expect.stringMatching(says) as string });
      expect(fs.existsSync(store)).toBe(false);
    }
  });

  test('without data creates no store and keeps none open', async () => {
    const store = path.join(temporaryDirectory(), 'store');
    const child = spawn(process.execPath, [BIN, 'import', '-', 'vm', '--size', '4M'], {
      env: { ...process.env, SHEEPGATE_STORE: store },
      stdio: ['pipe', 'ignore', 'pipe'],
    });
    let said = '';
    child.stderr.setEncoding('utf8').on('data', (text: string) => (said += text));
    await waitUntil(() => waitsForStdin(child.pid as number), 'it waits for its input');
    expect(fs.existsSync(store)).toBe(false);
    const target = storeWith(store, undefined);
    await target.ok('vdi', 'create', 'other', '1M');
    expect(await target.names()).toEqual(['other']);
    child.stdin.end();
    expect(await ended(child)).toMatchObject({ code: 1 });
    expect(said).toMatch(/^sheepgate: .*stdin is empty\n$/);
    expect(await target.names()).toEqual(['other']);
    for (const input of [Buffer.alloc(0), Buffer.concat([Buffer.from([0x1f, 0x8b, 0x08]), Buffer.alloc(100)])]) {
      const fresh = path.join(temporaryDirectory(), 'store');
      expect((await cli(['import', '-', 'vm'], { store: fresh, input })).code).toBe(1);
      expect(fs.existsSync(fresh)).toBe(false);
    }
  });

  test('is refused before anything is done if it is a redirected file of another length than --size', async () => {
    const store = path.join(temporaryDirectory(), 'store');
    const image = path.join(temporaryDirectory(), 'image');
    fs.writeFileSync(image, patterned(4 * MIB, 2));
    const redirected = (args: string): Promise<Awaited<ReturnType<typeof run>>> =>
      run('sh', ['-c', `'${process.execPath}' '${BIN}' import - vm --raw ${args} < '${image}'`], {
        env: { SHEEPGATE_STORE: store },
      });
    for (const [size, says] of [
      ['5M', /stdin has 4194304 bytes, --size says that 5242880 must arrive; nothing was done/],
      ['3M', /stdin has 4194304 bytes, --size says that only 3145728 arrive; nothing was done/],
    ] as const) {
      expect(oneLineOf(await redirected(`--size ${size}`), 1, size)).toMatch(says);
      expect(fs.existsSync(store)).toBe(false);
    }
    expect((await redirected('--size 4M')).code).toBe(0);
    const target = storeWith(store, undefined);
    expect(await target.json('vdi', 'show', 'vm')).toMatchObject({ size: 4 * MIB });
    // The same over an existing disk.
    expect((await redirected('--overwrite --size 5M')).stderr).toMatch(/must arrive; nothing was done/);
    expect(await redirected('--overwrite --size 4M')).toMatchObject({ code: 0, stderr: '' });
  });

  test('with another format, or without data, does not change the disk that it should overwrite', async () => {
    const target = storeWith(path.join(temporaryDirectory(), 'store'), undefined);
    const old = patterned(4 * MIB, 1);
    expect((await target.run(['import', '-', 'vm', '--size', '4M'], { input: old })).code).toBe(0);
    const gzip = Buffer.concat([Buffer.from([0x1f, 0x8b, 0x08]), Buffer.alloc(100)]);
    for (const [input, says] of [
      [gzip, /stdin is gzip/],
      [Buffer.alloc(0), /stdin is empty/],
    ] as const) {
      expect(oneLineOf(await target.run(['import', '-', 'vm', '--overwrite'], { input }), 1, 'import')).toMatch(says);
    }
    expect(await stateOf(target)).toBe(null);
    expectBytes((await target.run(['export', 'vm', '-'])).stdoutBytes, old);
  });
});

test('an import whose VDI was rolled back during the import does not finish it, and reports that', async () => {
  const daemon = await startDaemon();
  const target = storeWith(daemon.store, daemon);
  const content = patterned(4 * MIB, 1);
  expect((await target.run(['import', '-', 'vm', '--size', '4M'], { input: content })).code).toBe(0);
  await target.ok('vdi', 'snapshot', 'vm', 's');
  const body = { by: 'import', of: '', run: 'aa', size: MIB, overwrites: true, goesOn: false };
  const call = async (route: string, json: object): Promise<string> => {
    const { stdout } = await run('curl', [
      ...['-s', '--unix-socket', daemon.control, '-X', 'POST', '-d', JSON.stringify(json)],
      `http://control/vdis/vm/${route}`,
    ]);
    return stdout;
  };
  expect(await call('begin', body)).toMatch(/"unfinished":\{"by":"import"/);
  expect(await call('finish', { run: 'bb' })).toMatch(/UNFINISHED.*an import is at work on it/);
  await target.ok('vdi', 'rollback', 'vm@s');
  expect(await call('finish', { run: 'aa' })).toMatch(/UNFINISHED.*no longer has the mark of this command/);
  expect(await call('begin', { ...body, by: 'somebody' })).toMatch(/\\"by\\" must be one of import, restore, migrate/);
  expect(await call('begin', { ...body, run: '../..' })).toMatch(/hex digits/);
  expectBytes((await cli(['export', 'vm', '-'], { store: target.store })).stdoutBytes, content);
});
