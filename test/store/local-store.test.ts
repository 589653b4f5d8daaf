/** The local store by itself: its lock, its format, its behaviour after a crash and when the disk refuses. */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { open } from 'lmdb';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { logHeader, mapLogDirectory } from '../../src/store/local/map-log-format.js';
import { hostDisk } from '../../src/system/real-disk.js';
import { LocalStore } from '../../src/store/local/local-store.js';
import { StoreError } from '../../src/store/store-error.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import type { Vdi } from '../../src/vdi/vdi.js';
import { FailingDisk } from '../harness/failing-disk.js';

const OBJECT = 2 ** 20;
const SIZE = 4 * OBJECT;

let directory: string;
let failing: FailingDisk;
let store: LocalStore;
let catalog: VdiCatalog;
const lines: string[] = [];

async function start(): Promise<void> {
  failing = new FailingDisk();
  store = await LocalStore.open(directory, { log: (line) => lines.push(line), disk: failing.disk });
  catalog = new VdiCatalog(store);
}

beforeEach(async () => {
  lines.length = 0;
  directory = fs.mkdtempSync(path.join(os.tmpdir(), 'sheepgate-store-'));
  await start();
});

afterEach(async () => {
  await catalog.close().catch(() => undefined);
  fs.rmSync(directory, { recursive: true, force: true });
});

function objectFiles(): string[] {
  return fs
    .readdirSync(path.join(directory, 'objects'), { recursive: true, encoding: 'utf8' })
    .filter((name) => name.length > 2)
    .map((name) => path.join(directory, 'objects', name));
}

async function bytesOf(vdi: Vdi): Promise<Buffer> {
  const all = Buffer.alloc(vdi.size);
  await vdi.read(0, all);
  return all;
}

/**
 * Go on with a copy of the directory as it is now: what a process killed at this moment would leave. Unless the machine
 * survives, the copy is opened on another boot, where logs in recent/ do not count.
 */
async function crash(options: { readonly sameBoot?: boolean } = {}): Promise<void> {
  const copy = fs.mkdtempSync(path.join(os.tmpdir(), 'sheepgate-crash-'));
  fs.cpSync(directory, copy, { recursive: true });
  for (const name of fs.readdirSync(path.join(copy, 'recent'))) {
    const fd = fs.openSync(path.join(copy, 'recent', name), 'r+');
    const header = logHeader(hostDisk, mapLogDirectory(hostDisk, copy), store.logs.session, fd);
    if (!options.sameBoot) header.write('another', header.indexOf('boot ') + 5);
    fs.writeSync(fd, header, 0, header.length, 0);
    fs.closeSync(fd);
  }
  await catalog.close().catch(() => undefined);
  fs.rmSync(directory, { recursive: true });
  directory = copy;
  await start();
}

describe('opening', () => {
  test('a second open of the same store is refused with the reason', async () => {
    await expect(LocalStore.open(directory)).rejects.toMatchObject({
      code: 'LOCKED',
      message: `store ${directory} is in use by process ${process.pid}, a command`,
      holder: { pid: process.pid, role: 'command' },
    });
  });

  describe('the lock file', () => {
    const lock = (): string => path.join(directory, 'lock');
    const victim = (): string => path.join(directory, 'victim');

    test('names the process that holds the store, and none afterwards; a number without a process is ignored', async () => {
      expect(fs.readFileSync(lock(), 'utf8')).toBe(`${process.pid} command\n`);
      store.announceStop();
      expect(fs.readFileSync(lock(), 'utf8')).toBe(`${process.pid} stopping daemon\n`);
      for (const text of ['', '0 daemon\n', '4194305 daemon\n', '1 tyrant\n', '\u001b[2J\n', 'x'.repeat(100_000)]) {
        fs.writeFileSync(lock(), text);
        await expect(LocalStore.open(directory)).rejects.toMatchObject({ code: 'LOCKED', holder: undefined });
      }
      await catalog.close();
      expect(fs.readFileSync(lock(), 'utf8')).toBe('');
    });

    test('that is a symbolic link is refused, and its target stays unchanged', async () => {
      await catalog.close();
      fs.writeFileSync(victim(), 'precious');
      fs.rmSync(lock());
      fs.symlinkSync(victim(), lock());
      await expect(LocalStore.open(directory)).rejects.toMatchObject({ code: 'DAMAGED', message: /symbolic link/ });
      fs.rmSync(lock());
      fs.symlinkSync(path.join(directory, 'nothing'), lock());
      await expect(LocalStore.open(directory)).rejects.toMatchObject({ code: 'DAMAGED' });
      expect(fs.readFileSync(victim(), 'utf8')).toBe('precious');
      expect(fs.existsSync(path.join(directory, 'nothing'))).toBe(false);
    });

    for (const kind of ['hard link', 'fifo'] as const) {
      test(`that is a ${kind} locks, and is not written to`, async () => {
        await catalog.close();
        fs.writeFileSync(victim(), 'precious');
        fs.rmSync(lock());
        if (kind === 'fifo') execFileSync('mkfifo', [lock()]);
        else fs.linkSync(victim(), lock());
        store = await LocalStore.open(directory);
        await expect(LocalStore.open(directory)).rejects.toMatchObject({ code: 'LOCKED', holder: undefined });
        store.announceStop();
        await store.close();
        expect(fs.readFileSync(victim(), 'utf8')).toBe('precious');
        fs.rmSync(lock());
        await start();
      });
    }
  });

  test('a store of a newer format is refused and left alone', async () => {
    await catalog.close();
    const env = open<string, string>({
      path: path.join(directory, 'meta.mdb'),
      noSubdir: true,
      encoding: 'binary',
      maxDbs: 4,
    });
    await env.put('format', Buffer.from('999') as unknown as string);
    await env.close();
    await expect(LocalStore.open(directory)).rejects.toMatchObject({ code: 'FORMAT', message: /format 999/ });
    fs.rmSync(directory, { recursive: true });
    await start();
  });

  test('a directory that cannot be written is refused with the reason', async () => {
    await expect(LocalStore.open('/proc/sheepgate')).rejects.toBeInstanceOf(StoreError);
  });

  test('a file that is not a metadata file is refused, not overwritten', async () => {
    await catalog.close();
    const file = path.join(directory, 'meta.mdb');
    fs.writeFileSync(file, Buffer.alloc(65536, 0x41));
    await expect(LocalStore.open(directory)).rejects.toBeInstanceOf(StoreError);
    expect(fs.readFileSync(file).subarray(0, 16)).toEqual(Buffer.alloc(16, 0x41));
    fs.rmSync(directory, { recursive: true });
    await start();
  });

  test('a truncated metadata file is refused with the reason', async () => {
    await catalog.create('disk', SIZE, { blockSizeShift: 20 });
    await catalog.close();
    const file = path.join(directory, 'meta.mdb');
    fs.truncateSync(file, fs.statSync(file).size - 4096);
    await expect(LocalStore.open(directory)).rejects.toMatchObject({ code: 'DAMAGED', message: /truncated/ });
    fs.rmSync(directory, { recursive: true });
    await start();
  });
});

describe('after a crash', () => {
  test('unreferenced objects are removed, and flushed data is there', async () => {
    await catalog.create('disk', SIZE, { blockSizeShift: 20 });
    const vdi = await catalog.openVdi('disk');
    await vdi.write(5, Buffer.from('flushed'), true);
    await vdi.write(OBJECT, Buffer.from('not flushed'), false);
    expect(objectFiles()).toHaveLength(2);
    await crash();
    expect(objectFiles()).toHaveLength(1);
    expect(lines.join()).toMatch(/removed 1 unreferenced/);
    const again = await catalog.openVdi('disk');
    expect((await bytesOf(again)).subarray(5, 12).toString()).toBe('flushed');
    await catalog.release(again);
    expect((await catalog.check({ repair: false })).problems).toEqual([]);
  });

  test('that the machine survives, acknowledged writes are there too, and durable', async () => {
    await catalog.create('disk', SIZE, { blockSizeShift: 20 });
    const vdi = await catalog.openVdi('disk');
    await vdi.write(0, Buffer.alloc(SIZE, 1), true);
    await catalog.snapshot('disk', 's');
    await vdi.write(0, Buffer.from('not flushed'), false);
    await vdi.zero(OBJECT, OBJECT, { noHole: false, fua: false });
    const expected = await bytesOf(vdi);
    await crash({ sameBoot: true });
    expect((await bytesOf(await catalog.openVdi('disk'))).equals(expected)).toBe(true);
    await crash();
    expect((await bytesOf(await catalog.openVdi('disk'))).equals(expected)).toBe(true);
    expect((await bytesOf(await catalog.openVdi('disk@s'))).equals(Buffer.alloc(SIZE, 1))).toBe(true);
  });

  test('that the machine survives, writes acknowledged after an unfinished snapshot are there', async () => {
    await catalog.create('disk', SIZE, { blockSizeShift: 20 });
    const vdi = await catalog.openVdi('disk');
    await vdi.write(0, Buffer.alloc(OBJECT, 1), true);
    await vdi.write(OBJECT, Buffer.from('before'), false);
    const [open] = store.open.values();
    if (!open) throw new Error('no VDI is open');
    await open.prepareSwitch('unfinished').switchOver();
    await vdi.write(0, Buffer.from('after'), false);
    await vdi.write(2 * OBJECT, Buffer.from('after'), false);
    const expected = await bytesOf(vdi);
    await crash({ sameBoot: true });
    expect((await catalog.list()).map(({ tag }) => tag)).toEqual(['']);
    const again = await catalog.openVdi('disk');
    expect((await bytesOf(again)).equals(expected)).toBe(true);
    await catalog.release(again);
    expect((await catalog.check({ repair: false })).problems).toEqual([]);
  });

  test('a log does not grow by changes that flushes have stored', async () => {
    await catalog.create('disk', SIZE, { blockSizeShift: 20 });
    const vdi = await catalog.openVdi('disk');
    const recent = path.join(directory, 'recent');
    const bytes = (): number =>
      fs.readdirSync(recent).reduce((sum, name) => sum + fs.statSync(path.join(recent, name)).size, 0);
    for (let n = 0; n < 6000; n++) {
      await vdi.write(0, Buffer.alloc(512, 1), false);
      await vdi.zero(0, OBJECT, { noHole: false, fua: n % 100 === 0 });
    }
    expect(bytes()).toBeLessThan(100_000);
    await catalog.release(vdi);
    expect(bytes()).toBe(0);
  });

  test('an object is overwritten in place by one clone only after the other gave it up on disk', async () => {
    await catalog.create('base', SIZE, { blockSizeShift: 20 });
    const base = await catalog.openVdi('base');
    await base.write(0, Buffer.alloc(SIZE, 1), true);
    await catalog.release(base);
    await catalog.snapshot('base', 's');
    await catalog.clone('base@s', 'a');
    await catalog.clone('base@s', 'b');
    await catalog.remove('base@s');
    await catalog.remove('base');
    const a = await catalog.openVdi('a');
    const b = await catalog.openVdi('b');
    await a.write(0, Buffer.alloc(4096, 2), false); // a's map on disk still points at the shared object
    await b.write(4096, Buffer.alloc(4096, 3), true);
    await crash();
    const afterwards = await bytesOf(await catalog.openVdi('a'));
    expect(afterwards.equals(Buffer.alloc(SIZE, 1))).toBe(true);
  });

  test('a trimmed object is removed only after the map that pointed to it', async () => {
    await catalog.create('disk', SIZE, { blockSizeShift: 20 });
    const vdi = await catalog.openVdi('disk');
    await vdi.write(0, Buffer.alloc(SIZE, 7), true);
    await vdi.trim(0, OBJECT, false);
    expect(objectFiles()).toHaveLength(4);
    await vdi.flush();
    await store.objects.removed();
    expect(objectFiles()).toHaveLength(3);
    await catalog.release(vdi);
  });
});

describe('check', () => {
  test('names the ranges of lost objects and the orphans, and removes orphans on request', async () => {
    await catalog.create('disk', SIZE, { blockSizeShift: 20 });
    const vdi = await catalog.openVdi('disk');
    await vdi.write(0, Buffer.alloc(SIZE, 7), true);
    await catalog.release(vdi);
    const [lost] = objectFiles();
    fs.renameSync(lost as string, path.join(path.dirname(lost as string), '00ffffff00000001'));
    const report = await catalog.check({ repair: false });
    expect(report.problems.join('\n')).toMatch(/lost: disk bytes \d+ to \d+/);
    expect(report.orphans).toBe(1);
    const repaired = await catalog.check({ repair: true });
    expect(repaired.repaired).toBe(1);
    expect((await catalog.check({ repair: false })).orphans).toBe(0);
    // The rest of the disk is readable; the lost part is an error and not zeros.
    await catalog.close();
    await start();
    const again = await catalog.openVdi('disk');
    let failed = 0;
    for (let idx = 0; idx < 4; idx++) {
      const part = Buffer.alloc(OBJECT);
      try {
        await again.read(idx * OBJECT, part);
        expect(part.equals(Buffer.alloc(OBJECT, 7))).toBe(true);
      } catch (error) {
        expect((error as StoreError).code).toBe('DAMAGED');
        failed++;
      }
    }
    expect(failed).toBe(1);
    await catalog.release(again);
  });

  test('is refused while a VDI is open', async () => {
    await catalog.create('disk', SIZE, { blockSizeShift: 20 });
    const vdi = await catalog.openVdi('disk');
    await expect(catalog.check({ repair: true })).rejects.toMatchObject({ code: 'BUSY' });
    await catalog.release(vdi);
  });
});

describe('when the metadata cannot be stored', () => {
  /** The next `times` commits fail as on a full disk. The reserve of meta.mdb makes this hard to produce for real. */
  function failCommits(times: number): void {
    failing.fail({ calls: ['commit'], times }, 'ENOSPC');
  }

  test('only the snapshot fails: the writer continues, later flushes and snapshots work, and no object leaks', async () => {
    await catalog.create('disk', SIZE, { blockSizeShift: 20 });
    const vdi = await catalog.openVdi('disk');
    await vdi.write(0, Buffer.alloc(SIZE, 1), true);
    failCommits(1);
    await expect(catalog.snapshot('disk', 'one')).rejects.toMatchObject({ code: 'NO_SPACE' });
    expect((await catalog.list()).map((record) => record.tag)).toEqual(['']);
    await vdi.write(0, Buffer.alloc(4096, 2), false);
    const second = await catalog.openVdi('disk');
    expect(second).toBe(vdi);
    await catalog.release(second);
    await vdi.flush();
    await catalog.snapshot('disk', 'two');
    await vdi.write(4096, Buffer.alloc(4096, 3), true);
    await crash();
    expect((await catalog.list()).map((record) => record.tag)).toEqual(['two', '']);
    const expected = Buffer.alloc(SIZE, 1).fill(2, 0, 4096);
    const snapshot = await catalog.openVdi('disk@two');
    expect((await bytesOf(snapshot)).equals(expected)).toBe(true);
    await catalog.release(snapshot);
    const working = await catalog.openVdi('disk');
    expect((await bytesOf(working)).equals(expected.fill(3, 4096, 8192))).toBe(true);
    await catalog.release(working);
    expect((await catalog.check({ repair: false })).problems).toEqual([]);
    await catalog.remove('disk@two');
    await catalog.remove('disk');
    expect(objectFiles()).toEqual([]);
  });

  test('a flush that fails is answered with the error, and the next one makes everything durable', async () => {
    await catalog.create('disk', SIZE, { blockSizeShift: 20 });
    const vdi = await catalog.openVdi('disk');
    await vdi.write(0, Buffer.alloc(SIZE, 1), false);
    failCommits(1);
    await expect(vdi.flush()).rejects.toMatchObject({ code: 'NO_SPACE' });
    await vdi.flush();
    await crash();
    const again = await catalog.openVdi('disk');
    expect((await bytesOf(again)).equals(Buffer.alloc(SIZE, 1))).toBe(true);
    await catalog.release(again);
  });

  test('clone, rollback and delete that fail change nothing', async () => {
    await catalog.create('disk', SIZE, { blockSizeShift: 20 });
    const vdi = await catalog.openVdi('disk');
    await vdi.write(0, Buffer.alloc(SIZE, 1), true);
    await catalog.release(vdi);
    await catalog.snapshot('disk', 's');
    const before = await catalog.list();
    failCommits(5); // a failed copy also tries to remove the pages that it prepared
    await expect(catalog.clone('disk@s', 'copy')).rejects.toMatchObject({ code: 'NO_SPACE' });
    await expect(catalog.rollback('disk@s')).rejects.toMatchObject({ code: 'NO_SPACE' });
    await expect(catalog.remove('disk@s')).rejects.toMatchObject({ code: 'NO_SPACE' });
    expect(await catalog.list()).toEqual(before);
    await catalog.remove('disk@s');
    const again = await catalog.openVdi('disk');
    await again.write(0, Buffer.alloc(SIZE, 2), true);
    expect(again.copies).toBe(0);
    expect(objectFiles()).toHaveLength(4);
    await catalog.release(again);
  });
});

test('a closed store stores nothing any more, and late calls do not open it again', async () => {
  const early = store.state.commit(new Map([['early', { a: 1 }]]));
  await store.close();
  await early;
  const second = await LocalStore.open(directory);
  for (const value of [1, 2]) {
    await expect(store.state.commit(new Map([['late', { value }]]))).rejects.toMatchObject({ code: 'CLOSED' });
  }
  expect(() => store.state.entries()).toThrow(/is closed/);
  expect([...second.state.entries().keys()]).toEqual(['early']);
  await second.close();
});

test('a sync that failed with an I/O error is not repaired by a later one', async () => {
  await catalog.create('disk', SIZE, { blockSizeShift: 20 });
  const vdi = await catalog.openVdi('disk');
  await vdi.write(0, Buffer.alloc(4096, 1), false);
  const failed = failing.fail({ calls: ['fdatasync'] }, 'EIO');
  await expect(vdi.flush()).rejects.toMatchObject({ code: 'IO' });
  failed.off();
  await expect(vdi.flush()).rejects.toMatchObject({ code: 'IO' });
  await expect(vdi.write(0, Buffer.alloc(4096, 1), true)).rejects.toMatchObject({ code: 'IO' });
});
