/**
 * Logs that a killed process has left in recent/, after everything that can happen to them and to the disk: a log is applied if
 * all objects that it names are certain to be there; otherwise it is set aside, and the store is not harmed.
 */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import zlib from 'node:zlib';
import { NbdClient } from 'nbd-server-ts';
import { afterEach, describe, expect, test } from 'vitest';
import { logHeader, mapLogDirectory } from '../../src/store/local/map-log-format.js';
import { hostDisk } from '../../src/system/real-disk.js';
import { LONG_BYTES } from '../../src/store/local/map-log.js';
import { LocalStore } from '../../src/store/local/local-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import type { Vdi } from '../../src/vdi/vdi.js';
import { cli, skipBecause, startDaemon, temporaryDirectory, type Daemon } from '../harness/daemon.js';
import { FailingDisk, systemError, WRITES } from '../harness/failing-disk.js';
import { mountAgain, mountImage, shutDown } from '../harness/filesystems.js';

const OBJECT = 2 ** 20;
const BLOCK = 4096;
/** Bytes of an entry in a log. */
const ENTRY = 24;
const SIZE = 8 * OBJECT;
/** The least that XFS accepts. */
const DISK = 512 * OBJECT;

interface Opened {
  readonly directory: string;
  readonly failing: FailingDisk;
  readonly store: LocalStore;
  readonly catalog: VdiCatalog;
  readonly lines: string[];
}

const opened: Opened[] = [];

async function open(directory: string, failing = new FailingDisk()): Promise<Opened> {
  const lines: string[] = [];
  const store = await LocalStore.open(directory, { log: (line) => lines.push(line), disk: failing.disk });
  const result = { directory, failing, store, catalog: new VdiCatalog(store), lines };
  opened.push(result);
  return result;
}

afterEach(async () => {
  for (const { catalog } of opened.splice(0)) await catalog.close().catch(() => undefined);
});

function logsOf(directory: string): string[] {
  const folder = path.join(directory, 'recent');
  return fs.readdirSync(folder).map((name) => path.join(folder, name));
}

function setAside(directory: string): string[] {
  const folder = path.join(directory, 'set-aside');
  return fs.existsSync(folder) ? fs.readdirSync(folder) : [];
}

function objectFiles(directory: string): string[] {
  return fs
    .readdirSync(path.join(directory, 'objects'), { recursive: true, encoding: 'utf8' })
    .filter((name) => name.length > 2)
    .sort();
}

/** Rewrite the headers of the logs in this copy of a store as if they had been written here, in `session`. */
function makeFit(directory: string, session: string): void {
  for (const log of logsOf(directory)) {
    const fd = fs.openSync(log, 'r+');
    const header = logHeader(hostDisk, mapLogDirectory(hostDisk, directory), session, fd);
    fs.writeSync(fd, header, 0, header.length, 0);
    fs.closeSync(fd);
  }
}

async function read(vdi: Vdi, idx: number): Promise<string> {
  const into = Buffer.alloc(8);
  await vdi.read(idx * OBJECT, into);
  return into.toString('latin1').replaceAll('\0', '');
}

const write = (vdi: Vdi, idx: number, text: string): Promise<void> =>
  Promise.resolve(vdi.write(idx * OBJECT, Buffer.from(text), false));

async function newStore(): Promise<Opened & { vdi: Vdi }> {
  const made = await open(path.join(temporaryDirectory(), 'store'));
  await made.catalog.create('disk', SIZE, { blockSizeShift: 20 });
  return { ...made, vdi: await made.catalog.openVdi('disk') };
}

function copyOf(directory: string): string {
  const copy = path.join(temporaryDirectory(), 'copy');
  execFileSync('cp', ['-a', directory, copy]);
  return copy;
}

test('an older log over a newer map undoes nothing: each entry belongs to a flush', async () => {
  const { directory, store, vdi } = await newStore();
  await write(vdi, 0, 'first');
  await vdi.trim(0, OBJECT, false);
  const [log = ''] = logsOf(directory);
  const older = fs.readFileSync(log);
  await write(vdi, 0, 'flushed');
  await write(vdi, 1, 'too');
  await vdi.flush();
  await write(vdi, 2, 'answered');
  const copy = copyOf(directory);
  const newer = fs.readFileSync(log);
  // Once as one log that spans the flush, and once as a log without the entries after it.
  for (const [bytes, third] of [
    [newer, 'answered'],
    [older, ''],
  ] as const) {
    const one = copyOf(copy);
    fs.writeFileSync(path.join(one, 'recent', path.basename(log)), bytes);
    makeFit(one, store.logs.session);
    const after = await open(one);
    const again = await after.catalog.openVdi('disk');
    expect(await Promise.all([0, 1, 2].map((idx) => read(again, idx)))).toEqual(['flushed', 'too', third]);
    expect(setAside(one)).toEqual([]);
    expect(objectFiles(one)).toHaveLength(third === '' ? 2 : 3);
  }
});

test('the log of a client that never flushes stays short, and what it has answered survives a kill', async () => {
  const { directory, store, catalog } = await newStore();
  const entries = Math.ceil((1.5 * LONG_BYTES) / ENTRY);
  const size = 2 * entries * BLOCK;
  await catalog.create('big', size, { blockSizeShift: 20 });
  const vdi = await catalog.openVdi('big');
  for (let at = 0; at < size; at += OBJECT) await vdi.write(at, Buffer.alloc(Math.min(OBJECT, size - at), 1), false);
  await catalog.snapshot('big', 's');
  // All objects are overlays before, so that nothing else asks for a flush.
  for (let at = 0; at < size; at += OBJECT) await vdi.trim(at, BLOCK, false);
  await vdi.flush();
  let longest = 0;
  // Every second block: each is an entry of its own.
  for (let n = 0; n < entries; n++) {
    await vdi.trim((2 * n + 1) * BLOCK, BLOCK, false);
    if (n % 1000 > 0) continue;
    for (const log of logsOf(directory)) longest = Math.max(longest, fs.statSync(log).size);
  }
  expect(longest).toBeGreaterThan(LONG_BYTES / 2);
  expect(longest).toBeLessThan(1.2 * LONG_BYTES);
  const copy = copyOf(directory);
  makeFit(copy, store.logs.session);
  const killed = await open(copy);
  const after = await killed.catalog.openVdi('big');
  const block = Buffer.alloc(2 * BLOCK);
  for (let n = 0; n < entries; n++) {
    await after.read(2 * n * BLOCK, block);
    const isRight =
      block.readUInt8(BLOCK - 1) === (n % (OBJECT / BLOCK / 2) === 0 ? 0 : 1) && block.readUInt8(BLOCK) === 0;
    if (!isRight) expect.fail(`block ${2 * n}`);
  }
  expect(setAside(copy)).toEqual([]);
});

test('the log has the content of the VDI after a snapshot, whether the snapshot was stored or not', async () => {
  const { directory, store, catalog, vdi } = await newStore();
  await write(vdi, 0, 'before');
  await catalog.snapshot('disk', 'one');
  await write(vdi, 1, 'after');
  await vdi.flush();
  await vdi.trim(OBJECT, OBJECT, false);
  await write(vdi, 2, 'then');
  const copy = copyOf(directory);
  makeFit(copy, store.logs.session);
  const after = await open(copy);
  const again = await after.catalog.openVdi('disk');
  expect(await Promise.all([0, 1, 2].map((idx) => read(again, idx)))).toEqual(['before', '', 'then']);
  expect(await read(await after.catalog.openVdi('disk@one'), 2)).toBe('');
});

test('a log that could not be written does not count until a flush has succeeded, and then from the beginning of that flush', async () => {
  const { directory, failing, store, catalog, vdi, lines } = await newStore();
  const full = failing.fail({ calls: WRITES, file: /recent/ }, 'ENOSPC');
  await write(vdi, 0, 'unlogged');
  full.off();
  expect(lines.join()).toMatch(/would be lost if this process were killed/);
  /** A flush that calls `during` when its map is about to be stored. */
  const flushed = async (during: () => Promise<void>, fails: boolean): Promise<void> => {
    failing.instead({ calls: ['commit'], times: 1 }, async ({ name }, proceed) => {
      await during();
      if (fails) throw systemError('ENOSPC', name);
      return proceed();
    });
    if (fails) await expect(vdi.flush()).rejects.toMatchObject({ code: 'NO_SPACE' });
    else await vdi.flush();
  };
  await flushed(() => write(vdi, 1, 'failed'), true);
  await write(vdi, 2, 'after');
  expect(logsOf(directory)).toEqual([]);
  await flushed(async () => {
    await write(vdi, 3, 'during');
    expect(logsOf(directory)).toEqual([]);
  }, false);
  expect(logsOf(directory)).toHaveLength(1);
  await write(vdi, 4, 'then');
  const copy = copyOf(directory);
  makeFit(copy, store.logs.session);
  await catalog.close();
  const again = await (await open(copy)).catalog.openVdi('disk');
  const found = await Promise.all([0, 1, 2, 3, 4].map((idx) => read(again, idx)));
  expect(found).toEqual(['unlogged', 'failed', 'after', 'during', 'then']);
  expect(setAside(copy)).toEqual([]);
});

for (const what of ['a VDI', 'a VDI and its snapshot', 'a VDI whose last flush had failed']) {
  const isMoved = what.endsWith('snapshot');
  test(`killed between the removal of ${what} and that of its log: nothing is in doubt`, async () => {
    const { directory, failing, store, catalog, vdi } = await newStore();
    await write(vdi, 0, 'flushed');
    await vdi.flush();
    await write(vdi, 1, 'answered');
    if (isMoved) {
      await catalog.snapshot('disk', 'one');
      await write(vdi, 2, 'moved');
    }
    const logs = logsOf(directory).map((log) => [path.basename(log), fs.readFileSync(log)] as const);
    expect(logs).not.toEqual([]);
    const full = failing.fail({ calls: what.endsWith('failed') ? ['commit'] : [] }, 'ENOSPC');
    await catalog.release(vdi).catch((error: unknown) => expect(error).toMatchObject({ code: 'NO_SPACE' }));
    full.off();
    if (isMoved) await catalog.remove('disk@one');
    await catalog.remove('disk');
    const copy = copyOf(directory);
    for (const [name, bytes] of logs) fs.writeFileSync(path.join(copy, 'recent', name), bytes);
    makeFit(copy, store.logs.session);
    const after = await open(copy);
    expect(after.lines).toEqual([`store ${copy} was not shut down cleanly; removed 0 unreferenced objects`]);
    expect(setAside(copy)).toEqual([]);
    expect((await after.catalog.check({ repair: false })).problems).toEqual([]);
  });
}

/** The first entry of a log of `vid`. */
function begins(vid: number): Buffer {
  const entry = Buffer.alloc(ENTRY);
  entry.writeUInt32LE(1, 0);
  entry.writeUInt32LE(vid, 4);
  entry.writeUInt32LE(zlib.crc32(entry.subarray(0, 20)), 20);
  return entry;
}

describe('of a VDI with several logs', () => {
  const MOVED = 3;

  /** A store after a kill: "disk" has two logs, with a snapshot between them that was not stored; "other" has one. */
  async function killed(): Promise<{ copy: string; session: string; logs: [string, string]; files: string[] }> {
    const { directory, store, catalog, vdi } = await newStore();
    await catalog.create('other', SIZE, { blockSizeShift: 20 });
    await write(vdi, 0, 'flushed');
    await vdi.flush();
    await write(vdi, 1, 'first');
    const before = copyOf(directory);
    const other = await catalog.openVdi('other');
    await write(other, 0, 'other');
    await catalog.snapshot('disk', 'one');
    await write(vdi, 2, 'second');
    const copy = copyOf(directory);
    fs.copyFileSync(path.join(before, 'meta.mdb'), path.join(copy, 'meta.mdb'));
    const [first = ''] = logsOf(copy);
    const bytes = fs.readFileSync(first);
    let at = 512;
    while (bytes.readUInt32LE(at) !== MOVED) at += ENTRY;
    const second = path.join(path.dirname(first), '9');
    fs.writeFileSync(
      second,
      Buffer.concat([bytes.subarray(0, 512), begins(bytes.readUInt32LE(at + 4)), bytes.subarray(at + ENTRY)]),
    );
    fs.truncateSync(first, at + ENTRY);
    makeFit(copy, store.logs.session);
    return { copy, session: store.logs.session, logs: [first, second], files: objectFiles(copy) };
  }

  function spoil(log: string, offset: number): void {
    const bytes = fs.readFileSync(log);
    bytes[offset] = (bytes[offset] ?? 0) ^ 4;
    fs.writeFileSync(log, bytes);
  }

  async function found(after: Opened): Promise<string[]> {
    const disk = await after.catalog.openVdi('disk');
    const texts = [await read(disk, 0), await read(disk, 1), await read(disk, 2)];
    return [...texts, await read(await after.catalog.openVdi('other'), 0)];
  }

  test('the older one says which VDI the newer one belongs to', async () => {
    const { copy } = await killed();
    expect(await found(await open(copy))).toEqual(['flushed', 'first', 'second', 'other']);
    expect(setAside(copy)).toEqual([]);
  });

  for (const [what, offset] of [
    ['at its end', -10],
    ['in its middle', 512 + ENTRY + 4],
  ] as const) {
    for (const which of [0, 1] as const) {
      test(`all are set aside if ${['the older', 'the newer'][which]} one is damaged ${what}; other VDIs lose nothing`, async () => {
        const { copy, logs, files } = await killed();
        const log = logs[which];
        spoil(log, offset < 0 ? fs.statSync(log).size + offset : offset);
        const after = await open(copy);
        expect(await found(after)).toEqual(['flushed', '', '', 'other']);
        expect(after.lines.join()).toContain(`${log} and 1 more: an entry in it is damaged`);
        expect(setAside(copy)).toHaveLength(2);
        expect(objectFiles(copy)).toEqual(files);
      });
    }
  }

  test('all logs are set aside together with a log that does not name its VDI', async () => {
    const { copy, logs, files } = await killed();
    spoil(logs[0], 512 + 4);
    expect(await found(await open(copy))).toEqual(['flushed', '', '', '']);
    expect(setAside(copy)).toHaveLength(3);
    expect(objectFiles(copy)).toEqual(files);
  });

  test('all logs are set aside together with a log that the disk cannot read', async () => {
    const { copy, logs } = await killed();
    const failing = new FailingDisk();
    failing.fail({ calls: ['readSync'], file: new RegExp(`^${logs[1]}$`) }, 'EIO');
    const after = await open(copy, failing);
    expect(await found(after)).toEqual(['flushed', '', '', '']);
    expect(after.lines.join()).toMatch(/9 and 2 more: EIO: i\/o error/);
  });

  test('none is applied by the start after an interrupted start that was setting them aside', async () => {
    const { copy, session, logs } = await killed();
    spoil(logs[0], fs.statSync(logs[0]).size - 10);
    let interrupted = '';
    const failing = new FailingDisk();
    failing.instead({ calls: ['renameSync'], file: /recent/, times: 1 }, (_, proceed) => {
      proceed();
      interrupted = copyOf(copy);
    });
    await open(copy, failing);
    makeFit(interrupted, session);
    expect(logsOf(interrupted)).toHaveLength(2);
    expect(await found(await open(interrupted))).toEqual(['flushed', '', '', 'other']);
    expect(setAside(interrupted)).toHaveLength(2);
  });
});

describe('set aside, reported, and nothing deleted', () => {
  const cases: Record<string, { readonly spoil: (copy: string, session: string) => void; readonly says: RegExp }> = {
    'the log of a store that was copied (cp -a) and opened beside it': {
      spoil: () => undefined,
      says: /written elsewhere/,
    },
    'the log of an earlier session': {
      spoil: (copy) => makeFit(copy, '00000000-0000-4000-8000-000000000000'),
      says: /an earlier session/,
    },
    'a log with a bit flipped': {
      spoil: (copy, session) => {
        makeFit(copy, session);
        const [log = ''] = logsOf(copy);
        const bytes = fs.readFileSync(log);
        bytes[bytes.length - 10] = (bytes[bytes.length - 10] ?? 0) ^ 4;
        fs.writeFileSync(log, bytes);
      },
      says: /damaged/,
    },
    'a log that speaks of an object that is not there': {
      spoil: (copy, session) => {
        makeFit(copy, session);
        const last = objectFiles(copy).at(-1) ?? '';
        fs.rmSync(path.join(copy, 'objects', last));
      },
      says: /is missing/,
    },
    'a log that speaks of an object that is too short': {
      spoil: (copy, session) => {
        makeFit(copy, session);
        const last = objectFiles(copy).at(-1) ?? '';
        fs.truncateSync(path.join(copy, 'objects', last), 4096);
      },
      says: /is 4096 bytes long/,
    },
    'a log of an unknown VDI': {
      spoil: (copy, session) => {
        const [log = ''] = logsOf(copy);
        const bytes = fs.readFileSync(log);
        begins(0x77).copy(bytes, 512);
        fs.writeFileSync(log, bytes);
        makeFit(copy, session);
      },
      says: /a VDI that is not stored, with vid 77/,
    },
    'a log of another version on the same boot': {
      spoil: (copy) => {
        const [log = ''] = logsOf(copy);
        const boot = fs.readFileSync('/proc/sys/kernel/random/boot_id', 'latin1').trim().replaceAll('-', '');
        const header = Buffer.alloc(64);
        header.write('sheepgate map log 1', 0);
        header.write(boot, 32, 'latin1');
        fs.writeFileSync(log, Buffer.concat([header, Buffer.alloc(4096)]));
      },
      says: /not a log that this version knows/,
    },
  };
  for (const [name, { spoil, says }] of Object.entries(cases)) {
    test(name, async () => {
      const { directory, store, vdi } = await newStore();
      await write(vdi, 0, 'flushed');
      await vdi.flush();
      await write(vdi, 1, 'answered');
      const copy = copyOf(directory);
      spoil(copy, store.logs.session);
      const files = objectFiles(copy);
      const after = await open(copy);
      expect(after.lines.join('\n')).toMatch(says);
      expect(setAside(copy)).toHaveLength(1);
      expect(logsOf(copy)).toEqual([]);
      expect(objectFiles(copy)).toEqual(files);
      const again = await after.catalog.openVdi('disk');
      expect([await read(again, 0), await read(again, 1)]).toEqual(['flushed', '']);
      // New objects get unused names: kept objects are not overwritten, now or after further starts.
      const kept = (): string[] =>
        files.map((file) => fs.readFileSync(path.join(copy, 'objects', file)).toString('latin1', 0, 8));
      const before = kept();
      await write(again, 1, 'new');
      await write(again, 3, 'new');
      await again.flush();
      await after.catalog.release(again);
      await after.catalog.create('second', SIZE, { blockSizeShift: 20 });
      expect(kept()).toEqual(before);
      await after.catalog.close();
      const third = await open(copy);
      await write(await third.catalog.openVdi('disk'), 1, 'newer');
      expect(kept()).toEqual(before);
      // Every check reports it until the operator has it removed.
      await third.catalog.close();
      const fourth = await open(copy);
      const report = await fourth.catalog.check({ repair: false });
      expect(report.problems.join('\n')).toMatch(says);
      expect(report.problems.filter((line) => line.startsWith('set aside:'))).toHaveLength(1);
      await fourth.catalog.check({ repair: true });
      expect((await fourth.catalog.check({ repair: false })).problems).toEqual([]);
      expect(setAside(copy)).toEqual([]);
    });
  }

  test('check --repair reports the objects that its own start has kept, and removes them only when it runs again', async () => {
    const { directory, vdi } = await newStore();
    await write(vdi, 0, 'answered');
    const copy = copyOf(directory);
    const { catalog, lines } = await open(copy);
    expect(lines.join()).toMatch(
      /'sheepgate check' lists both.* run 'sheepgate check --repair' after that to remove them/,
    );
    expect(lines.join()).not.toContain('stop the daemon');
    const first = await catalog.check({ repair: true });
    expect(first.problems.join('\n')).toContain('kept by this start: look first, then run check --repair again');
    expect(first.repaired).toBe(0);
    expect(setAside(copy)).toHaveLength(1);
    expect((await catalog.check({ repair: true })).repaired).toBe(2);
    expect((await catalog.check({ repair: false })).problems).toEqual([]);
  });

  test('also by the start after an interrupted start, between setting aside and storing the kept objects', async () => {
    const { directory, vdi } = await newStore();
    await write(vdi, 0, 'flushed');
    await vdi.flush();
    await write(vdi, 1, 'answered');
    const copy = copyOf(directory);
    const [log = ''] = logsOf(copy);
    fs.mkdirSync(path.join(copy, 'set-aside'));
    fs.renameSync(log, path.join(copy, 'set-aside', 'a log'));
    const files = objectFiles(copy);
    const after = await open(copy);
    expect(objectFiles(copy)).toEqual(files);
    const again = await after.catalog.openVdi('disk');
    await write(again, 1, 'new');
    expect(objectFiles(copy)).toHaveLength(files.length + 1);
    await after.catalog.close();
    expect((await (await open(copy)).catalog.check({ repair: false })).problems.join()).toMatch(/kept since/);
  });

  test('not after a power loss: logs of another boot are not doubtful', async () => {
    const { directory, vdi } = await newStore();
    await write(vdi, 1, 'answered');
    const copy = copyOf(directory);
    const [log = ''] = logsOf(copy);
    const bytes = fs.readFileSync(log);
    bytes.write('another', bytes.indexOf('boot ') + 5);
    fs.writeFileSync(log, bytes);
    const after = await open(copy);
    expect(after.lines).toEqual([`store ${copy} was not shut down cleanly; removed 1 unreferenced objects`]);
    expect(objectFiles(copy)).toEqual([]);
    expect((await after.catalog.check({ repair: false })).problems).toEqual([]);
  });

  test('if the folder for them cannot be made, they stay where they are, and the store opens', async () => {
    const { directory, vdi } = await newStore();
    await write(vdi, 1, 'answered');
    const copy = copyOf(directory);
    fs.writeFileSync(path.join(copy, 'set-aside'), '');
    const after = await open(copy);
    const again = await after.catalog.openVdi('disk');
    expect(logsOf(copy)).toHaveLength(1);
    await write(again, 2, 'new');
    expect(logsOf(copy)).toHaveLength(2);
    expect(objectFiles(copy)).toHaveLength(2);
  });
});

describe('with a daemon', () => {
  /** The client stays connected: when it leaves, the daemon flushes. */
  async function written(daemon: Daemon): Promise<NbdClient> {
    const client = await NbdClient.connect({ path: daemon.socket });
    await client.go('disk');
    await client.write(0, Buffer.from('flushed'));
    await client.flush();
    await client.write(OBJECT, Buffer.from('answered'));
    return client;
  }

  async function found(daemon: Daemon): Promise<string[]> {
    const client = await NbdClient.connect({ path: daemon.socket });
    await client.go('disk');
    const texts = [await client.read(0, 8), await client.read(OBJECT, 8)];
    await client.disconnect();
    return texts.map((text) => text.toString('latin1').replaceAll('\0', ''));
  }

  const create = async (store: string): Promise<void> => {
    const { code } = await cli(['vdi', 'create', 'disk', String(SIZE), '--block-size-shift', '20'], { store });
    expect(code).toBe(0);
  };

  for (const type of ['ext4', 'xfs'] as const) {
    test(`after the disk went away and came back on the same boot (${type}), flushed data is there`, async (context) => {
      const disk = mountImage(type, DISK);
      if (disk === undefined) return skipBecause(context, `mounting a loop device with ${type} needs root`);
      const store = path.join(disk, 'store');
      await create(store);
      let daemon = await startDaemon({ store });
      const client = await written(daemon);
      // The worst case of write-back: the log has reached the disk, the object that it names has not.
      for (const log of logsOf(store)) execFileSync('sync', [log, path.dirname(log)]);
      shutDown(disk, { unsynced: true });
      await daemon.kill();
      client.destroy();
      mountAgain(disk);
      daemon = await startDaemon({ store });
      expect(await found(daemon)).toEqual(['flushed', '']);
      expect(setAside(store)).toHaveLength(1);
      await daemon.stop();
    });
  }

  test('killed and started again in its own mount namespace, as systemd does: no answered write is lost', async (context) => {
    if (process.getuid?.() !== 0) return skipBecause(context, 'needs root, for a mount namespace');
    const store = path.join(temporaryDirectory(), 'store');
    await create(store);
    let daemon = await startDaemon({ store });
    const client = await written(daemon);
    await daemon.kill();
    client.destroy();
    daemon = await startDaemon({ store, under: ['unshare', '--mount', '--'] });
    expect(await found(daemon)).toEqual(['flushed', 'answered']);
    expect(setAside(store)).toEqual([]);
    await daemon.stop();
  });
});
