/**
 * Nodes that were stopped or cut off, that the others have dropped meanwhile, and that answer before they learn of it: their
 * answers are not used. And nodes that are silent, slow or not ready: which requests do not wait for them.
 */
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { SheepStore, type SheepStoreOptions } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import type { Vdi } from '../../src/vdi/vdi.js';
import { waitUntil } from '../harness/daemon.js';
import { Op, StandIn, type Seen, type StandInOptions } from './stand-in.js';

const SHIFT = 20;
const OBJECT = 2 ** SHIFT;
const OBJECTS = 24;
const BLOCK = 4096;

let cluster: StandIn;
let store: SheepStore;
let catalog: VdiCatalog;
let vdi: Vdi;
let log: string[];

async function connect(standIn: StandInOptions = {}, options: SheepStoreOptions = {}): Promise<void> {
  cluster = await new StandIn({ jitterMs: 0, ...standIn }).start();
  log = [];
  store = await SheepStore.open(cluster.address, { retryMs: 10_000, log: (line) => log.push(line), ...options });
  catalog = new VdiCatalog(store);
  await catalog.create('disk', OBJECTS * OBJECT, { blockSizeShift: SHIFT });
  vdi = await catalog.openVdi('disk');
}

afterEach(async () => {
  cluster.fault = () => undefined;
  for (const n of cluster.ports.keys()) cluster.dropped.rejoin(n);
  cluster.starting.clear();
  await catalog.close();
  await cluster.stop();
});

const write = async (idx: number, fill: number): Promise<void> =>
  vdi.write(idx * OBJECT, Buffer.alloc(BLOCK, fill), false);
const read = async (idx: number): Promise<number> => {
  const into = Buffer.alloc(BLOCK);
  await vdi.read(idx * OBJECT, into);
  return into[0] as number;
};
/** Reads in an order that starts no read-ahead. */
async function readAll(): Promise<Set<number>> {
  const found = new Set<number>();
  for (let n = 0; n < OBJECTS; n++) found.add(await read((n * 7) % OBJECTS));
  return found;
}
const readsOf = (node: number): Seen[] =>
  cluster.seen.filter((request) => request.opcode === Op.READ && request.node === node);

/** The first is the node in use; reads also go to the others. */
async function writeAll(): Promise<void> {
  for (let idx = 0; idx < OBJECTS; idx++) await write(idx, 1);
  await waitUntil(async () => {
    cluster.seen.length = 0;
    await readAll();
    return readsOf(1).length > 0 && readsOf(2).length > 0;
  }, 'reads are spread over all nodes');
}

describe('a dropped node that does not know it yet', () => {
  beforeEach(async () => {
    await connect({}, { attemptMs: 1_000 });
    await writeAll();
  });

  test('is not used for a direct read of an object that it keeps', async () => {
    cluster.dropped.drop(1);
    for (let idx = 0; idx < OBJECTS; idx++) await write(idx, 2);
    expect(await readAll()).toEqual(new Set([2]));
  });

  test('is not used if it learns that it was dropped between reading its stale copy and answering', async () => {
    cluster.dropped.drop(1);
    for (let idx = 0; idx < OBJECTS; idx++) await write(idx, 2);
    cluster.fault = ({ opcode, node }) => {
      if (opcode !== Op.READ || node !== 1) return undefined;
      setTimeout(() => cluster.dropped.rejoin(1), 30);
      return { answerDelayMs: 100 };
    };
    expect(await readAll()).toEqual(new Set([2]));
  });

  test('is given up as the node in use, and requests go to another node', async () => {
    cluster.dropped.drop(0);
    const theirs = await otherGateway(1);
    await theirs.create('new', OBJECT);
    // The new epoch was seen on another node.
    await waitUntil(async () => (await readAll(), store.cluster.recovery.epoch === 2), 'the change is known');
    expect((await catalog.list()).map(({ name }) => name)).toEqual(['disk', 'new']);
    const other = await theirs.openVdi('disk');
    await other.write(3 * OBJECT, Buffer.alloc(BLOCK, 9), false);
    expect(await read(3)).toBe(9);
    await write(3, 4);
    expect(await read(3)).toBe(4);
    expect(log.join('\n')).toMatch(/leaving the Sheepdog node .*: it (does not know|does not answer)/);
    await theirs.close();
  });
});

async function otherGateway(node: number): Promise<VdiCatalog> {
  return new VdiCatalog(await SheepStore.open(cluster.addressOf(node), { retryMs: 10_000 }));
}

test('a later epoch is given up if all nodes keep saying an earlier one: it came from a node that had lost the others', async () => {
  await connect();
  await write(0, 1);
  cluster.epoch = 9;
  await store.info();
  await waitUntil(() => store.cluster.recovery.isSteady, 'it is steady');
  cluster.epoch = 5;
  expect(await read(0)).toBe(1);
  expect(store.cluster.recovery.epoch).toBe(5);
});

describe('a node that has just started', () => {
  test('is asked for the vids in use once it has them from the others', async () => {
    await connect();
    const [, port] = cluster.ports;
    cluster.starting.add(1);
    await cluster.stopNode(1);
    await cluster.startNode(1, port as number);
    const theirs = await otherGateway(1);
    const listed = theirs.list();
    await waitUntil(
      () => cluster.seen.some(({ opcode, node }) => opcode === Op.GET_VDI_INFO && node === 1),
      'it is asked for a name',
    );
    cluster.starting.delete(1);
    expect((await listed).map(({ name }) => name)).toEqual(['disk']);
    await theirs.close();
  });

  test('and waits to join its cluster is used only if no other node serves', async () => {
    await connect();
    cluster.notJoined.add(0);
    const opened = await SheepStore.open(cluster.address, { retryMs: 10_000, log: (line) => log.push(line) });
    const since = cluster.seen.length;
    expect(await opened.catalog.list()).toHaveLength(1);
    expect(cluster.seen.slice(since).every(({ node }) => node !== 0)).toBe(true);
    await opened.close();
    // The node in use is given up when it does not serve any more.
    await write(0, 7);
    expect(log.join('\n')).toMatch(/leaving the Sheepdog node .*WAIT_FOR_JOIN/);
    cluster.notJoined.clear();
  });
});

test('closing a disk does not make other requests to a slow node fail', async () => {
  await connect();
  await write(0, 1);
  await catalog.create('other', OBJECT, { blockSizeShift: SHIFT });
  const other = await catalog.openVdi('other');
  await other.write(0, Buffer.alloc(BLOCK, 1), false);
  const inode = (1n << 63n) | (BigInt(vdi.record.vid) << 32n);
  let go: () => void = () => undefined;
  const until = new Promise<void>((resolve) => (go = resolve));
  // The looks at the disk, and writes at the same time.
  cluster.fault = ({ opcode, oid, length }) =>
    (opcode === Op.READ && oid === inode) || (opcode === Op.WRITE && length === BLOCK) ? { until } : undefined;
  const since = cluster.seen.length;
  const writes = 8;
  const writing = Promise.all(
    Array.from({ length: writes }, async (_, n) => other.write(n * 4 * BLOCK, Buffer.alloc(BLOCK, 2), false)),
  );
  await store.open.get(vdi.record.vid)?.close();
  expect(log.join('\n')).toContain('was closed, and the nodes could not be asked');
  go();
  await writing;
  expect(cluster.seen.slice(since).filter(({ opcode }) => opcode === Op.WRITE)).toHaveLength(writes);
});

test('a silent member is awaited once while objects settle, not for each object', async () => {
  await connect();
  for (let idx = 0; idx < 6; idx++) await write(idx, 1);
  let go: () => void = () => undefined;
  const until = new Promise<void>((resolve) => (go = resolve));
  cluster.fault = ({ node }) => (node === 2 ? { until } : undefined);
  cluster.recovering.add(1);
  cluster.epoch++;
  await store.info();
  await write(0, 2);
  const begun = performance.now();
  for (let idx = 1; idx < 6; idx++) await write(idx, 2);
  expect(performance.now() - begun).toBeLessThan(5_000);
  const asked = cluster.seen.filter(({ opcode, node }) => opcode === Op.EXIST && node === 2);
  expect(asked.length).toBeLessThan(6);
  go();
  cluster.fault = () => undefined;
  // It is asked again once it has answered.
  await waitUntil(async () => {
    cluster.seen.length = 0;
    cluster.epoch++;
    await store.info();
    await write(0, 3);
    return cluster.seen.some(({ opcode, node }) => opcode === Op.EXIST && node === 2);
  }, 'it is asked again');
});
