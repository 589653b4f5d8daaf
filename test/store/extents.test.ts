/**
 * Extents of the local store while others punch, write, remove and create the same objects. The answer must be usable (in
 * order, without gaps, no empty extent), and must never report a hole where data was written before the query.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { hostDisk } from '../../src/system/real-disk.js';
import { LocalStore } from '../../src/store/local/local-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import type { Vdi } from '../../src/vdi/vdi.js';
import { FailingDisk } from '../harness/failing-disk.js';

// As bin/start.cjs sets it: with Node's default of few threads, one query would wait for the other for ever.
vi.hoisted(() => void (process.env.UV_THREADPOOL_SIZE = '24'));

const BLOCK = 4096;
const OBJECT = 2 ** 20;
const SIZE = 2 * OBJECT;

let directory: string;
let failing: FailingDisk;
let store: LocalStore;
let catalog: VdiCatalog;
let vdi: Vdi;

beforeEach(async () => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), 'sheepgate-extents-'));
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

interface Extent {
  readonly at: number;
  readonly length: number;
  readonly hole: boolean;
}

/** All extents of the range; fails if they are not in order, have a gap, or one is empty. */
async function extentsOf(of: Vdi, offset = 0, length = of.size): Promise<Extent[]> {
  const found: Extent[] = [];
  let reached = offset;
  await of.extents(offset, length, (at, size, hole) => {
    expect(at).toBe(reached);
    expect(size).toBeGreaterThan(0);
    reached = at + size;
    found.push({ at, length: size, hole });
    return true;
  });
  expect(reached).toBe(offset + length);
  return found;
}

/** Every block except the last of an object, so that there is always a hole to find. */
async function fill(idx: number): Promise<void> {
  await vdi.write(idx * OBJECT, Buffer.alloc(OBJECT - BLOCK, 1), false);
}

test('data that is punched between two queries is queried again, and the extents after it are right', async () => {
  await fill(0);
  failing.instead({ calls: ['nextHole'], times: 1 }, async ({ args }, proceed) => {
    await hostDisk.punchHole(args[0] as number, 0, OBJECT / 2);
    return proceed();
  });
  expect(await extentsOf(vdi, 0, OBJECT)).toEqual([
    { at: 0, length: OBJECT / 2, hole: true },
    { at: OBJECT / 2, length: OBJECT / 2 - BLOCK, hole: false },
    { at: OBJECT - BLOCK, length: BLOCK, hole: true },
  ]);
});

test('where every query contradicts the one before it, the range counts as data', async () => {
  await fill(0);
  const looks = failing.instead({ calls: ['nextData', 'nextHole'] }, ({ args }) => Promise.resolve(args[1]));
  expect(await extentsOf(vdi, 0, OBJECT)).toEqual([{ at: 0, length: OBJECT, hole: false }]);
  expect(looks.count).toBeLessThan(200);
});

test('extents are usable, and hide no written data, while the object is punched, emptied and written again', async () => {
  await fill(0);
  await vdi.write(OBJECT + BLOCK, Buffer.alloc(BLOCK, 9), false);
  let stop = false;
  const churn = async (): Promise<void> => {
    for (let n = 0; !stop; n++) {
      if (n % 5 === 4) await vdi.trim(0, OBJECT, false);
      else await vdi.trim((n % 16) * 16 * BLOCK, 16 * BLOCK, false);
      if (n % 3 === 0) await vdi.write((n % 16) * 16 * BLOCK, Buffer.alloc(16 * BLOCK, (n % 255) | 1), n % 7 === 0);
      else await vdi.write(0, Buffer.alloc(OBJECT - BLOCK, (n % 255) | 1), false);
    }
  };
  const churning = Promise.all([churn(), churn()]);
  try {
    for (let n = 0; n < 1000; n++) {
      const found = await extentsOf(vdi);
      const kept = found.find(({ at, length }) => at <= OBJECT + BLOCK && at + length >= OBJECT + 2 * BLOCK);
      expect(kept?.hole).toBe(false);
    }
  } finally {
    stop = true;
    await churning;
  }
});

test('a lost temporary snapshot reports no holes where it cannot be read', async () => {
  await fill(0);
  await catalog.snapshotTemporary('disk', 'now');
  // A directory with its name: the scratch file cannot be created.
  fs.mkdirSync(path.join(directory, 'scratch'));
  await vdi.trim(0, OBJECT / 2, false);
  fs.rmdirSync(path.join(directory, 'scratch'));
  const now = await catalog.openVdi('disk@now');
  await expect(extentsOf(now)).rejects.toThrow(/disk@now is lost/);
  await catalog.snapshot('disk', 'after');
  const after = await catalog.openVdi('disk@after');
  const changed: boolean[] = [];
  await after.changedSince(now, 0, OBJECT, (_at, _length, isChanged) => changed.push(isChanged) > 0);
  expect(changed).toEqual([true]);
  await catalog.release(now);
  await catalog.release(after);
});

test('a temporary snapshot that is lost during a query of its extents reports no holes either', async () => {
  await fill(0);
  await catalog.snapshotTemporary('disk', 'now');
  const now = await catalog.openVdi('disk@now');
  fs.mkdirSync(path.join(directory, 'scratch'));
  failing.instead({ calls: ['nextData'], times: 1 }, async (_, proceed) => {
    await vdi.trim(0, OBJECT / 2, false);
    return proceed();
  });
  await expect(extentsOf(now)).rejects.toThrow(/disk@now is lost/);
  fs.rmdirSync(path.join(directory, 'scratch'));
  await catalog.release(now);
});
