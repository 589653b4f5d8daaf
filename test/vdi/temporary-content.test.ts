/**
 * Temporary snapshots of the local store under load, at the VDI layer: writers of every kind continue while snapshots are taken,
 * read and dropped. Every block carries a sequence number. A snapshot holds, for each block, at least the last number
 * acknowledged before it was asked for, none issued after it was answered, and the same at every reading.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { LocalStore } from '../../src/store/local/local-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import type { Vdi } from '../../src/vdi/vdi.js';
import { FailingDisk } from '../harness/failing-disk.js';

const BLOCK = 4096;
const OBJECT = 2 ** 20;
const BLOCKS = 2048; // 8 MiB in 1 MiB objects
const SIZE = BLOCKS * BLOCK;
const WRITERS = 4;

let directory: string;
let failing: FailingDisk;
let store: LocalStore;
let catalog: VdiCatalog;

beforeEach(async () => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), 'sheepgate-temporary-'));
  failing = new FailingDisk();
  store = await LocalStore.open(directory, { disk: failing.disk });
  catalog = new VdiCatalog(store);
});

afterEach(async () => {
  await catalog.close().catch(() => undefined);
  fs.rmSync(directory, { recursive: true, force: true });
});

const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

/** The number of object files, and the bytes that they occupy. */
function objects(): { files: number; bytes: number } {
  let files = 0;
  let bytes = 0;
  const root = path.join(directory, 'objects');
  for (const folder of fs.readdirSync(root)) {
    for (const file of fs.readdirSync(path.join(root, folder))) {
      files++;
      bytes += fs.statSync(path.join(root, folder, file)).blocks * 512;
    }
  }
  return { files, bytes };
}

/** Bytes of this process's open files that have no name any more. */
function scratchBytes(): number {
  let bytes = 0;
  for (const fd of fs.readdirSync('/proc/self/fd')) {
    try {
      if (!fs.readlinkSync(`/proc/self/fd/${fd}`).startsWith(path.join(directory, 'scratch'))) continue;
      bytes += fs.fstatSync(Number(fd)).blocks * 512;
    } catch {
      // closed since it was listed
    }
  }
  return bytes;
}

async function readAll(spec: string): Promise<Buffer> {
  const vdi = await catalog.openVdi(spec);
  const all = Buffer.alloc(SIZE);
  for (let at = 0; at < SIZE; at += 3 * BLOCK + 512) {
    const later = vdi.read(at, all.subarray(at, Math.min(at + 3 * BLOCK + 512, SIZE)));
    if (later) await later;
  }
  await catalog.release(vdi);
  return all;
}

function stampsOf(all: Buffer): Float64Array {
  const stamps = new Float64Array(BLOCKS);
  for (let block = 0; block < BLOCKS; block++) {
    stamps[block] = all.readDoubleLE(block * BLOCK);
    expect(all.readDoubleLE((block + 1) * BLOCK - 8), `block ${block} is torn`).toBe(stamps[block]);
  }
  return stamps;
}

class Load {
  readonly issued = new Float64Array(BLOCKS);
  readonly acknowledged = new Float64Array(BLOCKS);
  stop = false;
  writes = 0;
  #sequence = 0;

  /** Runs of 1 to 64 blocks, so that some go through the loop and some through the thread pool; each block has one writer. */
  async writer(vdi: Vdi, n: number): Promise<void> {
    const share = BLOCKS / WRITERS;
    let state = 12345 + n;
    const random = (below: number): number => {
      state = (Math.imul(state, 1103515245) + 12345) >>> 0;
      return (state >>> 8) % below;
    };
    while (!this.stop) {
      const long = random(8) === 0;
      const count = long ? 33 + random(32) : 1 + random(3);
      const first = n * share + random(share - count);
      const sequence = ++this.#sequence;
      const zeros = random(16) === 0;
      const data = Buffer.alloc(count * BLOCK);
      for (let k = 0; k < count; k++) {
        // Zeros have no sequence number: a zeroed block has no lower limit.
        this.issued[first + k] = sequence;
        if (zeros) this.acknowledged[first + k] = 0;
        data.writeDoubleLE(sequence, k * BLOCK);
        data.writeDoubleLE(sequence, (k + 1) * BLOCK - 8);
      }
      if (zeros) await vdi.zero(first * BLOCK, count * BLOCK, { noHole: random(2) === 0, fua: false });
      else await vdi.write(first * BLOCK, data, random(64) === 0);
      if (!zeros) for (let k = 0; k < count; k++) this.acknowledged[first + k] = sequence;
      this.writes++;
      if (random(4) === 0) await turn();
    }
  }
}

test('temporary snapshots under four writers are points in time, never change, and cost no copies', async () => {
  await catalog.create('disk', SIZE, { blockSizeShift: 20 });
  const vdi = await catalog.openVdi('disk');
  await vdi.write(0, Buffer.alloc(SIZE), true);
  const load = new Load();
  const writers = Array.from({ length: WRITERS }, (_, n) => load.writer(vdi, n));
  const frozen = new Map<string, Buffer>();
  for (let n = 0; n < 20; n++) {
    const target = load.writes + 100;
    while (load.writes < target) await turn();
    const before = load.acknowledged.slice();
    await catalog.snapshotTemporary('disk', `now:${n}`);
    const after = load.issued.slice();
    const first = await readAll(`disk@now:${n}`);
    const stamps = stampsOf(first);
    for (let block = 0; block < BLOCKS; block++) {
      const seen = stamps[block] as number;
      if (seen !== 0) expect(seen, `block ${block} from below`).toBeGreaterThanOrEqual(before[block] as number);
      expect(seen, `block ${block} from above`).toBeLessThanOrEqual(after[block] as number);
    }
    frozen.set(`now:${n}`, first);
    if (frozen.size <= 3) continue;
    for (const [tag, content] of frozen) {
      expect((await readAll(`disk@${tag}`)).equals(content), `${tag} has changed`).toBe(true);
    }
    const [oldest] = frozen.keys();
    await catalog.dropTemporary('disk', oldest as string);
    frozen.delete(oldest as string);
  }
  expect(vdi.copies).toBe(0);
  expect(scratchBytes()).toBeGreaterThan(0);
  for (const tag of frozen.keys()) await catalog.dropTemporary('disk', tag);
  load.stop = true;
  await Promise.all(writers);
  await vdi.write(0, Buffer.alloc(SIZE, 1), false);
  expect(vdi.copies).toBe(0);
  await vdi.flush();
  await store.reclaimed();
  expect(objects().files).toBe(SIZE / OBJECT);
  await expect.poll(scratchBytes).toBe(0);
  await catalog.release(vdi);
  expect((await catalog.check({ repair: false })).problems).toEqual([]);
});

test('temporary snapshots survive permanent snapshots, their deletion, trims, and objects that are created again', async () => {
  await catalog.create('disk', SIZE, { blockSizeShift: 20 });
  const vdi = await catalog.openVdi('disk');
  await vdi.write(0, Buffer.alloc(SIZE), true);
  const load = new Load();
  const writers = Array.from({ length: WRITERS }, (_, n) => load.writer(vdi, n));
  for (let n = 0; n < 10; n++) {
    const target = load.writes + 50;
    while (load.writes < target) await turn();
    await catalog.snapshotTemporary('disk', 'now');
    const content = await readAll('disk@now');
    stampsOf(content);
    await catalog.snapshot('disk', `s${n}`);
    expect((await readAll('disk@now')).equals(content), 'after a snapshot').toBe(true);
    const more = load.writes + 50;
    while (load.writes < more) await turn();
    // Whole objects are trimmed and created again.
    await vdi.trim((n % 8) * OBJECT, OBJECT, false);
    await vdi.write((n % 8) * OBJECT, Buffer.alloc(512), false);
    expect((await readAll('disk@now')).equals(content), 'after a trim').toBe(true);
    await catalog.remove(`disk@s${n}`);
    const last = load.writes + 50;
    while (load.writes < last) await turn();
    expect((await readAll('disk@now')).equals(content), 'after a deletion').toBe(true);
    await catalog.dropTemporary('disk', 'now');
  }
  load.stop = true;
  await Promise.all(writers);
  await vdi.flush();
  await store.reclaimed();
  const { copies } = vdi;
  for (let at = 0; at < SIZE; at += OBJECT) await vdi.write(at, Buffer.alloc(512, 9), false);
  expect(vdi.copies).toBe(copies);
  await catalog.release(vdi);
  expect((await catalog.check({ repair: false })).problems).toEqual([]);
});

test('a temporary snapshot keeps the old object when the object is trimmed and created again', async () => {
  await catalog.create('disk', SIZE, { blockSizeShift: 20 });
  const vdi = await catalog.openVdi('disk');
  await vdi.write(0, Buffer.alloc(OBJECT, 1), false);
  // Not flushed: the map on disk does not have it yet.
  await catalog.snapshotTemporary('disk', 'now');
  await vdi.write(BLOCK, Buffer.alloc(BLOCK, 2), false);
  await vdi.trim(0, OBJECT, false);
  await vdi.write(0, Buffer.alloc(BLOCK, 3), true);
  expect((await readAll('disk@now')).subarray(0, OBJECT).equals(Buffer.alloc(OBJECT, 1))).toBe(true);
  // The same with all other snapshots gone and the disk opened again.
  await catalog.release(vdi);
  const again = await catalog.openVdi('disk');
  await again.trim(0, OBJECT, false);
  await again.write(0, Buffer.alloc(BLOCK, 4), true);
  expect((await readAll('disk@now')).subarray(0, OBJECT).equals(Buffer.alloc(OBJECT, 1))).toBe(true);
  await catalog.release(again);
  await catalog.dropTemporary('disk', 'now');
  await store.reclaimed();
  expect(objects().files).toBe(1);
  expect((await catalog.check({ repair: false })).problems).toEqual([]);
});

test('a temporary snapshot is taken without a flush, and a flush does not wait for it', async () => {
  await catalog.create('disk', SIZE, { blockSizeShift: 20 });
  const vdi = await catalog.openVdi('disk');
  await vdi.write(0, Buffer.alloc(SIZE, 1), false);
  const syncs = failing.instead({ calls: ['fdatasync'], file: /objects/ }, (_, proceed) => proceed());
  await catalog.snapshotTemporary('disk', 'now');
  expect(syncs.count).toBe(0);
  await vdi.flush();
  expect(syncs.count).toBe(SIZE / OBJECT);
  expect((await readAll('disk@now')).equals(Buffer.alloc(SIZE, 1))).toBe(true);
  await catalog.release(vdi);
  await catalog.dropTemporary('disk', 'now');
});

test('a write that is in flight when it is taken holds up no other request, and the snapshot waits for it', async () => {
  await catalog.create('disk', SIZE, { blockSizeShift: 20 });
  const vdi = await catalog.openVdi('disk');
  await vdi.write(0, Buffer.alloc(SIZE, 1), true);
  // Larger than a write that runs on the loop. The other write may run in a thread as well: only the first is held.
  const { reached, release } = failing.hold({ calls: ['write'], file: /objects/, times: 1 });
  const slow = vdi.write(0, Buffer.alloc(64 * BLOCK, 2), false);
  await reached;
  let isTaken = false;
  const taking = catalog.snapshotTemporary('disk', 'now').then(() => (isTaken = true));
  for (let n = 0; n < 20; n++) await turn();
  await vdi.write(OBJECT, Buffer.alloc(BLOCK, 3), true);
  expect(isTaken).toBe(false);
  release();
  await slow;
  await taking;
  const now = await readAll('disk@now');
  expect(now[0]).toBe(2);
  expect(now[OBJECT]).toBe(1);
  await catalog.release(vdi);
  await catalog.dropTemporary('disk', 'now');
});

test('without room for before-images the snapshot is lost, which is logged, and the write is not', async () => {
  const lines: string[] = [];
  await catalog.close();
  store = await LocalStore.open(directory, { log: (line) => lines.push(line) });
  catalog = new VdiCatalog(store);
  await catalog.create('disk', SIZE, { blockSizeShift: 20 });
  const vdi = await catalog.openVdi('disk');
  await vdi.write(0, Buffer.alloc(SIZE, 1), true);
  await catalog.snapshotTemporary('disk', 'now');
  // A directory in its place: the scratch file cannot be created.
  fs.mkdirSync(path.join(directory, 'scratch'));
  await vdi.write(0, Buffer.alloc(BLOCK, 2), true);
  fs.rmdirSync(path.join(directory, 'scratch'));
  await expect(readAll('disk@now')).rejects.toThrow(/disk@now is lost: data that was overwritten in disk/);
  expect(lines.join('\n')).toMatch(/disk@now is lost/);
  const data = Buffer.alloc(BLOCK);
  await vdi.read(0, data);
  expect(data.equals(Buffer.alloc(BLOCK, 2))).toBe(true);
});

test('a thousand temporary snapshots leave no more records, names and files than one', async () => {
  await catalog.create('disk', SIZE, { blockSizeShift: 20 });
  const vdi = await catalog.openVdi('disk');
  await vdi.write(0, Buffer.alloc(SIZE, 1), true);
  const metadata = fs.statSync(path.join(directory, 'meta.mdb')).blocks;
  const before = { ...objects(), records: await catalog.list() };
  for (let n = 0; n < 1000; n++) {
    await catalog.snapshotTemporary('disk', 'now');
    await vdi.write((n % BLOCKS) * BLOCK, Buffer.alloc(BLOCK, n % 256), false);
    if (n % 100 === 0) {
      await vdi.trim(0, OBJECT, false);
      await vdi.write(0, Buffer.alloc(OBJECT, 1), true);
    }
    await catalog.dropTemporary('disk', 'now');
  }
  await vdi.flush();
  await store.reclaimed();
  expect({ ...objects(), records: await catalog.list() }).toEqual(before);
  expect(fs.statSync(path.join(directory, 'meta.mdb')).blocks).toBeLessThanOrEqual(metadata + 128);
  await expect.poll(scratchBytes).toBe(0);
  expect(vdi.copies).toBe(0);
  await catalog.release(vdi);
  expect((await catalog.check({ repair: false })).problems).toEqual([]);
});

test('a temporary snapshot cannot be cloned or rolled back to: it ends with its reader', async () => {
  await catalog.create('disk', SIZE, { blockSizeShift: 20 });
  await catalog.snapshotTemporary('disk', 'now');
  await expect(catalog.clone('disk@now', 'copy')).rejects.toMatchObject({ code: 'UNSUPPORTED' });
  await expect(catalog.rollback('disk@now')).rejects.toMatchObject({ code: 'UNSUPPORTED' });
  await catalog.dropTemporary('disk', 'now');
});

test('when the snapshot before it is deleted and it is dropped, nothing of it is left', async () => {
  await catalog.create('disk', SIZE, { blockSizeShift: 20 });
  const vdi = await catalog.openVdi('disk');
  await vdi.write(0, Buffer.alloc(OBJECT, 1), false);
  await catalog.snapshot('disk', 'before');
  await catalog.snapshotTemporary('disk', 'now');
  await catalog.remove('disk@before');
  await catalog.dropTemporary('disk', 'now');
  expect((await catalog.list()).map(({ tag }) => tag)).toEqual(['']);
  await catalog.release(vdi);
});

test('a range that was overwritten since has changed, though it is the same object', async () => {
  await catalog.create('disk', SIZE, { blockSizeShift: 20 });
  const vdi = await catalog.openVdi('disk');
  await vdi.write(0, Buffer.alloc(2 * OBJECT, 1), false);
  await catalog.snapshotTemporary('disk', 'now');
  await vdi.write(OBJECT, Buffer.alloc(BLOCK, 2), false);
  await catalog.snapshot('disk', 'after');
  const [temporary, after] = [await catalog.openVdi('disk@now'), await catalog.openVdi('disk@after')];
  for (const [one, other] of [
    [temporary, after],
    [after, temporary],
  ] as const) {
    const changed: number[] = [];
    await one.changedSince(other, 0, SIZE, (at, length, isChanged) => {
      if (isChanged) changed.push(at, length);
      return true;
    });
    expect(changed).toEqual([OBJECT, OBJECT]);
  }
  for (const each of [temporary, after, vdi]) await catalog.release(each);
  await catalog.dropTemporary('disk', 'now');
});
