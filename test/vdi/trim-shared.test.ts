/**
 * TRIM and WRITE_ZEROES in objects that a snapshot shares, on the local store: a request that changes no byte costs no space,
 * copies nothing and does not count as a change; any other does.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { LocalStore } from '../../src/store/local/local-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import type { Vdi } from '../../src/vdi/vdi.js';
import { FailingDisk, READS } from '../harness/failing-disk.js';

const BLOCK = 4096;
const OBJECT = 2 ** 20;
const SIZE = 8 * OBJECT;
const TRIM = { noHole: false, fua: false };

let directory: string;
let failing: FailingDisk;
let store: LocalStore;
let catalog: VdiCatalog;
let vdi: Vdi;

beforeEach(async () => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), 'sheepgate-trim-'));
  failing = new FailingDisk();
  store = await LocalStore.open(directory, { disk: failing.disk });
  catalog = new VdiCatalog(store);
  await catalog.create('disk', SIZE, { blockSizeShift: 20 });
  vdi = await catalog.openVdi('disk');
});

afterEach(async () => {
  await catalog.close().catch(() => undefined);
  fs.rmSync(directory, { recursive: true, force: true });
});

/** The number of object files, and the bytes that they occupy. */
function objects(): { files: number; bytes: number } {
  let files = 0;
  let bytes = 0;
  for (const folder of ['objects', 'overlays']) {
    const root = path.join(directory, folder);
    for (const file of fs.existsSync(root) ? fs.readdirSync(root, { recursive: true, encoding: 'utf8' }) : []) {
      const status = fs.statSync(path.join(root, file));
      if (!status.isFile()) continue;
      files++;
      bytes += status.blocks * 512;
    }
  }
  return { files, bytes };
}

/** Objects that count as changed since the snapshot. */
async function changedSince(spec: string): Promise<number[]> {
  const base = await catalog.openVdi(spec);
  const changed: number[] = [];
  await vdi.changedSince(base, 0, SIZE, (at, length, isChanged) => {
    const first = Math.floor(at / OBJECT);
    if (isChanged) for (let idx = first; idx * OBJECT < at + length; idx++) changed.push(idx);
    return true;
  });
  await catalog.release(base);
  return [...new Set(changed)];
}

async function content(of: Vdi): Promise<Buffer> {
  const all = Buffer.alloc(SIZE, 0xaa);
  await of.read(0, all);
  return all;
}

/** 0: data but for its second half; 1: zeros that were written; 2: a little data amid a hole; 3: not allocated; 4: data. */
async function layOut(): Promise<void> {
  await vdi.write(0, Buffer.alloc(OBJECT / 2, 1), false);
  await vdi.write(OBJECT, Buffer.alloc(OBJECT), false);
  await vdi.write(2 * OBJECT + OBJECT / 2, Buffer.alloc(BLOCK, 2), false);
  await vdi.write(4 * OBJECT, Buffer.alloc(OBJECT, 4), true);
}

describe.each([
  ['a snapshot', 'disk@s', () => catalog.snapshot('disk', 's')],
  ['a temporary snapshot', 'disk@now', () => catalog.snapshotTemporary('disk', 'now')],
] as const)('under %s', (_, spec, take) => {
  test('trims of zeros, whole objects and parts, copy nothing, cost nothing and change nothing', async () => {
    await layOut();
    await take();
    const before = objects();
    await vdi.trim(OBJECT / 2, OBJECT / 2, false);
    await vdi.trim(OBJECT / 2 + 512, 5000, true);
    await vdi.trim(OBJECT, OBJECT, false);
    await vdi.zero(OBJECT + 1000, OBJECT / 2, TRIM);
    await vdi.zero(2 * OBJECT, OBJECT / 2, TRIM);
    await vdi.trim(2 * OBJECT + OBJECT / 2 + BLOCK, OBJECT + OBJECT / 2 - BLOCK, false);
    await vdi.trim(5 * OBJECT, 3 * OBJECT, true);
    await vdi.flush();
    await store.reclaimed();
    expect(vdi.copies).toBe(0);
    expect(objects()).toEqual(before);
    expect(await changedSince(spec)).toEqual([]);
  });

  test('trims of ranges with data leave zeros here and the old content in the snapshot', async () => {
    await layOut();
    await take();
    const old = await content(vdi);
    // A single byte at the very end of a long stretch of zeros, too.
    await vdi.trim(OBJECT / 2 - 1, OBJECT / 2 + 1, false);
    await vdi.trim(2 * OBJECT, OBJECT / 2 + 1, false);
    await vdi.trim(4 * OBJECT, OBJECT, false);
    const expected = Buffer.from(old);
    expected.fill(0, OBJECT / 2 - 1, OBJECT);
    expected.fill(0, 2 * OBJECT, 2 * OBJECT + OBJECT / 2 + 1);
    expected.fill(0, 4 * OBJECT, 5 * OBJECT);
    expect((await content(vdi)).equals(expected)).toBe(true);
    const snapshot = await catalog.openVdi(spec);
    expect((await content(snapshot)).equals(old)).toBe(true);
    await catalog.release(snapshot);
    expect(await changedSince(spec)).toEqual([0, 2, 4]);
  });

  test('zeros that must stay allocated do, and count as changed', async () => {
    await layOut();
    await take();
    await vdi.zero(OBJECT / 2, OBJECT / 2, { noHole: true, fua: false });
    await vdi.zero(OBJECT, OBJECT, { noHole: true, fua: false });
    await vdi.zero(3 * OBJECT, OBJECT, { noHole: true, fua: false });
    await vdi.flush();
    expect(await changedSince(spec)).toEqual([0, 1, 3]);
  });

  test('a fast zero of a shared object changes nothing where zeros are, and copies no data where there is some', async () => {
    await layOut();
    await catalog.snapshot('disk', 'kept');
    await take();
    const fast = { ...TRIM, fastZero: true };
    await vdi.zero(OBJECT / 2, OBJECT / 2, fast);
    await vdi.zero(OBJECT / 2, OBJECT / 2 + OBJECT + BLOCK, fast);
    expect(await changedSince(spec)).toEqual([]);
    expect(await changedSince('disk@kept')).toEqual([]);
    const expected = await content(vdi);
    const zero = async (at: number, length: number, noHole = false): Promise<void> => {
      expected.fill(0, at, at + length);
      await vdi.zero(at, length, { ...fast, noHole });
    };
    await zero(2 * OBJECT, OBJECT / 2 + 1);
    await zero(5, 2 * BLOCK);
    await zero(4 * OBJECT + BLOCK, 2 * BLOCK, true);
    expect((await content(vdi)).equals(expected)).toBe(true);
    expect(await changedSince('disk@kept')).toEqual([0, 2, 4]);
    // Every request has left the gate exactly once.
    await catalog.snapshot('disk', 'again');
    await vdi.write(0, Buffer.alloc(BLOCK, 9), true);
  });
});

test('a weekly trim of all free space neither grows the store nor counts as change, however often', async () => {
  // A disk half full, in objects that are each used in part.
  for (let idx = 0; idx < 8; idx++)
    await vdi.write(idx * OBJECT + 16 * BLOCK, Buffer.alloc(OBJECT / 2, idx + 1), false);
  await vdi.flush();
  const before = objects();
  for (let week = 0; week < 3; week++) {
    await catalog.snapshot('disk', `w${week}`);
    for (let idx = 0; idx < 8; idx++) {
      await vdi.trim(idx * OBJECT, 16 * BLOCK, false);
      await vdi.trim(idx * OBJECT + OBJECT / 2 + 16 * BLOCK, OBJECT / 2 - 16 * BLOCK, false);
    }
    await vdi.flush();
    expect(objects()).toEqual(before);
    expect(await changedSince(`disk@w${week}`)).toEqual([]);
  }
});

test('an object that is not shared and holds zeros gives its space back when all of it is trimmed', async () => {
  await layOut();
  await catalog.snapshot('disk', 's');
  await vdi.write(3 * OBJECT, Buffer.alloc(OBJECT), true);
  const { files } = objects();
  await vdi.trim(3 * OBJECT, OBJECT, false);
  await vdi.flush();
  await store.reclaimed();
  expect(objects().files).toBe(files - 1);
  expect(await changedSince('disk@s')).toEqual([]);
});

test('a trim of a whole object removes it even if it cannot be read', async () => {
  await layOut();
  await catalog.snapshot('disk', 's');
  const badSector = failing.fail({ calls: READS, file: /objects.*00000004$/ }, 'EIO');
  await vdi.trim(4 * OBJECT, OBJECT, false);
  expect(await changedSince('disk@s')).toEqual([4]);
  expect(badSector.count).toBeGreaterThan(0);
  badSector.off();
});
