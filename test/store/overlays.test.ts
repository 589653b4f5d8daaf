/**
 * Overlays of the local store: what a small write after a snapshot costs, how overlays are merged, what a start finds of them,
 * and what older and newer formats mean.
 */
import fs from 'node:fs';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, onTestFinished, test, vi } from 'vitest';
import { LocalStore, type LocalStoreOptions } from '../../src/store/local/local-store.js';
import { MAX_LAYERS } from '../../src/store/local/overlay-writes.js';
import { MANY_LAYERS } from '../../src/store/local/overlay-merger.js';
import { O_CREAT, O_RDWR, O_WRONLY } from '../../src/system/disk.js';
import { hostDisk } from '../../src/system/real-disk.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import type { Vdi } from '../../src/vdi/vdi.js';
import { temporaryDirectory } from '../harness/daemon.js';
import { interpose } from '../harness/interposed-disk.js';
import { changesOf, checkContent, Disk } from '../stores/session.js';

const OBJECT = 2 ** 20;
const BLOCK = 4096;
const SIZE = 4 * OBJECT;
/** No merge begins by itself. */
const NEVER_MS = 2 ** 30;
/** For what happens in the background. */
const WAIT_MS = 15_000;

let directory: string;
let store: LocalStore;
let catalog: VdiCatalog;
const notes: string[] = [];

async function open(options: LocalStoreOptions = {}): Promise<void> {
  store = await LocalStore.open(directory, {
    mergeDelayMs: NEVER_MS,
    note: (line) => notes.push(line),
    ...options,
  });
  catalog = new VdiCatalog(store);
}

async function reopen(): Promise<void> {
  await catalog.close();
  await open();
}

beforeEach(async () => {
  notes.length = 0;
  directory = path.join(temporaryDirectory(), 'store');
  await open();
});

afterEach(async () => {
  await catalog.close().catch(() => undefined);
});

/** A VDI full of 1, open. */
async function fullDisk(name = 'disk'): Promise<Disk> {
  await catalog.create(name, SIZE, { blockSizeShift: Math.log2(OBJECT) });
  const disk = new Disk(await catalog.openVdi(name));
  await disk.write(0, SIZE, 1);
  await disk.vdi.flush();
  return disk;
}

/** Bytes that all files of objects take on the disk. */
function spaceOfObjects(): number {
  let sum = 0;
  for (const folder of ['objects', 'overlays']) {
    const root = path.join(directory, folder);
    if (!fs.existsSync(root)) continue;
    for (const name of fs.readdirSync(root, { recursive: true, encoding: 'utf8' })) {
      const status = fs.lstatSync(path.join(root, name));
      if (status.isFile()) sum += status.blocks * 512;
    }
  }
  return sum;
}

const problems = async (): Promise<readonly string[]> => (await catalog.check({ repair: false })).problems;

describe('a write to a shared object', () => {
  test('stores the blocks that it touches, filled up from below', async () => {
    const disk = await fullDisk();
    const before = spaceOfObjects();
    await catalog.snapshot('disk', 's');
    await disk.write(5 * BLOCK + 100, 512, 2);
    await disk.write(OBJECT - 10, 20, 3); // two objects
    await disk.write(9 * BLOCK, 3 * BLOCK, 4);
    await disk.vdi.flush();
    expect(spaceOfObjects() - before).toBe((1 + 2 + 3) * BLOCK);
    await disk.check();
    await reopen();
    await checkContent(await catalog.openVdi('disk'), disk.content);
    await checkContent(await catalog.openVdi('disk@s'), Buffer.alloc(SIZE, 1));
    expect(vids(store)).toBe(2);
  });

  test('that is trimmed in part hides what is below, and takes no space', async () => {
    const disk = await fullDisk();
    await catalog.snapshot('disk', 's');
    const before = spaceOfObjects();
    await disk.trim(3 * BLOCK, 10 * BLOCK);
    await disk.zero(20 * BLOCK + 5, 2 * BLOCK);
    await disk.vdi.flush();
    expect(spaceOfObjects() - before).toBe(2 * BLOCK); // the edges of the second one
    await disk.check();
    await reopen();
    await checkContent(await catalog.openVdi('disk'), disk.content);
    const changed = await changesOf(await catalog.openVdi('disk'), await catalog.openVdi('disk@s'));
    expect(changed.filter(({ flag }) => flag)).toEqual([
      { at: 3 * BLOCK, length: 10 * BLOCK, flag: true },
      { at: 20 * BLOCK, length: 3 * BLOCK, flag: true },
    ]);
  });

  test('is told exactly to clients that ask what has changed', async () => {
    const disk = await fullDisk();
    await catalog.snapshot('disk', 'a');
    await disk.write(BLOCK, 1, 2);
    await catalog.snapshot('disk', 'b');
    await disk.write(7 * BLOCK, 2 * BLOCK, 3);
    await disk.write(SIZE - 1, 1, 3);
    const [a, b] = [await catalog.openVdi('disk@a'), await catalog.openVdi('disk@b')];
    const changed = async (now: Vdi, base: Vdi): Promise<[number, number][]> =>
      (await changesOf(now, base)).filter(({ flag }) => flag).map(({ at, length }) => [at / BLOCK, length / BLOCK]);
    const last = SIZE / BLOCK - 1;
    expect(await changed(disk.vdi, b)).toEqual([
      [7, 2],
      [last, 1],
    ]);
    expect(await changed(disk.vdi, a)).toEqual([
      [1, 1],
      [7, 2],
      [last, 1],
    ]);
    expect(await changed(b, a)).toEqual([[1, 1]]);
    expect(await changed(a, b)).toEqual([[1, 1]]);
  });

  test('makes the object independent when all its blocks are written', async () => {
    const disk = await fullDisk();
    await catalog.snapshot('disk', 's');
    for (let at = 0; at < OBJECT; at += BLOCK) await disk.write(at, BLOCK, 2);
    await disk.vdi.flush();
    await catalog.remove('disk@s');
    await store.reclaimed();
    expect(await store.merger.state()).toMatchObject({ overlays: 0, bytes: 0 });
    await disk.check();
    await reopen();
    await checkContent(await catalog.openVdi('disk'), disk.content);
    expect(spaceOfObjects()).toBe(SIZE);
  });

  test('made whole again under the name of a trimmed overlay survives every way to end', async () => {
    const disk = await fullDisk();
    await catalog.snapshot('disk', 's');
    await disk.write(0, BLOCK, 2);
    await disk.vdi.flush();
    await disk.trim(0, OBJECT);
    await disk.write(BLOCK, BLOCK, 3);
    await disk.check();
    await disk.vdi.flush();
    await reopen();
    await checkContent(await catalog.openVdi('disk'), disk.content);
    await reopen();
    expect(await problems()).toEqual([]);
  });
});

test('an object that is made whole where an overlay was given up a moment ago is whole after a crash', async () => {
  const disk = await fullDisk();
  await catalog.snapshot('disk', 's');
  await disk.write(0, BLOCK, 2);
  await disk.vdi.flush();
  await disk.trim(0, OBJECT);
  await disk.vdi.flush();
  // The overlay is given up when the flush is done; its record is removed later.
  await new Promise((resolve) => setImmediate(resolve));
  await disk.write(2 * BLOCK, BLOCK, 3);
  await disk.vdi.flush();
  const crashed = path.join(temporaryDirectory(), 'store');
  fs.cpSync(directory, crashed, { recursive: true });
  await catalog.close();
  directory = crashed;
  await open();
  await checkContent(await catalog.openVdi('disk'), disk.content);
});

function vids(of: LocalStore): number {
  return of.metadata.records().length;
}

describe('merging', () => {
  /** With a flush: until then the stored map of the disk refers to what it had before. */
  const removeSnapshot = async (tag: string, disk: Disk): Promise<void> => {
    await disk.vdi.flush();
    await catalog.remove(`disk@${tag}`);
    await store.reclaimed();
  };

  test('writes few blocks down when the snapshot is deleted; then the store is as before, and writes copy nothing', async () => {
    const disk = await fullDisk();
    const before = spaceOfObjects();
    await catalog.snapshot('disk', 's');
    await disk.write(5 * BLOCK, 2 * BLOCK, 2);
    await disk.write(2 * OBJECT + 9, 1, 3);
    await removeSnapshot('s', disk);
    expect(await store.merger.state()).toEqual({ overlays: 2, bytes: 3 * BLOCK, isPaused: false });
    await store.merger.settled();
    await disk.vdi.flush();
    await store.reclaimed();
    expect(await store.merger.state()).toEqual({ overlays: 0, bytes: 0, isPaused: false });
    expect(notes).toEqual([`merged 2 overlays, and moved ${3 * BLOCK} bytes for that`]);
    expect(spaceOfObjects()).toBe(before);
    expect(fs.readdirSync(path.join(directory, 'overlays'))).toEqual([]);
    const { copies } = disk.vdi;
    await disk.write(5 * BLOCK, SIZE - 5 * BLOCK, 4);
    expect(disk.vdi.copies).toBe(copies);
    await disk.check();
    await reopen();
    await checkContent(await catalog.openVdi('disk'), disk.content);
    await catalog.close();
    await open();
    expect(await problems()).toEqual([]);
  });

  test('takes what is below up where that is less', async () => {
    const disk = await fullDisk();
    await catalog.snapshot('disk', 's');
    await disk.write(0, OBJECT - 3 * BLOCK, 2);
    await removeSnapshot('s', disk);
    expect(await store.merger.state()).toMatchObject({ overlays: 1, bytes: 3 * BLOCK });
    await store.merger.settled();
    await disk.vdi.flush();
    await store.reclaimed();
    expect(spaceOfObjects()).toBe(SIZE);
    await disk.check();
    await reopen();
    await checkContent(await catalog.openVdi('disk'), disk.content);
  });

  test('goes on with what the next process finds, and with snapshots that nobody has open', async () => {
    const disk = await fullDisk();
    await catalog.snapshot('disk', 'a');
    await disk.write(0, BLOCK, 2);
    await catalog.snapshot('disk', 'b');
    const b = disk.now();
    await disk.write(BLOCK, BLOCK, 3);
    await catalog.remove('disk@a');
    await store.reclaimed();
    await reopen();
    expect(await store.merger.state()).toMatchObject({ overlays: 1, bytes: BLOCK });
    await store.merger.settled();
    expect(await store.merger.state()).toMatchObject({ overlays: 0 });
    await checkContent(await catalog.openVdi('disk@b'), b);
    await checkContent(await catalog.openVdi('disk'), disk.content);
    await reopen();
    await checkContent(await catalog.openVdi('disk@b'), b);
    await checkContent(await catalog.openVdi('disk'), disk.content);
    await reopen();
    expect(await problems()).toEqual([]);
    await catalog.remove('disk@b');
    await store.reclaimed();
    await catalog.openVdi('disk');
    await store.merger.settled();
    await reopen();
    await checkContent(await catalog.openVdi('disk'), disk.content);
    expect(spaceOfObjects()).toBe(SIZE);
  });

  test('bounds the layers, and never copies what a snapshot holds at the bottom', async () => {
    const disk = await fullDisk();
    const contents: Buffer[] = [];
    const COUNT = 3 * MAX_LAYERS;
    for (let n = 0; n < COUNT; n++) {
      await catalog.snapshot('disk', `s${n}`);
      contents.push(disk.now());
      await disk.write(n * BLOCK, BLOCK, 2 + n);
      await disk.write(OBJECT, BLOCK, 2 + n);
      expect(deepest()).toBeLessThanOrEqual(MAX_LAYERS);
    }
    expect(deepest()).toBeGreaterThan(MANY_LAYERS);
    await store.merger.settled();
    expect(deepest()).toBeLessThanOrEqual(MANY_LAYERS);
    await disk.vdi.flush();
    await store.reclaimed();
    // A block for each write, and what flattening repeats of them.
    expect(spaceOfObjects() - SIZE).toBeLessThan(12 * COUNT * BLOCK);
    await disk.check();
    await reopen();
    for (const [n, content] of contents.entries()) {
      const vdi = await catalog.openVdi(`disk@s${n}`);
      await checkContent(vdi, content, `s${n}`);
      await catalog.release(vdi);
    }
    await checkContent(await catalog.openVdi('disk'), disk.content);
  });

  const deepest = (): number => {
    let most = 0;
    for (const { key } of store.overlays.entries())
      most = Math.max(most, store.overlays.depthOf(Math.floor(key / 2 ** 20), key % 2 ** 20));
    return most;
  };

  test('goes on with the others where one object cannot be merged, which is logged once', async () => {
    const disk = await fullDisk();
    await catalog.snapshot('disk', 's');
    for (let at = 0; at < SIZE; at += OBJECT) await disk.write(at, BLOCK, 2);
    await disk.vdi.flush();
    await catalog.remove('disk@s');
    await catalog.close();
    const root = path.join(directory, 'objects');
    const [first = ''] = fs
      .readdirSync(root, { recursive: true, encoding: 'utf8' })
      .filter((name) => /00000000$/.test(name));
    fs.truncateSync(path.join(root, first), BLOCK);
    const lines: string[] = [];
    await open({ log: (line) => lines.push(line) });
    const vdi = await catalog.openVdi('disk');
    for (let round = 0; round < 3; round++) await store.merger.settled();
    expect(await store.merger.state()).toMatchObject({ overlays: 1 });
    expect(lines).toEqual([expect.stringContaining(first)]);
    const rest = Buffer.alloc(SIZE - OBJECT);
    await vdi.read(OBJECT, rest);
    expect(rest.equals(disk.content.subarray(OBJECT))).toBe(true);
  });

  test('can be paused', async () => {
    const disk = await fullDisk();
    await catalog.snapshot('disk', 's');
    await disk.write(0, BLOCK, 2);
    await removeSnapshot('s', disk);
    store.merger.pause(true);
    await store.merger.settled();
    expect(await store.merger.state()).toEqual({ overlays: 1, bytes: BLOCK, isPaused: true });
    store.merger.pause(false);
    await store.merger.settled();
    expect(await store.merger.state()).toEqual({ overlays: 0, bytes: 0, isPaused: false });
  });

  test('waits for a temporary snapshot before it takes the overlay out of the map', async () => {
    const disk = await fullDisk();
    await catalog.snapshot('disk', 's');
    await disk.write(0, BLOCK, 2);
    const { tag, vid } = await catalog.snapshotTemporary('disk', 'now:1');
    const moment = disk.now();
    const now = await catalog.openVdi(`disk@${tag}`);
    await removeSnapshot('s', disk);
    await store.merger.settled();
    await disk.write(0, 2 * BLOCK, 3);
    await disk.write(OBJECT, BLOCK, 3);
    await checkContent(now, moment);
    await disk.check();
    await catalog.release(now);
    await catalog.dropTemporary('disk', tag, vid);
    await store.reclaimed();
    await store.merger.settled();
    expect(await store.merger.state()).toMatchObject({ overlays: 0 });
    await disk.vdi.flush();
    await store.reclaimed();
    expect(spaceOfObjects()).toBe(SIZE);
    await disk.check();
  });
});

describe('the space of overlays that are gone', () => {
  /** All names of segment files. */
  const segmentFiles = (): string[] =>
    fs.existsSync(path.join(directory, 'overlays')) ? fs.readdirSync(path.join(directory, 'overlays')) : [];

  /** The store on a disk whose calls `name` on segment files wait for `go`. */
  async function openHeld(name: string): Promise<{ readonly held: () => number; readonly go: () => void }> {
    await catalog.close();
    let held = 0;
    let go = (): void => undefined;
    const gate = new Promise<void>((resolve) => (go = resolve));
    onTestFinished(() => go());
    const disk = interpose(hostDisk, (call, proceed) => {
      if (call.name !== name || !call.file.startsWith(path.join(directory, 'overlays'))) return proceed();
      held++;
      return gate.then(proceed);
    });
    await open({ disk, makesOnlyOverlays: true });
    return { held: () => held, go };
  }

  test('is free also if the last overlay of a file goes while another one of it is punched out', async () => {
    const { held, go } = await openHeld('punchHole');
    await catalog.create('disk', SIZE, { blockSizeShift: Math.log2(OBJECT) });
    const vdi = await catalog.openVdi('disk');
    // A new segment file is punched from end to end as well.
    const written = vdi.write(0, Buffer.alloc(2 * OBJECT, 1), true);
    go();
    await written;
    await catalog.close();
    const again = await openHeld('punchHole');
    const opened = await catalog.openVdi('disk');
    await opened.trim(0, OBJECT, true);
    await vi.waitFor(() => expect(again.held()).toBeGreaterThan(0), WAIT_MS);
    await opened.trim(OBJECT, OBJECT, true);
    again.go();
    await vi.waitFor(() => expect(segmentFiles()).toEqual([]), WAIT_MS);
    await catalog.release(opened);
    expect(await problems()).toEqual([]);
    expect(held()).toBeGreaterThan(0);
  });

  test('is free also if it is given up while the last files are removed', async () => {
    const { held, go } = await openHeld('unlink');
    const vdis: Vdi[] = [];
    for (const name of ['a', 'b']) {
      await catalog.create(name, SIZE, { blockSizeShift: Math.log2(OBJECT) });
      vdis.push(await catalog.openVdi(name));
    }
    const [a, b] = vdis as [Vdi, Vdi];
    for (const vdi of vdis) await vdi.write(0, Buffer.alloc(BLOCK, 1), true);
    expect(segmentFiles()).toHaveLength(2);
    await a.trim(0, OBJECT, true);
    await vi.waitFor(() => expect(held()).toBe(1), WAIT_MS);
    await b.trim(0, OBJECT, true);
    go();
    await vi.waitFor(() => expect(segmentFiles()).toEqual([]), WAIT_MS);
  });

  test('is used again by an overlay that is made while the file goes', async () => {
    const { held, go } = await openHeld('unlink');
    await catalog.create('disk', SIZE, { blockSizeShift: Math.log2(OBJECT) });
    const disk = new Disk(await catalog.openVdi('disk'));
    await disk.write(0, OBJECT, 1);
    await disk.trim(0, OBJECT);
    await disk.vdi.flush();
    await vi.waitFor(() => expect(held()).toBe(1), WAIT_MS);
    const writes = [disk.write(100, BLOCK, 2), disk.write(2 * OBJECT, BLOCK, 3)];
    go();
    await Promise.all(writes);
    await disk.check();
    await store.reclaimed();
    await reopen();
    expect(await problems()).toEqual([]);
    await checkContent(await catalog.openVdi('disk'), disk.content);
  });

  test('is free after an attempt to make an overlay that failed', async () => {
    await catalog.close();
    let isFull = true;
    const disk = interpose(hostDisk, ({ name, file }, proceed) => {
      if (isFull && name === 'truncate' && file.startsWith(path.join(directory, 'overlays')))
        throw Object.assign(new Error('ENOSPC'), { code: 'ENOSPC', errno: -28, syscall: 'ftruncate' });
      return proceed();
    });
    await open({ disk, makesOnlyOverlays: true });
    await catalog.create('disk', SIZE, { blockSizeShift: Math.log2(OBJECT) });
    const vdi = await catalog.openVdi('disk');
    await expect(vdi.write(0, Buffer.alloc(BLOCK, 1), false)).rejects.toThrow();
    await vi.waitFor(() => expect(segmentFiles()).toEqual([]), WAIT_MS);
    isFull = false;
    await vdi.write(0, Buffer.alloc(BLOCK, 1), true);
    await catalog.release(vdi);
    expect(await problems()).toEqual([]);
  });
});

test('a store whose overlays can be merged, on a read-only filesystem, is read and left alone', async () => {
  const disk = await fullDisk();
  await catalog.snapshot('disk', 's');
  await disk.write(0, BLOCK, 2);
  await disk.vdi.flush();
  await catalog.remove('disk@s');
  await catalog.close();
  const frozen = interpose(hostDisk, ({ name, args, file }, proceed) => {
    const [, flags] = args as [unknown, number];
    const opens = (name === 'openSync' || name === 'open') && (flags & (O_WRONLY | O_RDWR | O_CREAT)) !== 0;
    if (opens && file.startsWith(directory)) throw Object.assign(new Error('EROFS'), { code: 'EROFS' });
    return proceed();
  });
  const lines: string[] = [];
  await open({ disk: frozen, mergeDelayMs: 0, log: (line) => lines.push(line) });
  expect(store.readOnlyBecause).toBeDefined();
  await checkContent(await catalog.openVdi('disk'), disk.content);
  await store.merger.settled();
  expect(await store.merger.state()).toMatchObject({ overlays: 1 });
  expect(lines).toHaveLength(1);
});

test('a store that has lost its metadata is damaged, also if all its objects are overlays', async () => {
  await fullDisk();
  await catalog.close();
  fs.rmSync(path.join(directory, 'objects'), { recursive: true });
  fs.rmSync(path.join(directory, 'meta.mdb'));
  fs.mkdirSync(path.join(directory, 'overlays'), { recursive: true });
  fs.writeFileSync(path.join(directory, 'overlays', '0000000200000000'), 'x');
  await expect(LocalStore.open(directory)).rejects.toMatchObject({ code: 'DAMAGED' });
});

test('check names data in a segment file that belongs to no overlay, a foreign file, and a lost segment; repair spares the rest', async () => {
  const disk = await fullDisk();
  await catalog.snapshot('disk', 's');
  await disk.write(0, BLOCK, 2);
  await catalog.close();
  const segment = path.join(directory, 'overlays', '0000000200000000');
  const fd = fs.openSync(segment, 'r+');
  fs.writeSync(fd, Buffer.alloc(BLOCK, 9), 0, BLOCK, 3 * OBJECT);
  fs.closeSync(fd);
  const stray = path.join(directory, 'overlays', 'stray');
  fs.writeFileSync(stray, 'x');
  await open();
  expect((await problems()).toSorted()).toEqual([
    `orphan: ${stray}: no VDI refers to it`,
    `orphan: data of object 3 in ${segment}: no VDI refers to it`,
  ]);
  expect(await catalog.check({ repair: true })).toMatchObject({ repaired: 2 });
  expect(await problems()).toEqual([]);
  expect(fs.statSync(segment).blocks * 512).toBe(BLOCK);
  await checkContent(await catalog.openVdi('disk'), disk.content);
  await catalog.close();
  fs.renameSync(segment, `${segment}.away`);
  await open();
  expect(await problems()).toEqual([
    expect.stringMatching(/^lost: parts of disk bytes 0 to 1048575 \(.*missing\)$/),
    expect.stringMatching(/^orphan: /),
  ]);
});

describe('the format', () => {
  const formatOf = async (): Promise<string | undefined> => {
    await catalog.close();
    const { openEnvironment } = await import('../../src/store/local/lmdb-environment.js');
    const env = openEnvironment(hostDisk, path.join(directory, 'meta.mdb'), { readOnly: false });
    const format = env.get('format')?.toString();
    await env.close();
    await open();
    return format;
  };

  test('changes with the first overlay, and not before', async () => {
    const disk = await fullDisk();
    await catalog.snapshot('disk', 's');
    expect(await formatOf()).toBe('1');
    const vdi = await catalog.openVdi('disk');
    await vdi.write(0, Buffer.alloc(BLOCK, 9), true);
    expect(await formatOf()).toBe('2');
    disk.content.fill(9, 0, BLOCK);
    await checkContent(await catalog.openVdi('disk'), disk.content);
  });
});
