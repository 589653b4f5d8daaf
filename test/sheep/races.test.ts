/** Operations of one program on a cluster at the same time: none loses, repeats or misses anything because of another. */
import { afterEach, expect, test } from 'vitest';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { Op, StandIn, type StandInOptions } from './stand-in.js';

const OBJECT = 2 ** 22;
const SIZE = 4 * OBJECT;
const BLOCK = 4096;
const TABLE_OFFSET = 4664;
const RETRY_MS = 5_000;

let cluster: StandIn;
let catalog: VdiCatalog;

const open = async (): Promise<VdiCatalog> =>
  new VdiCatalog(await SheepStore.open(cluster.address, { retryMs: RETRY_MS }));

async function start(options: StandInOptions = {}): Promise<void> {
  cluster = await new StandIn({ nodes: 1, jitterMs: 0, ...options }).start();
  catalog = await open();
}

afterEach(async () => {
  cluster.fault = () => undefined;
  await catalog.close().catch(() => undefined);
  await cluster.stop();
});

const count = (...opcodes: number[]): number => cluster.seen.filter(({ opcode }) => opcodes.includes(opcode)).length;

/** Resolves at the next such request. */
async function asked(opcode: number): Promise<void> {
  const before = count(opcode);
  await expect.poll(() => count(opcode), { interval: 1, timeout: RETRY_MS }).toBeGreaterThan(before);
}

test('a disk that is closed while a list follows it to its new vid is read from the cluster at its next open', async () => {
  await start();
  await catalog.create('disk', SIZE);
  const vdi = await catalog.openVdi('disk');
  await vdi.write(0, Buffer.alloc(BLOCK, 1), false);
  cluster.externalSnapshot('disk', 'by-others');
  cluster.fault = ({ opcode }) => (opcode === Op.GET_VDI_INFO ? { answerDelayMs: 300 } : undefined);
  const isAsked = asked(Op.GET_VDI_INFO);
  const listing = catalog.list();
  await isAsked;
  await catalog.release(vdi);
  await listing;
  cluster.fault = () => undefined;

  const other = await open();
  const theirs = await other.openVdi('disk');
  await theirs.write(OBJECT, Buffer.alloc(OBJECT, 7), false);
  await other.release(theirs);
  await other.close();

  const again = await catalog.openVdi('disk');
  await again.write(OBJECT + BLOCK, Buffer.alloc(BLOCK, 9), false);
  const read = Buffer.alloc(BLOCK);
  await again.read(OBJECT, read);
  await catalog.release(again);
  expect(read).toEqual(Buffer.alloc(BLOCK, 7));
});

test('a list during our own snapshot does not take it for a snapshot of another client, and neither fails', async () => {
  await start({ useLock: true });
  await catalog.create('disk', SIZE);
  const vdi = await catalog.openVdi('disk');
  cluster.fault = ({ opcode }) => (opcode === Op.NEW_VDI ? { answerDelayMs: 50 } : undefined);
  let isDone = false as boolean;
  const listing = (async () => {
    while (!isDone) await catalog.list();
  })();
  for (let n = 0; n < 5; n++) await catalog.snapshot('disk', `s${n}`);
  isDone = true;
  await listing;
  await catalog.release(vdi);
  await catalog.release(await catalog.openVdi('disk'));
});

test.each(['deleted', 'rolled back'])(
  'a disk that another client has %s while it is open blocks no other operation',
  async (what) => {
    await start();
    await catalog.create('disk', SIZE);
    await catalog.create('other', SIZE);
    const vdi = await catalog.openVdi('disk');
    await vdi.write(0, Buffer.alloc(BLOCK, 1), false);
    cluster.externalSnapshot('disk', 'first');
    await catalog.list();
    cluster.externalSnapshot('disk', 'second');
    const others = await open();
    if (what === 'deleted') await others.remove('disk');
    else await others.rollback('disk@first');
    await others.close();
    const began = performance.now();
    expect((await catalog.details()).map(({ name, tag }) => `${name}@${tag}`)).toContain('other@');
    expect(performance.now() - began).toBeLessThan(RETRY_MS / 2);
    await expect(catalog.find('disk@second')).resolves.toMatchObject({ isSnapshot: true });
    await expect(Promise.resolve().then(() => vdi.write(0, Buffer.alloc(BLOCK, 2), false))).rejects.toThrow();
    await catalog.release(vdi);
  },
);

test('a list with details fails and names the disk if the table of a disk cannot be read', async () => {
  await start();
  for (const name of ['a', 'b', 'c']) await catalog.create(name, SIZE);
  const { vid } = await catalog.find('b');
  cluster.fault = ({ opcode, oid, offset }) =>
    opcode === Op.READ && Number((oid >> 32n) & 0xffffffn) === vid && offset === TABLE_OFFSET
      ? { result: 3 }
      : undefined;
  await expect(catalog.details()).rejects.toThrow(/what b uses cannot be counted: .*EIO/);
});

test('concurrent lookups of missing names share the answer of the node', async () => {
  await start();
  const before = count(Op.READ_VDIS);
  await Promise.all(Array.from({ length: 100 }, (_, n) => expect(catalog.find(`no-${n}`)).rejects.toThrow(/no VDI/)));
  expect(count(Op.READ_VDIS) - before).toBeLessThan(10);
});

test('opening a cluster succeeds if its first node does not answer', async () => {
  cluster = await new StandIn({ nodes: 2 }).start();
  let resume = (): void => undefined;
  const resumed = new Promise<void>((resolve) => (resume = resolve));
  cluster.fault = ({ node }) => (node === 0 ? { until: resumed } : undefined);
  catalog = new VdiCatalog(await SheepStore.open(cluster.address));
  resume();
});

test('a node that answers slowly when an idle disk is checked is not given up, and other requests to it continue', async () => {
  await start({ nodes: 2, useLock: true });
  const lines: string[] = [];
  await catalog.create('idle', 2 ** 22);
  const store = await SheepStore.open(cluster.address, { retryMs: RETRY_MS, log: (line) => lines.push(line) });
  const other = new VdiCatalog(store);
  await other.openVdi('idle');
  cluster.fault = ({ opcode, oid }) => (opcode === Op.READ && oid >> 63n === 1n ? { delayMs: 1_500 } : undefined);
  await asked(Op.READ);
  const looks = count(Op.READ);
  // The next check of the disk begins when this one is over.
  await expect.poll(() => count(Op.READ), { interval: 20, timeout: RETRY_MS }).toBeGreaterThan(looks);
  cluster.fault = () => undefined;
  expect(lines).toEqual([]);
  await other.close();
});
