/**
 * Snapshots under load, at the VDI layer: every block carries a sequence number, and a snapshot must hold, per block, at
 * least the last number acknowledged before it was asked for and none issued after it was answered.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { LocalStore } from '../../src/store/local/local-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import type { Vdi } from '../../src/vdi/vdi.js';

const BLOCK = 4096;
const BLOCKS = 2048; // 8 MiB in 1 MiB objects
const WRITERS = 4;
const SNAPSHOTS = 20;
const DELETED = 10;

let directory: string;
let store: LocalStore;
let catalog: VdiCatalog;

beforeEach(async () => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), 'sheepgate-concurrent-'));
  store = await LocalStore.open(directory);
  catalog = new VdiCatalog(store);
});

afterEach(async () => {
  await catalog.close().catch(() => undefined);
  fs.rmSync(directory, { recursive: true, force: true });
});

/** Allocated bytes of all object files. */
function objectBytes(): number {
  let sum = 0;
  const objects = path.join(directory, 'objects');
  for (const folder of fs.readdirSync(objects)) {
    for (const file of fs.readdirSync(path.join(objects, folder))) {
      sum += fs.statSync(path.join(objects, folder, file)).blocks * 512;
    }
  }
  return sum;
}

class Stamps {
  readonly issued = new Float64Array(BLOCKS);
  readonly acknowledged = new Float64Array(BLOCKS);
  stop = false;
  writes = 0;

  async writer(vdi: Vdi, first: number): Promise<void> {
    let sequence = 0;
    const data = Buffer.alloc(BLOCK);
    for (let n = first; !this.stop; n += WRITERS * 7) {
      const block = (Math.floor(n / WRITERS) % (BLOCKS / WRITERS)) * WRITERS + first;
      sequence++;
      data.writeDoubleLE(sequence, 0);
      data.writeDoubleLE(sequence, BLOCK - 8);
      this.issued[block] = sequence;
      await vdi.write(block * BLOCK, data, sequence % 64 === 0);
      this.acknowledged[block] = sequence;
      this.writes++;
      if (sequence % 16 === 0) await new Promise((resolve) => setImmediate(resolve));
    }
  }
}

async function stampsOf(spec: string): Promise<Float64Array> {
  const vdi = await catalog.openVdi(spec);
  const all = Buffer.alloc(BLOCKS * BLOCK);
  await vdi.read(0, all);
  await catalog.release(vdi);
  const stamps = new Float64Array(BLOCKS);
  for (let block = 0; block < BLOCKS; block++) {
    stamps[block] = all.readDoubleLE(block * BLOCK);
    expect(all.readDoubleLE((block + 1) * BLOCK - 8)).toBe(stamps[block]);
  }
  return stamps;
}

describe('snapshots while four writers run at full speed', () => {
  test('each is a point in time and never changes, and copy-on-write ends with the last one', async () => {
    await catalog.create('disk', BLOCKS * BLOCK, { blockSizeShift: 20 });
    const vdi = await catalog.openVdi('disk');
    const stamps = new Stamps();
    const writers = Array.from({ length: WRITERS }, (_, n) => stamps.writer(vdi, n));
    const frozen = new Map<string, Float64Array>();
    for (let n = 0; n < SNAPSHOTS; n++) {
      const target = stamps.writes + 200;
      while (stamps.writes < target) await new Promise((resolve) => setImmediate(resolve));
      const before = stamps.acknowledged.slice();
      await catalog.snapshot('disk', `s${n}`);
      const after = stamps.issued.slice();
      const seen = await stampsOf(`disk@s${n}`);
      for (let block = 0; block < BLOCKS; block++) {
        expect(seen[block]).toBeGreaterThanOrEqual(before[block] as number);
        expect(seen[block]).toBeLessThanOrEqual(after[block] as number);
      }
      frozen.set(`s${n}`, seen);
      if (n % 2 === 1 && n / 2 < DELETED) {
        await catalog.remove(`disk@s${n - 1}`);
        frozen.delete(`s${n - 1}`);
      }
    }
    stamps.stop = true;
    await Promise.all(writers);
    for (const [tag, expected] of frozen) expect(await stampsOf(`disk@${tag}`)).toEqual(expected);

    expect(frozen.size).toBe(SNAPSHOTS - DELETED);
    expect(vdi.copies).toBeGreaterThan(0);
    for (const tag of frozen.keys()) await catalog.remove(`disk@${tag}`);
    const copies = vdi.copies;
    const data = Buffer.alloc(BLOCK, 1);
    for (let block = 0; block < BLOCKS; block++) await vdi.write(block * BLOCK, data, false);
    expect(vdi.copies - copies).toBe(0);
    await vdi.flush();
    await store.objects.removed();
    expect(objectBytes()).toBeLessThanOrEqual(BLOCKS * BLOCK * 1.02);
    await catalog.release(vdi);
    expect((await catalog.check({ repair: false })).problems).toEqual([]);
  });

  test('two clones of a deleted snapshot never see each other, whatever each has flushed', async () => {
    const size = 4 * 2 ** 20;
    await catalog.create('base', size, { blockSizeShift: 20 });
    const base = await catalog.openVdi('base');
    await base.write(0, Buffer.alloc(size, 1), true);
    await catalog.release(base);
    await catalog.snapshot('base', 's');
    await catalog.clone('base@s', 'a');
    await catalog.clone('base@s', 'b');
    await catalog.remove('base@s');
    await catalog.remove('base');
    const a = await catalog.openVdi('a');
    const b = await catalog.openVdi('b');
    // Clone a copies its object but does not flush: on disk its map still points at the shared one.
    await a.write(0, Buffer.alloc(BLOCK, 2), false);
    await b.write(0, Buffer.alloc(BLOCK, 3), true);
    expect(b.copies).toBe(1);
    await a.flush();
    await b.flush();
    // Now each has its own; the other three objects are shared by both.
    await a.write(BLOCK, Buffer.alloc(BLOCK, 4), false);
    expect(a.copies).toBe(1);
    await catalog.release(a);
    await catalog.remove('a');
    await b.write(2 * 2 ** 20, Buffer.alloc(BLOCK, 5), false);
    expect(b.copies).toBe(1);
    await catalog.release(b);
  });
});
