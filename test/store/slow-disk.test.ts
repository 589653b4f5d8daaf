/**
 * A slow disk: writes that block leave the event loop and return when they are quick again, and work that waits for the disk
 * leaves threads of the pool to reads and to other disks.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { NbdClient } from 'nbd-server-ts';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import type { VdiRecord } from '../../src/store/vdi-record.js';
import { makeLogFolder, MapLogs } from '../../src/store/local/map-logs.js';
import { LocalStore } from '../../src/store/local/local-store.js';
import { localObjectKey } from '../../src/store/local/reference-counts.js';
import { CHANGES, LOOKUPS, READS, SYNCS, ThreadShare } from '../../src/store/local/thread-shares.js';
import { WriteThrottle } from '../../src/store/local/write-throttle.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import type { Vdi } from '../../src/vdi/vdi.js';
import { FailingDisk, systemError } from '../harness/failing-disk.js';
import { cli, needs, ok, startDaemon, temporaryDirectory, waitUntil } from '../harness/daemon.js';

const OBJECT = 2 ** 20;
const BLOCK = 4096;
const SIZE = 64 * OBJECT;
const STALL_MS = 45;

let directory: string;
let failing: FailingDisk;
let store: LocalStore;
let catalog: VdiCatalog;

beforeEach(async () => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), 'sheepgate-slow-'));
  failing = new FailingDisk();
  store = await LocalStore.open(directory, { disk: failing.disk });
  catalog = new VdiCatalog(store);
});

afterEach(async () => {
  vi.restoreAllMocks();
  await catalog.close();
  fs.rmSync(directory, { recursive: true, force: true });
});

async function disk(name: string): Promise<Vdi> {
  await catalog.create(name, SIZE, { blockSizeShift: 20 });
  const vdi = await catalog.openVdi(name);
  await vdi.write(0, Buffer.alloc(4 * OBJECT, 1), false);
  return vdi;
}

/** Writes of objects take STALL_MS while `isSlow`. Returns the counts of writes on the loop, and in flight in the pool. */
function slowWrites(): { isSlow: boolean; onLoop: number; inPool: number; mostInPool: number } {
  const state = { isSlow: true, onLoop: 0, inPool: 0, mostInPool: 0 };
  failing.instead({ calls: ['writeSync'], file: /objects/ }, (_, proceed) => {
    state.onLoop++;
    if (state.isSlow) Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, STALL_MS);
    return proceed();
  });
  failing.instead({ calls: ['write'] }, async (_, proceed) => {
    state.mostInPool = Math.max(state.mostInPool, ++state.inPool);
    if (state.isSlow) await delay(STALL_MS);
    return (proceed() as Promise<number>).finally(() => state.inPool--);
  });
  return state;
}

const page = Buffer.alloc(BLOCK, 2);

test('on a slow disk one write at most holds the loop, all others go to the pool, and return when writes are quick again', async () => {
  const vdi = await disk('disk');
  const state = slowWrites();
  for (let n = 0; n < 8; n++) await vdi.write(n * BLOCK, page, false);
  await Promise.all(Array.from({ length: 16 }, async (_, n) => vdi.write(n * BLOCK, page, false)));
  // None, if the machine was busy and an earlier write was slow already.
  expect(state.onLoop).toBeLessThanOrEqual(1);
  const { onLoop } = state;
  // Longer than any pause: without writes nothing shows that the disk is quick again.
  const now = performance.now();
  vi.spyOn(performance, 'now').mockReturnValue(now + 60_000);
  await vdi.write(0, page, false);
  expect(state.onLoop).toBe(onLoop);
  vi.mocked(performance.now).mockRestore();
  state.isSlow = false;
  await waitUntil(async () => {
    await vdi.write(0, page, false);
    return state.onLoop > onLoop;
  }, 'writes on the loop');
  await catalog.release(vdi);
});

test('writes that wait for a slow disk leave threads to others, and one disk leaves some to another', async () => {
  const [one, other] = [await disk('one'), await disk('other')];
  const state = slowWrites();
  await one.write(0, page, false);
  // While they are in flight: how many of them the pool has, and that another disk's write is not behind all of them.
  const many = Array.from({ length: 24 }, async (_, n) => one.write(n * BLOCK, page, false));
  await waitUntil(() => state.inPool > 0, 'writes in the pool');
  let done = 0;
  for (const each of many) void each.then(() => done++);
  await other.write(0, page, false);
  expect(done).toBeLessThan(many.length / 2);
  await Promise.all(many);
  const threads = Number(process.env.UV_THREADPOOL_SIZE) || 4;
  expect(state.mostInPool).toBeLessThanOrEqual(Math.max(1, Math.floor(threads / 3)));
  for (const vdi of [one, other]) await catalog.release(vdi);
});

test('clones of one image are several disks: one that reads much leaves threads to another', async () => {
  await catalog.release(await disk('image'));
  await catalog.snapshot('image', 's');
  for (const name of ['greedy', 'other']) await catalog.clone('image@s', name);
  const [greedy, other] = [await catalog.openVdi('greedy'), await catalog.openVdi('other')];
  failing.instead({ calls: ['read'] }, (_, proceed) => delay(STALL_MS / 3).then(proceed));
  const isNotCached = failing.instead({ calls: ['readCachedSync', 'readSync'], file: /objects/ }, () => 0);
  const parts = (): Buffer => Buffer.alloc(2 * OBJECT);
  let done = 0;
  const many = Array.from({ length: 48 }, async () => {
    await greedy.read(0, parts());
    done++;
  });
  await other.read(0, parts());
  expect(done).toBeLessThan(many.length / 2);
  await Promise.all(many);
  isNotCached.off();
  for (const vdi of [greedy, other]) await catalog.release(vdi);
});

test('syncs, removals, copies and look-ups all give their threads back', async () => {
  const vdi = await disk('disk');
  await vdi.flush();
  await catalog.snapshot('disk', 's');
  await Promise.all(Array.from({ length: 16 }, async (_, n) => vdi.write(n * OBJECT + BLOCK, page, false)));
  await vdi.zero(BLOCK / 2, BLOCK, { noHole: false, fua: true });
  await vdi.extents(0, SIZE, () => true);
  await vdi.cache(0, SIZE);
  await vdi.trim(0, SIZE, true);
  await catalog.release(vdi);
  await catalog.remove('disk@s');
  await catalog.remove('disk');
  await store.reclaimed();
  for (const share of [READS, CHANGES, SYNCS, LOOKUPS]) expect(share.busy).toBe(0);
});

test('an object that is opened while its removal waits for a thread is not taken for a new object of the same name', async () => {
  const { objects: files } = store;
  const key = localObjectKey(5, 0);
  await files.create(key, OBJECT, 0, page, undefined);
  const others: symbol[] = [];
  const enter = (): Promise<void> | undefined => CHANGES.enter(others[others.push(Symbol('disk')) - 1]);
  while (enter() === undefined);
  files.remove(key, (error) => expect.fail(String(error)));
  await new Promise((resolve) => setImmediate(resolve));
  await files.read(5, 0, 0, Buffer.alloc(BLOCK)); // by a reader of an older map
  for (const other of others) CHANGES.leave(other);
  await files.removed();
  await files.create(key, OBJECT, 0, page, undefined);
  const objects = path.join(directory, 'objects');
  const made = fs.readdirSync(objects, { recursive: true, encoding: 'utf8' }).filter((name) => name.length > 2);
  const file = path.join(objects, made[0] ?? '');
  expect(made).toHaveLength(1);
  expect(fs.statSync(file).size).toBe(OBJECT);
  expect(fs.readFileSync(file).subarray(0, BLOCK).equals(page)).toBe(true);
});

test('a share of threads is never exceeded, leaves one to a second disk, and is given to disks in turn', async () => {
  const share = new ThreadShare(4);
  const order: string[] = [];
  const enter = (disk: string): void => {
    const turn = share.enter(disk);
    if (turn) void turn.then(() => order.push(disk));
    else order.push(disk);
  };
  for (let n = 0; n < 8; n++) enter('greedy');
  expect(order).toEqual(['greedy', 'greedy', 'greedy']);
  enter('other');
  expect(order).toEqual(['greedy', 'greedy', 'greedy', 'other']);
  enter('other');
  enter('third');
  expect(share.busy).toBe(4);
  share.leave('greedy');
  share.leave('greedy');
  share.leave('greedy');
  await Promise.resolve();
  expect(order.slice(4)).toEqual(['greedy', 'other', 'third']);
  expect(share.busy).toBe(4);
});

test('a stall soon after writes have returned to the loop keeps them off it for longer each time', () => {
  let now = 1000;
  vi.spyOn(performance, 'now').mockImplementation(() => now);
  const throttle = new WriteThrottle();
  const write = (took: number): void => {
    const start = now;
    now += took;
    throttle.note(start);
  };
  const pauses: number[] = [];
  for (let n = 0; n < 8; n++) {
    write(200);
    const stalledAt = now;
    while (!throttle.mayWrite()) {
      const start = now;
      now += 1;
      throttle.noteOffLoop(start);
    }
    pauses.push(now - stalledAt);
  }
  expect(pauses).toEqual([200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
  now += 60_000;
  write(200);
  expect(throttle.mayWrite()).toBe(false);
  for (let n = 0; n < 20; n++) throttle.noteOffLoop(now);
  now += 200;
  expect(throttle.mayWrite()).toBe(true);
});

describe('the log of map changes, written off the loop', () => {
  const slow = { mayWrite: () => false, note: () => undefined, noteOffLoop: () => undefined };
  const errors: unknown[] = [];
  let logs: MapLogs;

  beforeEach(() => {
    const place = temporaryDirectory();
    makeLogFolder(failing.disk, place);
    errors.length = 0;
    logs = new MapLogs(failing.disk, place, (error) => errors.push(error), slow as unknown as WriteThrottle);
  });

  /** What a start after a kill would apply: [vid, idx, owner]. */
  function logged(flushed = 0): number[][] {
    const record = (vid: number): VdiRecord => ({ vid, name: 'disk', isSnapshot: vid === 1 }) as VdiRecord;
    const { changes, doubtful } = logs.read(logs.session, { record, flushedGeneration: () => flushed });
    expect(doubtful).toEqual([]);
    return changes.map(({ vid, idx, value }) => [vid, idx, value]);
  }

  test('has all entries in order when they are answered, across a snapshot and several files', async () => {
    const log = logs.logOf(1, 1);
    const answers = [log.changed(0, 1)];
    log.moved(2, 1);
    const expected: number[][] = [];
    const change = (idx: number, owner: number): void => {
      answers.push(log.changed(idx, owner));
      expected.push([2, idx, owner]);
    };
    for (let round = 0; round < 4; round++) {
      for (let idx = 0; idx < 3000; idx++) change(idx, 2 + round);
      log.flushing(2 + round);
      if (round % 2 === 0) await answers.at(-1);
      change(round, 9);
    }
    await Promise.all(answers.map(async (each) => each));
    expect(logged()).toEqual(expected);
    const done = log.flushing(7);
    await log.changed(5, 2);
    done();
    expect(logged(6)).toEqual([[2, 5, 2]]);
    log.remove();
    expect(logged()).toEqual([]);
  });

  test('is removed if it cannot be written, and begins again after a successful flush, with the changes since that flush began', async () => {
    const log = logs.logOf(2, 1);
    await log.changed(0, 2);
    const full = failing.instead({ calls: ['write'], times: 1 }, async ({ name }) => {
      await new Promise((resolve) => setImmediate(resolve));
      log.flushing(2);
      throw systemError('ENOSPC', name);
    });
    const failed = log.changed(1, 2);
    await waitUntil(() => full.count > 0, 'the write that fails');
    await failed;
    await log.changed(2, 2);
    expect(errors).toHaveLength(1);
    expect(logged()).toEqual([]);
    const isFlushed = log.flushing(3);
    await log.changed(3, 2);
    expect(logged(2)).toEqual([]);
    isFlushed();
    await log.changed(4, 2);
    expect(logged(2)).toEqual([
      [2, 3, 2],
      [2, 4, 2],
    ]);
    log.remove();
  });
});

needs('gcc')('what was answered while the disk was slow, and never flushed, is there after SIGKILL', async () => {
  const library = path.join(temporaryDirectory(), 'slow-disk.so');
  const source = path.join(import.meta.dirname, '../../bench/slow-disk.c');
  await ok('gcc', ['-O2', '-shared', '-fPIC', source, '-o', library, '-ldl']);
  const served = path.join(temporaryDirectory(), 'store');
  const count = 12;
  expect((await cli(['vdi', 'create', 'disk', `${count}M`, '--block-size-shift', '20'], { store: served })).code).toBe(
    0,
  );
  const model = Buffer.alloc(count * OBJECT);
  const env = { LD_PRELOAD: library, SLOW_DISK: fs.realpathSync(served), SLOW_WRITE_MS: `${STALL_MS}` };
  for (let round = 1; round <= 2; round++) {
    const daemon = await startDaemon({ store: served, env });
    const client = await NbdClient.connect({ path: daemon.socket });
    await client.go('disk');
    expect((await client.read(0, model.length)).equals(model), `before round ${round}`).toBe(true);
    const write = async (idx: number, fill: number): Promise<void> => {
      await client.write(idx * OBJECT + BLOCK, Buffer.alloc(BLOCK, fill));
      model.fill(fill, idx * OBJECT + BLOCK, idx * OBJECT + 2 * BLOCK);
    };
    const indexes = Array.from({ length: count / 2 }, (_, n) => 2 * n);
    await Promise.all(indexes.map((idx) => write(idx, 16 * round + 1)));
    expect((await cli(['vdi', 'snapshot', 'disk', `s${round}`], { store: served })).stderr).toBe('');
    await Promise.all(indexes.map((idx) => write(idx + (idx % 4 === 0 ? 1 : 0), 16 * round + 2)));
    await Promise.all([4, 6, 10].map((idx) => client.zero(idx * OBJECT, OBJECT)));
    for (const idx of [4, 6, 10]) model.fill(0, idx * OBJECT, (idx + 1) * OBJECT);
    await write(6, 16 * round + 3);
    await daemon.kill();
    await client.disconnect().catch(() => undefined);
  }
  const daemon = await startDaemon({ store: served });
  const client = await NbdClient.connect({ path: daemon.socket });
  await client.go('disk');
  expect((await client.read(0, model.length)).equals(model)).toBe(true);
  await client.disconnect();
  await daemon.stop();
  const check = await cli(['check', '--json'], { store: served });
  expect(JSON.parse(check.stdout)).toMatchObject({ problems: [] });
});
