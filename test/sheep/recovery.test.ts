/** Changes of a cluster's members: which requests wait for recovery, which are repeated, and which go on. */
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import type { Vdi } from '../../src/vdi/vdi.js';
import { waitUntil } from '../harness/daemon.js';
import { Op, StandIn, type Seen, type StandInOptions } from './stand-in.js';

const SHIFT = 20;
const OBJECT = 2 ** SHIFT;
const BLOCK = 4096;
const RETRY_MS = 30_000;
/** Offsets that are not adjacent: adjacent writes would be merged into one. */
const STEP = 4 * BLOCK;

let cluster: StandIn;
let store: SheepStore;
let catalog: VdiCatalog;
let vdi: Vdi;
let log: string[];

async function connect(options: StandInOptions = {}): Promise<void> {
  cluster = await new StandIn({ jitterMs: 0, ...options }).start();
  cluster.epoch = 1;
  log = [];
  // Object 3 stays a hole.
  store = await SheepStore.open(cluster.address, {
    retryMs: RETRY_MS,
    waitingMs: 500,
    log: (line) => log.push(line),
  });
  catalog = new VdiCatalog(store);
  await catalog.create('disk', 4 * OBJECT, { blockSizeShift: SHIFT });
  vdi = await catalog.openVdi('disk');
  for (let idx = 0; idx < 3; idx++) await write(idx, 0);
}

afterEach(async () => {
  cluster.fault = () => undefined;
  await catalog.close();
  await cluster.stop();
});

const write = async (idx: number, n: number, fill = 1): Promise<void> =>
  vdi.write(idx * OBJECT + n * STEP, Buffer.alloc(BLOCK, fill), false);
const read = async (idx: number, n = 0): Promise<number | undefined> => {
  const into = Buffer.alloc(BLOCK);
  await vdi.read(idx * OBJECT + n * STEP, into);
  return into[0];
};
const oidOf = (idx: number): bigint => (BigInt(vdi.record.vid) << 32n) | BigInt(idx);
/** Reads and non-empty writes of the object since then. */
const seenOf = (idx: number, since = 0): Seen[] =>
  cluster.seen
    .slice(since)
    .filter(
      ({ oid, opcode, length }) => oid === oidOf(idx) && (opcode === Op.READ || (opcode === Op.WRITE && length > 0)),
    );
const isAsked = (idx: number, since: number): boolean =>
  cluster.seen
    .slice(since)
    .some(({ oid, opcode, length }) => oid === oidOf(idx) && opcode === Op.WRITE && length === 0);

/** Node 0 has left and come back, and must fetch these objects; the store has seen the new epoch. */
async function change(...outOfPlace: number[]): Promise<void> {
  for (const idx of outOfPlace) cluster.outOfPlace.add(oidOf(idx));
  cluster.recovering.add(0);
  cluster.epoch++;
  await store.info();
  expect(store.cluster.recovery.isSteady).toBe(false);
}

const isSteady = (): boolean => store.cluster.recovery.isSteady;

describe('while nodes recover', () => {
  beforeEach(() => connect());

  test('requests for an object that is not in its place wait until it has been there for a while', async () => {
    await change(1);
    const since = cluster.seen.length;
    const work = [write(1, 1), write(1, 2), read(1), write(1, 3)];
    await waitUntil(
      () => cluster.seen.slice(since).some(({ opcode, oid }) => opcode === Op.EXIST && oid === oidOf(1)),
      'the nodes are asked for the object',
    );
    expect(seenOf(1, since)).toEqual([]);
    const inPlaceAt = performance.now();
    cluster.outOfPlace.delete(oidOf(1));
    await Promise.all(work);
    expect(performance.now() - inPlaceAt).toBeGreaterThan(200);
    expect(seenOf(1, since).length).toBeGreaterThanOrEqual(4);
  });

  test('a restarted node that has not joined yet is not asked for objects, as that would crash it', async () => {
    let hasJoined = false;
    let questions = 0;
    cluster.fault = ({ opcode, node }) => {
      if (node !== 1 || hasJoined || opcode !== Op.STAT_RECOVERY) return undefined;
      questions++;
      return { result: 0x17 };
    };
    await change(1);
    cluster.outOfPlace.delete(oidOf(1));
    const since = cluster.seen.length;
    const work = write(1, 1, 9);
    await waitUntil(() => questions > 3, 'the node is asked whether it has joined');
    const asked = (): Seen[] => cluster.seen.slice(since).filter(({ opcode }) => opcode === Op.EXIST);
    expect(asked().filter(({ node }) => node === 1)).toEqual([]);
    hasJoined = true;
    await work;
    expect(await read(1, 1)).toBe(9);
    hasJoined = false;
    cluster.fault = ({ opcode, node }) => (node === 1 && opcode === Op.STAT_SHEEP ? { result: 0x17 } : undefined);
    const before = cluster.seen.length;
    expect(await store.cluster.isAnywhere(vdi.record.vid, 3)).toBe(true);
    expect(cluster.seen.slice(before).some(({ opcode }) => opcode === Op.EXIST)).toBe(false);
  });

  test('a question to all nodes is answered by nodes that were not asked since members changed', async () => {
    await store.cluster.isAnywhere(vdi.record.vid, 3); // connects to all nodes
    cluster.epoch++;
    await store.info();
    expect(await store.cluster.isAnywhere(vdi.record.vid, 3)).toBe(false);
  });

  test('an object that recovery is slow to bring is requested once, by an empty write', async () => {
    await change(1);
    const since = cluster.seen.length;
    let asked = 0;
    cluster.fault = ({ oid, opcode, length }) => {
      if (oid !== oidOf(1) || opcode !== Op.WRITE || length > 0) return undefined;
      expect(seenOf(1, since)).toEqual([]);
      asked++;
      cluster.outOfPlace.delete(oid);
      return undefined;
    };
    await Promise.all([write(1, 1, 7), read(1), write(1, 2)]);
    expect(asked).toBe(1);
    expect(await read(1, 1)).toBe(7);
  });

  test('an object that has settled takes several requests at a time', async () => {
    await change();
    await write(1, 0);
    const since = cluster.seen.length;
    let release: () => void = () => undefined;
    const until = new Promise<void>((resolve) => (release = resolve));
    cluster.fault = ({ opcode, length }) => (opcode === Op.WRITE && length > 0 ? { until } : undefined);
    const work = [write(1, 1), write(1, 2), write(1, 3), write(1, 4)];
    await waitUntil(() => seenOf(1, since).length === 4, 'all are in flight');
    release();
    await Promise.all(work);
    expect(isSteady()).toBe(false);
  });

  test('requests go out directly again when the nodes have recovered', async () => {
    await change(1);
    cluster.outOfPlace.clear();
    cluster.recovering.clear();
    await waitUntil(isSteady, 'it is steady');
    const since = cluster.seen.length;
    await Promise.all([write(1, 1), write(2, 1)]);
    expect(isAsked(1, since)).toBe(false);
    expect(cluster.seen.slice(since).map(({ opcode }) => opcode)).toEqual([Op.WRITE, Op.WRITE]);
  });

  test('closing a cluster ends requests that wait for recovery', async () => {
    await change(1);
    const waiting = write(1, 1).then(
      () => 'written',
      (error: unknown) => (error as Error).name,
    );
    await waitUntil(() => cluster.seen.some(({ opcode }) => opcode === Op.EXIST), 'it waits');
    const begun = performance.now();
    store.cluster.pool.close();
    expect(await waiting).toBe('StoreError');
    expect(performance.now() - begun).toBeLessThan(250);
  });

  test('an epoch that only one node has said, and that is not the cluster’s, does not keep the cluster from being steady', async () => {
    cluster.epoch = 9;
    await store.info();
    cluster.epoch = 5;
    await waitUntil(isSteady, 'it is steady');
    expect(store.cluster.recovery.epoch).toBe(5);
    cluster.recovering.add(0);
    cluster.epoch = 6;
    await store.info();
    expect(isSteady()).toBe(false);
  });

  test('the log says which disks wait for recovery', async () => {
    log.length = 0;
    await change(1);
    cluster.fault = ({ oid, opcode, length }) =>
      oid === oidOf(1) && opcode === Op.WRITE && length === 0 ? { result: 0 } : undefined;
    // The members change again and again.
    const flapping = setInterval(() => cluster.epoch++, 100);
    const waiting = write(1, 1);
    try {
      await waitUntil(() => log.some((line) => line.includes('disk') && line.includes('places')), 'it is told');
    } finally {
      clearInterval(flapping);
    }
    cluster.outOfPlace.clear();
    cluster.recovering.clear();
    await waiting;
  });

  test('a new object is created at once, and settles before it is written again', async () => {
    await change();
    const since = cluster.seen.length;
    await write(3, 1);
    expect(cluster.seen.slice(since).filter(({ opcode, oid }) => opcode === Op.EXIST && oid === oidOf(3))).toEqual([]);
    await write(3, 2);
    expect(cluster.seen.slice(since).some(({ opcode, oid }) => opcode === Op.EXIST && oid === oidOf(3))).toBe(true);
  });
});

describe('when the members change', () => {
  beforeEach(() => connect());

  /** The request that matches `isIt` is answered after the change. */
  const changeDuring = (isIt: (request: Seen) => boolean): void => {
    cluster.fault = (request) => {
      if (!isIt(request)) return undefined;
      cluster.fault = () => undefined;
      cluster.epoch++;
      cluster.recovering.add(0);
      return undefined;
    };
  };

  test('a write in flight is repeated after the object has settled, before it is acknowledged', async () => {
    const since = cluster.seen.length;
    changeDuring(({ opcode, oid, length }) => opcode === Op.WRITE && oid === oidOf(1) && length > 0);
    await write(1, 1, 9);
    const [first, second, ...more] = cluster.seen
      .slice(since)
      .filter(({ oid }) => oid === oidOf(1))
      .map(({ opcode }) => opcode)
      .filter((opcode, n, all) => opcode !== Op.EXIST || all[n - 1] !== Op.EXIST);
    expect([first, second, ...more]).toEqual([Op.WRITE, Op.EXIST, Op.WRITE]);
    expect(await read(1, 1)).toBe(9);
  });

  test('a read in flight is repeated', async () => {
    const since = cluster.seen.length;
    changeDuring(({ opcode, oid }) => opcode === Op.READ && oid === oidOf(1));
    expect(await read(1)).toBe(1);
    expect(seenOf(1, since).map(({ opcode }) => opcode)).toEqual([Op.READ, Op.READ]);
  });

  test('a creation in flight is repeated', async () => {
    const since = cluster.seen.length;
    changeDuring(({ opcode, oid }) => opcode === Op.CREATE && oid === oidOf(3));
    await write(3, 1, 5);
    expect(cluster.seen.slice(since).filter(({ opcode }) => opcode === Op.CREATE)).toHaveLength(2);
    expect(await read(3, 1)).toBe(5);
    expect(cluster.violations).toEqual([]);
  });

  test('a creation in flight of an index object of a hyper volume is repeated', async () => {
    const high = 0x0100_0000 + vdi.record.vid;
    const since = cluster.seen.length;
    changeDuring(({ opcode }) => opcode === Op.CREATE);
    await store.cluster.createObject(high, 0, Buffer.alloc(BLOCK, 4));
    expect(cluster.seen.slice(since).filter(({ opcode }) => opcode === Op.CREATE)).toHaveLength(2);
  });

  test('a snapshot of another client while a table entry is written again loses no reference', async () => {
    const inode = (1n << 63n) | (BigInt(vdi.record.vid) << 32n);
    const { vid } = vdi.record;
    changeDuring(({ opcode, oid, length }) => {
      const isIt = opcode === Op.WRITE && oid === inode && length === 4;
      if (!isIt) return false;
      process.nextTick(() => {
        cluster.fault = ({ opcode, oid, offset }) => {
          if (opcode !== Op.WRITE || oid !== inode || offset !== 4660) return undefined;
          cluster.fault = () => undefined;
          cluster.externalSnapshot('disk', 'theirs');
          return undefined;
        };
      });
      return true;
    });
    await write(3, 1, 5);
    expect(vdi.record.vid).not.toBe(vid);
    await catalog.remove('disk@theirs');
    await cluster.settled();
    expect(await read(3, 1)).toBe(5);
    expect(cluster.violations).toEqual([]);
  });

  test('a table entry in flight is written again as plain bytes', async () => {
    const inode = (1n << 63n) | (BigInt(vdi.record.vid) << 32n);
    changeDuring(({ opcode, oid, length }) => opcode === Op.WRITE && oid === inode && length === 4);
    const since = cluster.seen.length;
    await write(3, 1, 5);
    const offsets = cluster.seen
      .slice(since)
      .filter(({ opcode, oid }) => opcode === Op.WRITE && oid === inode)
      .map(({ offset }) => offset);
    // The entry, all of the table beginning in front of it, the entry's count.
    expect(offsets).toEqual([4664 + 4 * 3, 4660, 4_198_968 + 8 * 3]);
    expect(cluster.violations).toEqual([]);
  });

  const TABLE = 4664;
  const inodeOf = (vid: number): bigint => (1n << 63n) | (BigInt(vid) << 32n);
  const inodeWrites = (vid: number, since: number): number[] =>
    cluster.seen
      .slice(since)
      .filter(({ opcode, oid, length }) => opcode === Op.WRITE && oid === inodeOf(vid) && length > 0)
      .map(({ offset }) => offset);

  test('a table entry in flight of a temporary snapshot is written again as plain bytes, after the inode has settled', async () => {
    const open = store.open.get(vdi.record.vid);
    if (!open) throw new Error('it is not open');
    await (await open.prepareTemporary('now')).switchOver();
    const [shadow] = open.shadows;
    const vid = shadow?.vid ?? 0;
    const since = cluster.seen.length;
    changeDuring(({ opcode, oid, length }) => opcode === Op.WRITE && oid === inodeOf(vid) && length === 4);
    await write(1, 1, 5);
    expect(inodeWrites(vid, since)).toEqual([TABLE + 4, TABLE - 4, 4_198_968 + 8]);
    const settled = cluster.seen.slice(since).some(({ opcode, oid }) => opcode === Op.EXIST && oid === inodeOf(vid));
    expect(settled).toBe(true);
    expect(shadow?.map[1]).toBe(vid);
    expect(cluster.violations).toEqual([]);
  });

  test('the clearing in flight of a table entry of a deleted VDI is repeated', async () => {
    const { vid } = vdi.record;
    await catalog.release(vdi);
    const since = cluster.seen.length;
    changeDuring(({ opcode, oid, offset }) => opcode === Op.WRITE && oid === inodeOf(vid) && offset === TABLE);
    await catalog.remove('disk');
    expect(inodeWrites(vid, since)).toEqual([TABLE, TABLE - 4, ...[0, 1, 2].map((idx) => 4_198_968 + 8 * idx)]);
    await cluster.settled();
    expect(cluster.dataObjects()).toEqual([]);
    expect(cluster.violations).toEqual([]);
  });
});

test('while the members do not change, an object takes several writes at a time', async () => {
  await connect();
  const since = cluster.seen.length;
  let release: () => void = () => undefined;
  const until = new Promise<void>((resolve) => (release = resolve));
  cluster.fault = ({ opcode }) => (opcode === Op.WRITE ? { until } : undefined);
  const work = [write(1, 1), write(1, 2), write(1, 3), write(1, 4)];
  await waitUntil(() => seenOf(1, since).length === 4, 'all are in flight');
  release();
  await Promise.all(work);
  expect(cluster.seen.slice(since)).toHaveLength(4);
});

test('a write in doubt blocks only writes to the same bytes', async () => {
  cluster = await new StandIn({ nodes: 1, jitterMs: 0 }).start();
  cluster.epoch = 1;
  store = await SheepStore.open(cluster.address, { retryMs: 500 });
  catalog = new VdiCatalog(store);
  await catalog.create('disk', 4 * OBJECT, { blockSizeShift: SHIFT });
  vdi = await catalog.openVdi('disk');
  await write(1, 0);
  let release: () => void = () => undefined;
  const until = new Promise<void>((resolve) => (release = resolve));
  // Until then the node does nothing, as if stopped.
  let isStopped = true;
  cluster.fault = () => (isStopped ? { until } : undefined);
  await expect(write(1, 1, 2)).rejects.toMatchObject({ name: 'InDoubt' });
  // It answers again, but may still carry out the write: a second has to pass.
  isStopped = false;
  const others = write(1, 2, 3);
  await expect(write(1, 1, 4)).rejects.toThrow('an earlier write to these bytes was given up');
  await others;
  release();
  await waitUntil(
    () =>
      write(1, 1, 5).then(
        () => true,
        () => false,
      ),
    'the bytes are free',
  );
  expect([await read(1, 0), await read(1, 1), await read(1, 2)]).toEqual([1, 5, 3]);
});

describe('erasure-coded objects', () => {
  beforeEach(() => connect({ copyPolicy: 0x11 }));

  test('are left to the nodes’ recovery for longer, as a recovery started by a request may crash a node', async () => {
    await change(1);
    const since = cluster.seen.length;
    const work = write(1, 1, 7);
    // Twice the time after which an object with whole copies is requested.
    const until = performance.now() + 1_000;
    const looks = (): number => cluster.seen.slice(since).filter(({ opcode }) => opcode === Op.EXIST).length;
    await waitUntil(() => looks() > 30 && performance.now() > until, 'the nodes have been asked for a while');
    expect(isAsked(1, since)).toBe(false);
    cluster.outOfPlace.delete(oidOf(1));
    await work;
    expect(await read(1, 1)).toBe(7);
  });

  test('that were written with fewer nodes than strips are rewritten whole when all nodes are back', async () => {
    cluster.left.add(2);
    cluster.epoch++;
    await store.info();
    await waitUntil(isSteady, 'it is steady');
    await write(1, 1, 6);
    const since = cluster.seen.length;
    await write(1, 1, 7);
    await write(2, 1, 7);
    const wholes = (): bigint[] =>
      cluster.seen
        .slice(since)
        .filter(({ opcode, length }) => opcode === Op.CREATE && length === OBJECT)
        .map(({ oid }) => oid);
    expect(wholes()).toEqual([]);
    cluster.left.delete(2);
    cluster.epoch++;
    await store.info();
    await waitUntil(() => log.some((line) => line.includes('all parity is new')), 'the log says that it is done');
    expect(wholes()).toEqual([oidOf(1), oidOf(2)]);
    expect([await read(1, 0), await read(1, 1), await read(2, 1)]).toEqual([1, 7, 7]);
  });

  test('are named in the log if their disk is closed before that, and rewritten when the disk is changed again', async () => {
    cluster.left.add(2);
    cluster.epoch++;
    await store.info();
    await waitUntil(isSteady, 'it is steady');
    await write(1, 1, 6);
    const name = 'disk';
    await store.open.get(vdi.record.vid)?.close();
    expect(log.join()).toContain(`${name} is closed, and 1 of its objects were written while nodes were missing`);
    cluster.left.delete(2);
    cluster.epoch++;
    await store.info();
    await waitUntil(isSteady, 'it is steady again');
    const since = cluster.seen.length;
    const again = await store.catalog.open(vdi.record.vid);
    expect(cluster.seen.slice(since).some(({ opcode }) => opcode === Op.CREATE)).toBe(false);
    await again.writeObject(2, 0, Buffer.alloc(BLOCK));
    await waitUntil(() => log.some((line) => line.includes('all parity is new')), 'the log says that it is done');
    expect(cluster.seen.slice(since).some(({ opcode, oid }) => opcode === Op.CREATE && oid === oidOf(1))).toBe(true);
  });
});
