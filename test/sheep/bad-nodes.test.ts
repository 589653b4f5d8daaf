/**
 * Addresses that accept connections but are no Sheepdog node, among those in --cluster, those used before, and those in the
 * cluster's own list: the client gives them up and uses real nodes.
 */
import { afterEach, beforeEach, expect, test } from 'vitest';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { BADNESSES, BadPort, type Badness } from './bad-nodes.js';
import { until } from './clusters.js';
import { Op, StandIn } from './stand-in.js';

const OBJECT = 2 ** 20;
const BLOCK = 4096;
/** Half of it is spent on a node that does not answer. */
const RETRY_MS = 3_000;

let cluster: StandIn;
const catalogs: VdiCatalog[] = [];
const ports: BadPort[] = [];

async function badPort(badness: Badness | undefined, node?: number): Promise<BadPort> {
  const port = await new BadPort(badness, node).start();
  ports.push(port);
  return port;
}

async function open(addresses: readonly string[], log: string[] = []): Promise<VdiCatalog> {
  const options = { retryMs: RETRY_MS, log: (line: string) => log.push(line) };
  const catalog = new VdiCatalog(await SheepStore.open(addresses.join(','), options));
  catalogs.push(catalog);
  return catalog;
}

beforeEach(async () => {
  cluster = await new StandIn({ nodes: 2 }).start();
});

afterEach(async () => {
  cluster.fault = () => undefined;
  for (const catalog of catalogs.splice(0)) await catalog.close().catch(() => undefined);
  for (const port of ports.splice(0)) await port.stop();
  expect(cluster.violations).toEqual([]);
  await cluster.stop();
});

const good = (n: number): string => `127.0.0.1:${cluster.ports[n]}`;

/** All kinds at the same time: a test mostly waits. */
function withEach(name: string, work: (badness: Badness) => Promise<void>): void {
  test(name, async () => {
    const results = await Promise.allSettled(BADNESSES.map(work));
    const failed = results.map((result) => (result.status === 'rejected' ? String(result.reason) : 'left'));
    expect(Object.fromEntries(BADNESSES.map((badness, n) => [badness, failed[n]]))).toEqual(
      Object.fromEntries(BADNESSES.map((badness) => [badness, 'left'])),
    );
  });
}

withEach('what is named first and is no node is left for the node that is named next', async (badness) => {
  const bad = await badPort(badness);
  const log: string[] = [];
  const opened = await open([bad.address, good(1)], log);
  await opened.create(badness, OBJECT, { blockSizeShift: 20 });
  expect((await opened.named(badness)).map(({ name }) => name)).toEqual([badness]);
  expect(log.find((line) => line.startsWith('now using'))).toContain(bad.address);
});

withEach('what was a node and is none when it is gone back to is left, and no write is in doubt', async (badness) => {
  const turning = await badPort(undefined, cluster.ports[0]);
  const opened = await open([turning.address, good(1)]);
  await opened.create(badness, 4 * OBJECT, { blockSizeShift: 20 });
  const vdi = await opened.openVdi(badness);
  await vdi.write(0, Buffer.alloc(BLOCK, 1), false);
  turning.turn(badness);
  await vdi.write(0, Buffer.alloc(BLOCK, 2), false);
  await vdi.write(OBJECT, Buffer.alloc(BLOCK, 3), false);
  const read = Buffer.alloc(BLOCK);
  await vdi.read(0, read);
  expect(read.equals(Buffer.alloc(BLOCK, 2))).toBe(true);
  await opened.release(vdi);
});

test('the last node in --cluster is found, however many before it do not answer', async () => {
  const silent = [];
  for (let n = 0; n < 5; n++) silent.push((await badPort('silent')).address);
  const catalog = await open([...silent, good(0)]);
  expect(await catalog.list()).toEqual([]);
});

test.each(['closes', 'silent'] as const)('no read goes to a port in the list of nodes that %s', async (badness) => {
  const opened = await open([good(0)]);
  await opened.create('disk', 8 * OBJECT, { blockSizeShift: 20 });
  const vdi = await opened.openVdi('disk');
  await vdi.write(0, Buffer.alloc(8 * OBJECT, 5), false);
  const real = cluster.ports[1] as number;
  const bad = await badPort(badness);
  cluster.ports[1] = bad.port;
  await opened.close();
  const again = await open([good(0)]);
  const same = await again.openVdi('disk');
  const read = Buffer.alloc(BLOCK);
  await until('the port was tried', async () => {
    for (let idx = 0; idx < 8; idx++) await same.read(idx * OBJECT + ((idx * 5) % 8) * BLOCK, read);
    return bad.connections > 0;
  });
  const before = performance.now();
  for (let idx = 7; idx >= 0; idx--) await same.read(idx * OBJECT, read);
  expect(performance.now() - before).toBeLessThan(RETRY_MS / 2);
  expect(read.equals(Buffer.alloc(BLOCK, 5))).toBe(true);
  cluster.ports[1] = real;
});

test('a node that answers the greeting and closes the connection at the next request is given up', async () => {
  cluster.fault = ({ node, opcode }) => (node === 0 && opcode !== Op.GET_NODE_LIST ? { cut: 'before' } : undefined);
  const opened = await open([good(0), good(1)]);
  await opened.create('disk', OBJECT, { blockSizeShift: 20 });
  expect(await opened.list()).toHaveLength(1);
});

test('a node that answers the greeting and then sends garbage is given up', async () => {
  cluster.fault = ({ node, opcode }) => (node === 0 && opcode !== Op.GET_NODE_LIST ? { garbage: true } : undefined);
  const opened = await open([good(0), good(1)]);
  await opened.create('disk', OBJECT, { blockSizeShift: 20 });
  expect(await opened.list()).toHaveLength(1);
});

test('if no address is a node, the error says how each one fails', async () => {
  const errorOf = async (badness: Badness): Promise<string> => {
    const bad = await badPort(badness);
    return open([bad.address]).then(
      () => 'opened',
      (error: unknown) => (error as Error).message.replaceAll(bad.address, 'PORT'),
    );
  };
  const [closes, garbage, silent] = await Promise.all([errorOf('closes'), errorOf('garbage'), errorOf('silent')]);
  expect(closes).toContain('PORT closed the connection; it takes connections, but no Sheepdog node answers there');
  expect(garbage).toContain("PORT does not speak Sheepdog's protocol");
  expect(silent).toContain('PORT answers nothing; it takes connections');
});
