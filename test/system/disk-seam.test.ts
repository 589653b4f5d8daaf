/**
 * The disk seam: no code bypasses it, a recording disk sees everything that a power loss could undo, and each failed call is
 * the right error.
 */
import fs from 'node:fs';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { takeBackup } from '../../src/jobs/backup/take-backup.js';
import { BackupTarget } from '../../src/jobs/backup/target.js';
import { DirectOperations } from '../../src/operations/direct-operations.js';
import { VdiExports } from '../../src/export/vdi-exports.js';
import { LocalStore } from '../../src/store/local/local-store.js';
import { StoreError } from '../../src/store/store-error.js';
import type { HostDisk } from '../../src/system/disk.js';
import { hostDisk } from '../../src/system/real-disk.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import type { Vdi } from '../../src/vdi/vdi.js';
import { memoryDirectory, temporaryDirectory } from '../harness/daemon.js';
import { FailingDisk, systemError } from '../harness/failing-disk.js';
import { interpose } from '../harness/interposed-disk.js';
import { byLength } from '../harness/length.js';
import { RecordingDisk } from '../harness/recording-disk.js';

const OBJECT = 2 ** 20;
const SIZE = 4 * OBJECT;
const BLOCK = 4096;
const NOTHING = Buffer.alloc(0);
const SOURCES = path.resolve(import.meta.dirname, '../../src');

/** Files of src/jobs that backup targets consist of, in addition to the folder backup/. */
const PARTS_OF_TARGETS = ['block-hashes', 'image-sha256', 'paged-ranges', 'read-all', 'target-files'];

describe('no code bypasses the seam', () => {
  const sources = ['store/local', 'jobs/backup']
    .flatMap((folder) =>
      fs
        .readdirSync(path.join(SOURCES, folder), { recursive: true, encoding: 'utf8' })
        .filter((name) => name.endsWith('.ts'))
        .map((name) => path.join(folder, name)),
    )
    .concat(PARTS_OF_TARGETS.map((name) => path.join('jobs', `${name}.ts`)));

  test('the local store and the backup targets import neither node:fs nor libc.ts', () => {
    expect(sources.length).toBeGreaterThan(30);
    const past =
      /from '(?:node:)?fs(?:\/promises)?'|import\('(?:node:)?fs|from '[^']*\/libc\.js'|from 'koffi'|node-files/;
    const who = sources.filter((name) => past.test(fs.readFileSync(path.join(SOURCES, name), 'utf8')));
    expect(who).toEqual([]);
  });

  test('the real disk is taken where a store or a target is opened, and handed on from there', () => {
    const takers = sources.filter((name) =>
      /\bhostDisk\b/.test(fs.readFileSync(path.join(SOURCES, name), 'utf8').replaceAll(/^import .*$/gm, '')),
    );
    expect(takers.sort()).toEqual([
      'jobs/backup/take-backup.ts',
      'jobs/backup/target.ts',
      'store/local/local-store.ts',
      'store/local/rescue.ts',
    ]);
  });
});

test('only object-files.ts and its parts know names of files; only layered-objects.ts and its parts import it', () => {
  const folder = path.join(SOURCES, 'store/local');
  const importersOf = (part: string): string[] =>
    fs
      .readdirSync(folder)
      .filter((name) => fs.readFileSync(path.join(folder, name), 'utf8').includes(`/${part}.js'`))
      .sort();
  expect(importersOf('object-files')).toEqual([
    'layered-objects.ts',
    'layers.ts',
    'local-store.ts',
    'open-layers.ts',
    'overlay-writes.ts',
    'segment-space.ts',
  ]);
  const parts = ['object-names', 'object-opening', 'object-removal', 'sparse-copy'];
  const users = new Set(parts.flatMap(importersOf));
  // A rescue copies the files of a store that does not open.
  const rescue = ['rescue-build.ts', 'rescue-sources.ts'];
  expect([...users].sort()).toEqual(['object-files.ts', 'object-opening.ts', 'object-removal.ts', ...rescue]);
});

/**
 * Without the growth of meta.mdb, which depends on the pages that LMDB takes, and without the change record, which is written
 * beside a commit, in no order with it: see the last test.
 */
const takeLines = (): string[] =>
  recording.takeLines().filter((line) => line !== 'resize meta.mdb' && !line.includes(' copies'));

let directory: string;
let recording: RecordingDisk;
let failing: FailingDisk;
let store: LocalStore;
let catalog: VdiCatalog;
let vdi: Vdi;
const lines: string[] = [];

async function open(place: string, disk: HostDisk): Promise<void> {
  store = await LocalStore.open(place, { disk, log: (line) => lines.push(line) });
  catalog = new VdiCatalog(store);
}

beforeEach(async () => {
  lines.length = 0;
  directory = path.join(temporaryDirectory(), 'store');
  failing = new FailingDisk();
  recording = new RecordingDisk(directory, failing.disk);
  await open(directory, recording.disk);
  await catalog.create('disk', SIZE, { blockSizeShift: 20 });
  vdi = await catalog.openVdi('disk');
});

afterEach(() => catalog.close().catch(() => undefined));

async function bytesOf(of: Vdi): Promise<Buffer> {
  const all = Buffer.alloc(of.size);
  await of.read(0, all);
  return all;
}

/** All files below `place`: relative path -> content. */
function contentOf(place: string): Map<string, Buffer> {
  const files = new Map<string, Buffer>();
  for (const name of fs.readdirSync(place, { recursive: true, encoding: 'utf8' }).sort()) {
    const status = fs.lstatSync(path.join(place, name));
    files.set(name, status.isFile() ? fs.readFileSync(path.join(place, name)) : Buffer.from('no file'));
  }
  return files;
}

/** A power loss: everything that is not durable is gone, and the next boot has another id. */
async function openAfterPowerLoss(at = Infinity): Promise<void> {
  const after = path.join(memoryDirectory(), 'after');
  recording.build(after, (event) => recording.isDurable(event, at));
  await open(
    after,
    interpose(hostDisk, ({ name }, proceed) => (name === 'bootId' ? 'another-boot' : proceed())),
  );
}

describe('a recording disk sees, in order,', () => {
  const FIRST = 'objects/01/0000000100000000';
  beforeEach(() => void takeLines());

  test('a write: the file, its length and its data, then the log; and of a flush data, name, map', async () => {
    await vdi.write(0, Buffer.alloc(BLOCK, 1), false);
    expect(takeLines()).toEqual([
      `create ${FIRST}`,
      `resize ${FIRST}`,
      `write ${FIRST}`,
      'create recent/1',
      'write recent/1',
      'write recent/1',
    ]);
    await vdi.write(0, Buffer.alloc(BLOCK, 2), false);
    expect(takeLines()).toEqual([`write ${FIRST}`]);
    await vdi.flush();
    expect(takeLines()).toEqual([`sync ${FIRST}`, 'sync names objects/01', 'commit meta.mdb']);
  });

  test('a write with FUA into an existing object: data, sync of the data', async () => {
    await vdi.write(0, Buffer.alloc(BLOCK, 1), true);
    takeLines();
    await vdi.write(0, Buffer.alloc(BLOCK, 2), true);
    expect(takeLines()).toEqual([`write ${FIRST}`, `sync ${FIRST}`]);
  });

  test('a snapshot: dirty data is synced before the commits that complete the snapshot, and the next write makes an overlay', async () => {
    await vdi.write(0, Buffer.alloc(OBJECT, 1), false);
    takeLines();
    await catalog.snapshot('disk', 's');
    const taken = takeLines();
    expect(taken).toEqual([
      `sync ${FIRST}`,
      'sync names objects/01',
      'commit meta.mdb',
      'write recent/1',
      'commit meta.mdb',
      'commit meta.mdb',
    ]);
    await vdi.write(0, Buffer.alloc(BLOCK, 2), false);
    const segment = 'overlays/0000000200000000';
    expect(takeLines()).toEqual([
      'create overlays',
      'sync names overlays',
      'sync names .',
      'commit meta.mdb',
      `create ${segment}`,
      `resize ${segment}`,
      `write ${segment}`,
      'write recent/1',
      'write recent/1',
    ]);
    await vdi.write(BLOCK, Buffer.alloc(BLOCK, 3), false);
    expect(takeLines()).toEqual([`write ${segment}`, 'write recent/1']);
    await vdi.write(BLOCK, Buffer.alloc(BLOCK, 4), false);
    expect(takeLines()).toEqual([`write ${segment}`]);
    await vdi.flush();
    expect(takeLines()).toEqual([`sync ${segment}`, 'sync names overlays', 'commit meta.mdb']);
  });

  test('a delete: no object is removed before the commit that ends all references to it', async () => {
    await vdi.write(0, Buffer.alloc(2 * OBJECT, 1), true);
    await catalog.release(vdi);
    takeLines();
    await catalog.remove('disk');
    await store.reclaimed();
    expect(takeLines()).toEqual(['commit meta.mdb', `unlink ${FIRST}`, 'unlink objects/01/0000000100000001']);
  });

  test('a resize: the shortened map is stored, then the size, then the object is removed', async () => {
    await vdi.write(0, Buffer.alloc(2 * OBJECT, 1), true);
    await catalog.release(vdi);
    takeLines();
    await catalog.resize('disk', OBJECT, { force: true });
    await store.reclaimed();
    const cut = takeLines().filter((line) => !line.includes('recent'));
    expect(cut.filter((line) => line.startsWith('commit')).length).toBeGreaterThanOrEqual(2);
    expect(cut[0]).toBe('commit meta.mdb');
    expect(cut.filter((line) => line.startsWith('unlink'))).toEqual(['unlink objects/01/0000000100000001']);
  });

  test('a start after a kill: everything is synced before a map takes over logged changes, and the log is removed last', async () => {
    await vdi.write(0, Buffer.alloc(BLOCK, 1), false);
    const killed = path.join(temporaryDirectory(), 'killed');
    recording.build(killed, () => true);
    const log = path.join(killed, 'recent/1');
    // The copy is accepted as the original: same boot, same mounting, same numbers of the directory and the file.
    const inode = (file: string): bigint => fs.statSync(file, { bigint: true }).ino;
    const original = { directory: inode(directory), log: inode(path.join(directory, 'recent/1')) };
    const same = interpose(hostDisk, ({ name, file }, proceed) => {
      if (name === 'inodeAtSync' && file === killed) return original.directory;
      if (name === 'inodeOfSync' && file === log) return original.log;
      return proceed();
    });
    const after = new RecordingDisk(killed, same);
    await catalog.close();
    await open(killed, after.disk);
    expect(lines.join()).toMatch(/not shut down cleanly; removed 0 unreferenced/);
    const recovered = after.takeLines().filter((line) => /^(sync all|commit)|recent/.test(line));
    expect(recovered).toEqual(['sync all lock', 'commit meta.mdb', 'unlink recent/1', 'commit meta.mdb']);
    expect((await bytesOf(await catalog.openVdi('disk'))).subarray(0, BLOCK)).toEqual(Buffer.alloc(BLOCK, 1));
  });

  test('the creation of a store: the metadata gets its name when it is complete, and the name is synced', () => {
    const made = recording.events
      .filter(({ path: at }) => !at.startsWith('objects/'))
      .map(({ op, path: at }) => `${op} ${at}`);
    const renamed = made.indexOf('rename meta.mdb');
    expect(made.slice(0, 4)).toEqual(['create .', 'create lock', 'write lock', 'resize lock']);
    expect(made.slice(renamed - 1, renamed + 2)).toEqual(['commit new.mdb', 'rename meta.mdb', 'sync names .']);
    expect(made.filter((line) => line.includes('opening'))).toEqual([
      'link opening.mdb-lock',
      'link opening.mdb',
      'unlink opening.mdb',
      'unlink opening.mdb-lock',
    ]);
    expect(
      recording.events.filter(({ op }) => op === 'commit').every((event) => 'pages' in event && event.pages.size > 0),
    ).toBe(true);
  });

  test('an orderly close after a removal: the removed names are synced before the store is marked as clean', async () => {
    await vdi.write(0, Buffer.alloc(BLOCK, 1), true);
    await catalog.release(vdi);
    await catalog.remove('disk');
    await catalog.close();
    const lines = takeLines();
    const removed = lines.indexOf(`unlink ${FIRST}`);
    expect(removed).toBeGreaterThan(0);
    expect(lines.slice(removed, removed + 3)).toEqual([`unlink ${FIRST}`, 'sync names objects/01', 'commit meta.mdb']);
    await openAfterPowerLoss();
    expect((await catalog.check({ repair: false })).problems).toEqual([]);
  });

  test('an orderly close whose removals cannot be synced fails, and the next start looks for them', async () => {
    await vdi.write(0, Buffer.alloc(BLOCK, 1), true);
    await catalog.release(vdi);
    await catalog.remove('disk');
    const rule = failing.fail({ calls: ['fsync'], file: /objects/ }, 'EIO');
    await expect(catalog.close()).rejects.toMatchObject({ code: 'IO' });
    expect(rule.count).toBe(1);
    rule.off();
    await open(directory, hostDisk);
    expect(lines.join()).toMatch(/was not shut down cleanly/);
  });

  test('check --repair removes logs that were set aside for good: their names are synced', async () => {
    await vdi.write(0, Buffer.alloc(BLOCK, 1), false);
    const killed = path.join(temporaryDirectory(), 'store');
    fs.cpSync(directory, killed, { recursive: true });
    await catalog.close();
    const after = new RecordingDisk(killed);
    await open(killed, after.disk);
    expect((await catalog.check({ repair: false })).problems.join()).toMatch(/set aside/);
    after.takeLines();
    await catalog.check({ repair: true });
    const changes = after.takeLines().filter((line) => /set-aside|commit/.test(line));
    expect(changes).toEqual([
      expect.stringMatching(/^unlink set-aside/) as string,
      'sync names set-aside',
      'commit meta.mdb',
    ]);
  });

  test('everything: the recorded changes add up to the content of the disk, byte by byte', async () => {
    for (let idx = 0; idx < 4; idx++) await vdi.write(idx * OBJECT + idx * 512, Buffer.alloc(200_000, idx + 1), false);
    await vdi.flush();
    await catalog.snapshot('disk', 's');
    await vdi.write(100, Buffer.alloc(5000, 9), true);
    await vdi.trim(OBJECT, OBJECT, false);
    await vdi.zero(2 * OBJECT + 50, 100_000, { noHole: false, fua: false });
    await vdi.zero(3 * OBJECT, 100_000, { noHole: true, fua: false });
    await vdi.write(OBJECT + 77, Buffer.alloc(3000, 8), false);
    await catalog.clone('disk@s', 'copy');
    await catalog.release(vdi);
    await catalog.remove('disk@s');
    await catalog.close();
    const built = path.join(memoryDirectory(), 'built');
    recording.build(built, ({ ended }) => ended !== Infinity);
    const [found, expected] = [contentOf(built), contentOf(directory)];
    expect([...found.keys()]).toEqual([...expected.keys()]);
    for (const [name, bytes] of expected) expect(found.get(name)?.equals(bytes), name).toBe(true);
  });

  test('the change record: a line for each change of the catalog and one for the first change of a map, synced; none for writes', async () => {
    recording.takeLines();
    const record = (): string[] => recording.takeLines().filter((line) => line.includes('copies/changes-1'));
    await vdi.write(0, Buffer.alloc(BLOCK, 1), false);
    expect(record()).toEqual([]);
    await vdi.flush();
    expect(record()).toEqual(['write copies/changes-1', 'sync copies/changes-1']);
    await vdi.write(OBJECT, Buffer.alloc(BLOCK, 1), true);
    await vdi.write(2 * OBJECT, Buffer.alloc(BLOCK, 1), false);
    await vdi.flush();
    expect(record()).toEqual([]);
    await catalog.snapshot('disk', 's');
    expect(record()).toEqual(['write copies/changes-1', 'sync copies/changes-1']);
  });
});

describe('a power loss', () => {
  test('right after an answered flush undoes no flushed data and no snapshot', async () => {
    await vdi.write(0, Buffer.alloc(SIZE, 1), false);
    await catalog.snapshot('disk', 's');
    await vdi.write(OBJECT + 512, Buffer.alloc(BLOCK, 2), false);
    await vdi.flush();
    await vdi.write(2 * OBJECT, Buffer.alloc(BLOCK, 3), false);
    await openAfterPowerLoss();
    const expected = Buffer.alloc(SIZE, 1);
    expect((await bytesOf(await catalog.openVdi('disk@s'))).equals(expected)).toBe(true);
    const working = await catalog.openVdi('disk');
    expect((await bytesOf(working)).equals(expected.fill(2, OBJECT + 512, OBJECT + 512 + BLOCK))).toBe(true);
    await working.write(0, Buffer.alloc(BLOCK, 4), true);
    await catalog.close();
    await open(store.location, hostDisk);
    expect((await catalog.check({ repair: false })).problems).toEqual([]);
  });

  test('at any moment undoes no data that was flushed by then', async () => {
    const flushed: { readonly at: number; readonly bytes: Buffer }[] = [];
    const written = Buffer.alloc(SIZE);
    const write = async (value: number, offset: number, length: number): Promise<void> => {
      written.fill(value, offset, offset + length);
      await vdi.write(offset, Buffer.alloc(length, value), false);
    };
    const flush = async (): Promise<void> => {
      await vdi.flush();
      flushed.push({ at: recording.now, bytes: Buffer.from(written) });
    };
    await write(1, 0, OBJECT);
    await flush();
    await write(2, OBJECT - BLOCK, 2 * BLOCK);
    await catalog.snapshot('disk', 's');
    flushed.push({ at: recording.now, bytes: Buffer.from(written) });
    await write(3, 512, BLOCK);
    await flush();
    await vdi.trim(OBJECT, OBJECT, true);
    written.fill(0, OBJECT, 2 * OBJECT);
    flushed.push({ at: recording.now, bytes: Buffer.from(written) });
    await write(4, OBJECT, BLOCK);
    await flush();
    await catalog.release(vdi);
    await catalog.remove('disk@s');
    await catalog.close();
    const [first] = flushed;
    // All of them in the long tests; test/power has many more such states.
    const step = byLength({ quick: 8, full: 4, long: 1 });
    for (const [n, at] of [...recording.momentsOfLoss(first?.at ?? 0)].entries()) {
      if (n % step > 0) continue;
      await openAfterPowerLoss(at);
      const found = await bytesOf(await catalog.openVdi('disk'));
      const since = flushed.findLastIndex((each) => each.at <= at);
      // Blocks may also have data written since, and nothing else.
      const legal = [...flushed.slice(since).map(({ bytes }) => bytes), written];
      for (let block = 0; block < SIZE; block += 512) {
        const is = found.subarray(block, block + 512);
        const isLegal = legal.some((bytes) => is.equals(bytes.subarray(block, block + 512)));
        if (!isLegal) expect.fail(`moment ${at}: block at ${block} is ${is[0]}`);
      }
      await catalog.close();
      await open(store.location, hostDisk);
      const { problems } = await catalog.check({ repair: false });
      expect(
        problems.filter((line) => !line.startsWith('orphan')),
        `moment ${at}`,
      ).toEqual([]);
      await catalog.close();
    }
  });

  test('without the sync of the data would: the recording distinguishes durable from other changes', async () => {
    failing.instead({ calls: ['fdatasync'] }, () => Promise.resolve());
    await vdi.write(0, Buffer.alloc(BLOCK, 1), true);
    // The recorder is above the disk that lies: it must not count this sync.
    recording.events.push(...recording.events.splice(0).filter(({ op }) => op !== 'sync'));
    const writes = recording.events.filter(({ op }) => op === 'write');
    expect(writes.some((event) => recording.isDurable(event))).toBe(false);
    await openAfterPowerLoss();
    await expect(bytesOf(await catalog.openVdi('disk'))).rejects.toMatchObject({ code: 'DAMAGED' });
  });
});

describe('a disk that fails', () => {
  const written = Buffer.alloc(BLOCK, 1);

  for (const [calls, code, expected] of [
    [['open'], 'EMFILE', 'IO'],
    [['open'], 'ENOSPC', 'NO_SPACE'],
    [['open'], 'EROFS', 'PERMISSION'],
    [['truncate'], 'EDQUOT', 'NO_SPACE'],
    [['write', 'writeSync'], 'EIO', 'IO'],
    [['write', 'writeSync'], 'ENOSPC', 'NO_SPACE'],
  ] as const) {
    test(`${code} of ${calls.join(' and ')} is ${expected} for the write, names the object, and the next write works`, async () => {
      const rule = failing.fail({ calls, file: /objects/ }, code);
      await expect((async () => vdi.write(0, written, false))()).rejects.toMatchObject({
        code: expected,
        message: expect.stringMatching(/creating object .*0000000100000000/) as string,
      });
      expect(rule.count).toBeGreaterThan(0);
      rule.off();
      await vdi.write(0, written, true);
      expect((await bytesOf(vdi)).subarray(0, BLOCK)).toEqual(written);
    });
  }

  for (const [calls, file, lasts] of [
    [['fdatasync'], /objects/, true],
    [['fsync'], /objects/, true],
    [['commit'], /meta/, false],
  ] as const) {
    test(`EIO of ${calls.join()} fails the flush; ${lasts ? 'no later one repairs it' : 'the next one stores everything'}`, async () => {
      await vdi.write(0, written, false);
      const rule = failing.fail({ calls, file }, 'EIO');
      await expect(vdi.flush()).rejects.toMatchObject({
        code: 'IO',
        message: expect.stringMatching(/EIO|i\/o error/) as string,
      });
      rule.off();
      if (lasts) await expect(vdi.flush()).rejects.toMatchObject({ code: 'IO' });
      else await vdi.flush();
    });
  }

  test('reads and writes that the kernel does in parts are completed', async () => {
    failing.instead({ calls: ['write', 'writeSync'], file: /objects/ }, ({ name, args }) => {
      const [fd, data, third, fourth] = args as [number, Buffer, number, number];
      const part = name === 'write' ? data.subarray(third, third + 1000) : data.subarray(0, 1000);
      const count = fs.writeSync(fd, part, 0, part.length, name === 'write' ? fourth : third);
      return name === 'write' ? Promise.resolve(count) : count;
    });
    failing.instead({ calls: ['read'], file: /objects/ }, ({ args }) => {
      const [fd, into, at, offset] = args as [number, Buffer, number, number];
      return Promise.resolve(fs.readSync(fd, into, at, Math.min(777, into.length - at), offset));
    });
    failing.instead({ calls: ['readCachedSync', 'readSync'], file: /objects/ }, () => -1);
    const data = Buffer.from(Array.from({ length: 50_000 }, (_, n) => n % 251));
    await vdi.write(300, data, false);
    await vdi.write(60_000, data.subarray(0, BLOCK), false);
    const all = await bytesOf(vdi);
    expect(all.subarray(300, 300 + data.length).equals(data)).toBe(true);
    expect(all.subarray(60_000, 60_000 + BLOCK).equals(data.subarray(0, BLOCK))).toBe(true);
  });

  test('at each call in turn gives an error of the store or none, and loses no data flushed before', async () => {
    await vdi.write(0, Buffer.alloc(OBJECT, 1), true);
    await catalog.close();
    const before = path.join(memoryDirectory(), 'before');
    fs.cpSync(directory, before, { recursive: true });
    let calls = Infinity;
    for (let at = 1; at <= calls; at++) {
      const place = path.join(memoryDirectory(), 'store');
      fs.cpSync(before, place, { recursive: true });
      let count = 0;
      const CHANGING =
        /^(open|openSync|write|writeSync|truncate|fdatasync|fsync|fsyncSync|unlink|unlinkSync|commit|copyRange)$/;
      const one = interpose(hostDisk, ({ name }, proceed) => {
        if (!CHANGING.test(name) || ++count !== at) return proceed();
        const error = systemError('EIO', name);
        if (name.endsWith('Sync')) throw error;
        return Promise.reject(error);
      });
      try {
        await open(place, one);
        const disk = await catalog.openVdi('disk');
        await disk.write(OBJECT, Buffer.alloc(BLOCK, 2), true);
        await catalog.snapshot('disk', 's');
        await disk.write(0, Buffer.alloc(BLOCK, 3), false);
        await disk.flush();
        await catalog.release(disk);
        await catalog.remove('disk@s');
        await catalog.close();
      } catch (error) {
        expect(error, `call ${at}`).toBeInstanceOf(Error);
        expect((error as StoreError).code, `call ${at}: ${String(error)}`).toMatch(/^(IO|DAMAGED|CLOSED)$/);
        await catalog.close().catch(() => undefined);
      }
      if (count < at) calls = count;
      await open(place, hostDisk);
      const disk = await catalog.openVdi('disk');
      const all = await bytesOf(disk);
      expect(all.subarray(BLOCK, OBJECT).equals(Buffer.alloc(OBJECT - BLOCK, 1)), `call ${at}`).toBe(true);
      await catalog.release(disk);
      expect((await catalog.check({ repair: false })).problems.filter((line) => !line.startsWith('orphan'))).toEqual(
        [],
      );
      await catalog.close();
      fs.rmSync(path.dirname(place), { recursive: true });
    }
    expect(calls).toBeGreaterThan(20);
    await open(directory, hostDisk);
  });
});

describe('a backup target', () => {
  const work = {
    progress: () => ({ advance: () => undefined, end: () => undefined }),
    log: () => undefined,
    signal: new AbortController().signal,
  };

  test('is made through the seam: its manifest is complete and synced before it gets its name, and the name is synced after that', async () => {
    const home = path.join(temporaryDirectory(), 'backups');
    const recorder = new RecordingDisk(path.dirname(home));
    const target = await BackupTarget.openForBackup(home, 'disk', 'store', work, false, recorder.disk);
    await target.close();
    expect(recorder.takeLines()).toEqual([
      'create backups',
      'create backups/lock',
      'create backups/manifest.json.partial',
      'write backups/manifest.json.partial',
      'sync backups/manifest.json.partial',
      'rename backups/manifest.json',
      'sync names backups',
      'sync names .',
    ]);
    expect(
      recorder.events.every(
        (event) => event.op.startsWith('sync') || event.path.endsWith('lock') || recorder.isDurable(event),
      ),
    ).toBe(true);
  });

  test('whose first run ended before its name was synced gets it synced by the next', async () => {
    const home = path.join(temporaryDirectory(), 'backups');
    const broken = new FailingDisk();
    broken.fail({ calls: ['fsync'], file: new RegExp(`^${path.dirname(home)}$`) }, 'EIO');
    await expect(BackupTarget.openForBackup(home, 'disk', 'store', work, false, broken.disk)).rejects.toThrow(/EIO/);
    expect(fs.existsSync(path.join(home, 'manifest.json'))).toBe(true);
    const recorder = new RecordingDisk(path.dirname(home));
    const target = await BackupTarget.openForBackup(home, 'disk', 'store', work, false, recorder.disk);
    await target.close();
    expect(recorder.takeLines()).toContain('sync names .');
  });

  const backup = (to: string, disk: HostDisk, keep?: number): Promise<unknown> => {
    const operations = new DirectOperations(catalog, new VdiExports(catalog));
    return takeBackup((use) => use(operations), {
      ...work,
      ...{
        vdi: 'disk',
        to,
        disk,
        keep,
        isFull: false,
        compares: false,
        keepsBase: true,
        verifies: true,
        sha256: false,
      },
      moment: (take) => take(),
    });
  };

  test('is recorded completely, and a power loss at any moment of a run leaves every backup in the manifest intact', async () => {
    const home = path.join(temporaryDirectory(), 'backups');
    const recorder = new RecordingDisk(path.dirname(home));
    for (const value of [1, 2, 3]) {
      await vdi.write(value * 100_000, Buffer.alloc(200_000, value), true);
      await backup(home, recorder.disk, 2);
    }
    const built = memoryDirectory();
    recorder.build(built, ({ ended }) => ended !== Infinity);
    const expected = contentOf(path.dirname(home));
    for (const [name, bytes] of contentOf(built)) expect(bytes.equals(expected.get(name) ?? NOTHING), name).toBe(true);
    const counts = new Set<number>();
    for (const at of recorder.momentsOfLoss(1)) {
      const place = memoryDirectory();
      recorder.build(place, (event) => recorder.isDurable(event, at));
      const kept = path.join(place, 'backups');
      if (!fs.existsSync(path.join(kept, 'manifest.json'))) continue;
      const target = await BackupTarget.openToRead(kept);
      for await (const { message } of target.verify(target.points)) expect.fail(`moment ${at}: ${message}`);
      counts.add(target.points.length);
      await target.close();
      fs.rmSync(place, { recursive: true });
    }
    expect([...counts]).toEqual([0, 1, 2, 3]);
  });

  test('that cannot be synced is an error, and there is no file with the name of a manifest', async () => {
    const home = path.join(temporaryDirectory(), 'backups');
    const broken = new FailingDisk();
    broken.fail({ calls: ['fsync'] }, 'EIO');
    await expect(BackupTarget.openForBackup(home, 'disk', 'store', work, false, broken.disk)).rejects.toMatchObject({
      code: 'EIO',
    });
    expect(fs.existsSync(path.join(home, 'manifest.json'))).toBe(false);
  });
});
