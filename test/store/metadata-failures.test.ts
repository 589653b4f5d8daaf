/** A store whose metadata cannot be stored: a full disk, also at the creation of the store; a disk that is gone. */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { NbdClient } from 'nbd-server-ts';
import { expect, onTestFinished, test } from 'vitest';
import { hostDisk } from '../../src/system/real-disk.js';
import { LocalStore } from '../../src/store/local/local-store.js';
import { MetadataFile } from '../../src/store/local/metadata-file.js';
import { PAGE_ENTRIES, pagesOf } from '../../src/store/local/map-pages.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { cli, needs, temporaryDirectory, skipBecause, startDaemon, waitUntil } from '../harness/daemon.js';
import { FailingDisk, systemError } from '../harness/failing-disk.js';
import { fill, mountImage, mountThin, mountTmpfs, shutDown } from '../harness/filesystems.js';

const NEEDS_ROOT = 'mounting needs root';

async function opened(directory: string) {
  const lines: string[] = [];
  const failing = new FailingDisk();
  const store = await LocalStore.open(directory, { log: (line) => lines.push(line), disk: failing.disk });
  const catalog = new VdiCatalog(store);
  onTestFinished(() => catalog.close().catch(() => undefined));
  return { store, catalog, lines, failing };
}

test('creating a store on a full disk is an error that says so, and leaves nothing behind', async (context) => {
  const directory = mountTmpfs('1m');
  if (directory === undefined) return skipBecause(context, NEEDS_ROOT);
  const filler = fill(directory);
  const store = path.join(directory, 'store');
  const refused = await cli(['vdi', 'create', 'disk', '1G', '--store', store]);
  expect(refused).toMatchObject({ code: 1, signal: null, stderr: expect.stringMatching(/no space left/i) as string });
  expect(fs.existsSync(store)).toBe(false);
  fs.mkdirSync(store);
  expect((await cli(['serve', '--store', store])).stderr).toMatch(/no space left/i);
  expect(fs.readdirSync(store)).toEqual([]);
  fs.rmSync(filler);
});

test('on a full disk growth is refused before it begins, and everything can be deleted, also after a restart', async (context) => {
  const directory = mountTmpfs('8m');
  if (directory === undefined) return skipBecause(context, NEEDS_ROOT);
  const place = path.join(directory, 'store');
  const first = await opened(place);
  // A map of 1024 entries in each of 40 pages: every snapshot stores 320 KiB.
  await first.catalog.create('disk', 40 * PAGE_ENTRIES * 2 ** 20, { blockSizeShift: 20 });
  const vdi = await first.catalog.openVdi('disk');
  for (let page = 0; page < 40; page++) await vdi.write(page * PAGE_ENTRIES * 2 ** 20, Buffer.alloc(512, 1), false);
  await vdi.flush();
  const filler = fill(directory);
  const tags: string[] = [];
  const growing = async (): Promise<void> => {
    for (;;) {
      await first.catalog.snapshot('disk', `s${tags.length}`);
      tags.push(`s${tags.length}`);
    }
  };
  await expect(growing()).rejects.toMatchObject({ code: 'NO_SPACE', message: /disk is full.*delete snapshots/ });
  await expect(first.catalog.clone('disk@s0', 'copy')).rejects.toMatchObject({ code: 'NO_SPACE' });
  expect((await first.catalog.list()).map(({ tag }) => tag)).toEqual([...tags, '']);
  const read = Buffer.alloc(512);
  await vdi.read(0, read);
  expect(read).toEqual(Buffer.alloc(512, 1));
  await first.catalog.release(vdi);
  await first.catalog.close();
  fill(directory);

  const second = await opened(place);
  for (const tag of tags) await second.catalog.remove(`disk@${tag}`);
  await second.catalog.remove('disk');
  expect(await second.catalog.list()).toEqual([]);
  expect((await second.catalog.check({ repair: false })).problems).toEqual([]);
  fs.rmSync(filler);
  await second.catalog.create('disk', 2 ** 30);
});

test('a store that was killed on a full disk opens on the full disk', async (context) => {
  const directory = mountTmpfs('8m');
  if (directory === undefined) return skipBecause(context, NEEDS_ROOT);
  const store = path.join(directory, 'store');
  let daemon = await startDaemon({ store, args: ['--create', 'disk:1G'] });
  fill(directory);
  for (const tag of ['one', 'two', 'three']) {
    expect((await cli(['vdi', 'snapshot', 'disk', tag], { store })).stderr).toBe('');
  }
  await daemon.kill();
  fill(directory);
  daemon = await startDaemon({ store });
  expect((await cli(['vdi', 'delete', 'disk@two'], { store })).stderr).toBe('');
  expect((await daemon.stop()).code).toBe(0);
});

test('a failed commit fails only the operations that need the space; later commits work', async (context) => {
  const directory = mountTmpfs('8m');
  if (directory === undefined) return skipBecause(context, NEEDS_ROOT);
  const { store } = await opened(path.join(directory, 'store'));
  const { metadata } = store;
  const filler = fill(directory);
  const record = {
    ...{ name: 'x', tag: '', isSnapshot: false, snapId: 1, size: 2 ** 40, blockSizeShift: 20 },
    ...{ parentVid: 0, createdAt: 1, snapshotAt: 0 },
  };
  const large = pagesOf(9, new Uint32Array(2 ** 20).fill(9)).slice(0, 100);
  const commits = [1, 2, 3].flatMap((vid) => [
    metadata.commit({ records: [{ ...record, vid }] }),
    ...Array.from({ length: 4 }, (_, n) =>
      metadata.commit({ pages: large.map((page) => ({ ...page, vid: 100 + 10 * vid + n })) }),
    ),
  ]);
  const results = await Promise.allSettled(commits);
  expect(results.filter(({ status }) => status === 'rejected').length).toBeGreaterThan(0);
  for (const result of results) {
    if (result.status === 'rejected')
      expect(result.reason).toMatchObject({ code: 'NO_SPACE', message: /no space left/i });
  }
  for (const vid of [1, 2, 3]) expect(results[(vid - 1) * 5]?.status).toBe('fulfilled');
  fs.rmSync(filler);
  await metadata.commit({ records: [{ ...record, vid: 4 }] });
  expect(metadata.records().map(({ vid }) => vid)).toEqual([1, 2, 3, 4]);
  expect(metadata.strayVids()).toHaveLength(results.filter(({ status }) => status === 'fulfilled').length - 3);
});

test('when the pool of a thin disk is full, commits fail in any of their writes, and work again when there is room', async (context) => {
  const pool = mountTmpfs('40m');
  const directory = pool === undefined ? undefined : mountThin(pool, 64 * 2 ** 20);
  if (pool === undefined || directory === undefined) return skipBecause(context, NEEDS_ROOT);
  const { catalog } = await opened(path.join(directory, 'store'));
  await catalog.create('disk', 2 ** 30);
  execFileSync('sync', ['-f', directory]);
  const filler = fill(pool);
  const tags = ['one', 'two', 'three', 'four'];
  const results = await Promise.all(tags.map((tag) => catalog.snapshot('disk', tag).catch((error: unknown) => error)));
  const failed = results.filter((result) => result instanceof Error);
  expect(failed.length).toBeGreaterThan(1);
  for (const failure of failed)
    expect(failure).toMatchObject({ code: expect.stringMatching(/^(NO_SPACE|IO)$/) as string });
  fs.rmSync(filler);
  await catalog.snapshot('disk', 'after');
  const taken = tags.filter((_, n) => !(results[n] instanceof Error));
  expect((await catalog.list()).map(({ tag }) => tag)).toEqual([...taken, 'after', '']);
});

needs('prlimit')(
  'after a commit that failed for another reason than space, the next works as soon as it can',
  async () => {
    const daemon = await startDaemon({ args: ['--create', 'disk:1G'] });
    // Every write is EFBIG, which is not a full disk: for a commit an error like any other of the disk.
    const limit = (to: string): unknown =>
      execFileSync('prlimit', ['--pid', String(daemon.child.pid), `--fsize=${to}:`]);
    const snapshot = (tag: string) => cli(['vdi', 'snapshot', 'disk', tag, '--control', daemon.control]);
    limit('0');
    for (const tag of ['one', 'two']) {
      const refused = await snapshot(tag);
      expect(refused).toMatchObject({
        code: 1,
        stderr: expect.stringMatching(/meta\.mdb.*(EFBIG|too large)/i) as string,
      });
    }
    expect((await cli(['vdi', 'list', '--control', daemon.control])).stdout).not.toMatch(/one|two/);
    limit('unlimited');
    expect(await snapshot('three')).toMatchObject({ code: 0, stderr: '' });
    expect((await daemon.stop()).code).toBe(0);
  },
);

/** A daemon whose LMDB fails as `order` says: see failing-lmdb.c. */
async function daemonThatFails() {
  const directory = temporaryDirectory();
  const library = path.join(directory, 'failing-lmdb.so');
  const source = fileURLToPath(new URL('../harness/failing-lmdb.c', import.meta.url));
  execFileSync('gcc', ['-shared', '-fPIC', '-Wall', '-Werror', '-o', library, source, '-ldl']);
  const orders = path.join(directory, 'orders');
  fs.mkdirSync(orders);
  const daemon = await startDaemon({
    args: ['--create', 'disk:16M', '--create', 'other:16M'],
    env: { LD_PRELOAD: library, FAILING_LMDB: orders },
  });
  const order = (what: 'meta-page' | 'begin', code: 'ENOSPC' | 'EIO' | 'ENOMEM'): void =>
    fs.writeFileSync(path.join(orders, what), String(os.constants.errno[code]));
  const clients = await Promise.all(
    ['disk', 'other'].map(async (name) => {
      const client = await NbdClient.connect({ path: daemon.socket });
      await client.go(name);
      return client;
    }),
  );
  const [disk, other] = clients as [NbdClient, NbdClient];
  return { daemon, order, orders, disk, other };
}

needs('gcc')(
  'when the page that makes a commit valid cannot be written once, that commit is an error with the cause, and all goes on',
  async () => {
    const { daemon, order, orders, disk, other } = await daemonThatFails();
    const snapshot = (tag: string) => cli(['vdi', 'snapshot', 'disk', tag, '--control', daemon.control]);
    for (const [n, code, says] of [
      [1, 'ENOSPC', /meta\.mdb: .*no space left/i],
      [2, 'EIO', /meta\.mdb: .*(EIO|input\/output error)/i],
    ] as const) {
      await disk.write(n * 2 ** 22, Buffer.from(code));
      await other.write(n * 2 ** 22, Buffer.from(code));
      order('meta-page', code);
      await expect(disk.flush()).rejects.toMatchObject({ code });
      expect(fs.readdirSync(orders)).toEqual([]);
      await daemon.logged(says);
      await other.flush();
      await disk.flush();
      order('meta-page', code);
      expect(await snapshot(`not-${n}`)).toMatchObject({ code: 1, stderr: expect.stringMatching(says) as string });
      expect(await snapshot(`s${n}`)).toMatchObject({ code: 0, stderr: '' });
    }
    const list = await cli(['vdi', 'list', '--control', daemon.control]);
    expect(list.stdout).toMatch(/s1[^]*s2/);
    expect(list.stdout).not.toContain('not-');
    for (const client of [disk, other]) expect((await client.read(2 * 2 ** 22, 3)).toString()).toBe('EIO');
    order('meta-page', 'ENOSPC');
    // 0 if the failed commit stored which client has which VDI open, which is tried again; 1 if it was the last commit.
    expect(await daemon.stop()).toEqual({ code: expect.toBeOneOf([0, 1]) as number, signal: null });
    expect(fs.readdirSync(orders)).toEqual([]);
    // The only content of this page is that the store was closed.
    const { stdout } = await cli(['export', 'disk@s2', '-'], { store: daemon.store });
    expect(stdout.slice(2 * 2 ** 22, 2 * 2 ** 22 + 3)).toBe('EIO');
  },
);

needs('gcc')(
  'when a transaction does not begin, changes are errors that say so, and the daemon reads on and ends when it is told',
  async () => {
    const { daemon, order, disk, other } = await daemonThatFails();
    await disk.write(0, Buffer.from('flushed'));
    await disk.flush();
    await other.write(0, Buffer.from('new'));
    order('begin', 'ENOMEM');
    await expect(other.flush()).rejects.toMatchObject({ code: 'EIO' });
    const says = /LMDB does not begin a transaction.*started again/;
    await daemon.logged(says);
    const refused = await cli(['vdi', 'snapshot', 'disk', 's', '--control', daemon.control]);
    expect(refused).toMatchObject({ code: 1, stderr: expect.stringMatching(says) as string });
    expect((await disk.read(0, 7)).toString()).toBe('flushed');
    expect(await daemon.stop()).toEqual({ code: 1, signal: null });
    const again = await startDaemon({ store: daemon.store });
    expect(await cli(['vdi', 'snapshot', 'disk', 's', '--control', again.control])).toMatchObject({ code: 0 });
    expect((await again.stop()).code).toBe(0);
  },
);

test('after an error of its disk, the whole metadata file is read before LMDB maps it: an error, not the end of the process', async () => {
  const { store, catalog, failing } = await opened(path.join(temporaryDirectory(), 'store'));
  await catalog.create('disk', 2 ** 24, { blockSizeShift: 20 });
  const vdi = await catalog.openVdi('disk');
  await vdi.write(0, Buffer.from('text'), true);
  // One page can be read, but not the whole file.
  const reading = failing.instead({ calls: ['readSync'], file: /meta\.mdb$/ }, ({ name, args }, proceed) => {
    const [, into] = args as [number, Buffer];
    if (isIll && into.length > 4096) throw systemError('EIO', name);
    return proceed();
  });
  let isIll = true;
  expect(store.metadata.session).toBeDefined();
  store.backgroundError(Object.assign(new Error('reading an object'), { cause: systemError('EIO', 'read') }));
  const reads = [
    () => store.metadata.session,
    () => store.metadata.kept,
    () => store.metadata.state(),
    () => store.metadata.map(vdi.record),
  ];
  for (const read of reads) expect(read).toThrow(/reading metadata in .*meta\.mdb: .*EIO/);
  await expect(catalog.snapshot('disk', 's')).rejects.toMatchObject({ code: 'IO', message: /EIO/ });
  isIll = false;
  await catalog.snapshot('disk', 's');
  for (const read of reads) expect(read).not.toThrow();
  // It is not read as a whole every time from now on.
  const before = reading.count;
  expect(store.metadata.session).toBeDefined();
  expect(reading.count).toBe(before + 1);
});

test('while LMDB is opened again after a failed commit, other disks are opened a moment later, not refused', async () => {
  const { store, catalog, failing } = await opened(path.join(temporaryDirectory(), 'store'));
  await catalog.create('disk', 2 ** 24, { blockSizeShift: 20 });
  const written = await catalog.openVdi('disk');
  await written.write(0, Buffer.from('text'), true);
  await catalog.release(written);
  failing.fail({ calls: ['commit'], times: 1 }, 'EIO');
  const closing = failing.hold({ calls: ['closeDatabase'] });
  const openings = failing.instead({ calls: ['openDatabase'] }, (_, proceed) => proceed());
  const failed = expect(store.state.commit(new Map([['a', 1]]))).rejects.toMatchObject({ code: 'IO' });
  const isBeingOpened = (): boolean => {
    try {
      store.metadata.state();
      return false;
    } catch (error) {
      return /could not be opened again yet/.test((error as Error).message);
    }
  };
  await waitUntil(isBeingOpened, 'LMDB is being opened anew');
  const opening = catalog.openVdi('disk');
  void opening.catch(() => undefined);
  // Until nothing else is in progress that the opening could wait for.
  const sooner = await Promise.race([opening.then(() => 'opened', String), catalog.list().then(() => undefined)]);
  expect(sooner).toBe(undefined);
  closing.release();
  const vdi = await opening;
  const read = Buffer.alloc(4);
  await vdi.read(0, read);
  expect(read.toString()).toBe('text');
  await failed;
  expect(openings.count).toBe(1);
});

test('metadata that is truncated while it is open is reported as damage, and does not end the process', async () => {
  const { store, catalog } = await opened(path.join(temporaryDirectory(), 'store'));
  await catalog.create('disk', 2 ** 30);
  fs.truncateSync(path.join(store.location, 'meta.mdb'), 4096);
  await expect(catalog.snapshot('disk', 's')).rejects.toMatchObject({ code: 'DAMAGED', message: /truncated/ });
  expect(() => store.metadata.state()).toThrow(/meta\.mdb/);
});

test('of changes in one commit, a change that throws stores nothing, and the others are stored', async () => {
  let env!: { put(key: string, value: Buffer): unknown; get(key: string): Buffer | undefined };
  const file = new MetadataFile(
    hostDisk,
    path.join(temporaryDirectory(), 'm.mdb'),
    { readOnly: false },
    (opened) => (env = opened),
  );
  const put = (key: string, fails = false) =>
    file.transaction(() => {
      void env.put(key, Buffer.from(key));
      if (fails) throw new Error(`not ${key}`);
    });
  const results = await Promise.allSettled([put('a'), put('b', true), put('c'), put('d', true)]);
  expect(results.map(({ status }) => status)).toEqual(['fulfilled', 'rejected', 'fulfilled', 'rejected']);
  expect(['a', 'b', 'c', 'd'].map((key) => env.get(key)?.toString())).toEqual(['a', undefined, 'c', undefined]);
  await file.close();
});

for (const type of ['ext4', 'xfs'] as const) {
  test(`when a disk with ${type} is gone, errors name the cause, and SIGTERM ends the daemon in order`, async (context) => {
    const directory = mountImage(type, 400 * 2 ** 20);
    if (directory === undefined) return skipBecause(context, `mounting ${type} on a loop device needs root and mkfs`);
    const daemon = await startDaemon({ store: path.join(directory, 'store'), args: ['--create', 'disk:1G'] });
    // Through its own socket: the name of a socket in the store is found only while the kernel has it cached.
    expect((await cli(['vdi', 'snapshot', 'disk', 'before'], { store: daemon.store })).stderr).toBe('');
    shutDown(directory);
    for (const args of [
      ['vdi', 'list'],
      ['vdi', 'create', 'other', '1G'],
      ['vdi', 'snapshot', 'disk', 'after'],
      ['vdi', 'delete', 'disk@before'],
      ['vdi', 'clone', 'disk@before', 'copy'],
    ]) {
      const refused = await cli([...args, '--control', daemon.control]);
      expect(refused).toMatchObject({ code: 1, signal: null, stderr: expect.stringContaining('EIO') as string });
    }
    const client = await NbdClient.connect({ path: daemon.socket });
    await expect(client.go('disk')).rejects.toThrow();
    client.destroy();
    const findRefusal = (): string | undefined =>
      daemon
        .log()
        .split('\n')
        .find((line) => line.endsWith('}') && line.includes('cannot be opened'));
    const refusal = await waitUntil(findRefusal, 'the refusal is in the log');
    expect(JSON.parse(refusal)).toMatchObject({
      level: 50,
      msg: expect.stringMatching(/^export "disk" cannot be opened: .*EIO/) as string,
    });
    expect(await daemon.stop()).toEqual({ code: 1, signal: null });
    const last = daemon.log().trimEnd().split('\n').at(-1);
    expect(last).toMatch(/^sheepgate: .*meta\.mdb: .*EIO/);
    expect(daemon.log()).not.toMatch(/undefined|internal error|unhandled/i);
  });
}
