/** What is asked of a cluster while something else of ours is under way there: nothing is lost, doubled or left out. */
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

/** Resolves when the node is asked this once more. */
async function asked(opcode: number): Promise<void> {
  const before = count(opcode);
  await expect.poll(() => count(opcode), { interval: 1, timeout: RETRY_MS }).toBeGreaterThan(before);
}

test('a disk that is closed while a list follows it to its new vid is opened from the cluster again', async () => {
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

test('a list while we take a snapshot takes it for nobody else’s, and neither fails', async () => {
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
  'a disk that somebody else has %s while it is open is in nobody’s way',
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

test('details do not leave out a disk whose table cannot be read: they fail, and name it', async () => {
  await start();
  for (const name of ['a', 'b', 'c']) await catalog.create(name, SIZE);
  const { vid } = await catalog.find('b');
  cluster.fault = ({ opcode, oid, offset }) =>
    opcode === Op.READ && Number((oid >> 32n) & 0xffffffn) === vid && offset === TABLE_OFFSET
      ? { result: 3 }
      : undefined;
  await expect(catalog.details()).rejects.toThrow(/what b uses cannot be counted: .*EIO/);
});

test('many who ask at once for what is not there share what the node says', async () => {
  await start();
  const before = count(Op.READ_VDIS);
  await Promise.all(Array.from({ length: 100 }, (_, n) => expect(catalog.find(`no-${n}`)).rejects.toThrow(/no VDI/)));
  expect(count(Op.READ_VDIS) - before).toBeLessThan(10);
});

test('a first node that is silent does not keep others from being asked at the first contact', async () => {
  cluster = await new StandIn({ nodes: 2 }).start();
  let resume = (): void => undefined;
  const resumed = new Promise<void>((resolve) => (resume = resolve));
  cluster.fault = ({ node }) => (node === 0 ? { until: resumed } : undefined);
  catalog = new VdiCatalog(await SheepStore.open(cluster.address));
  resume();
});

test('a node that is slow with the look at an idle disk is not taken for silent: what others asked goes on', async () => {
  await start({ nodes: 2, useLock: true });
  const lines: string[] = [];
  await catalog.create('idle', 2 ** 22);
  const store = await SheepStore.open(cluster.address, { retryMs: RETRY_MS, log: (line) => lines.push(line) });
  const other = new VdiCatalog(store);
  await other.openVdi('idle');
  cluster.fault = ({ opcode, oid }) => (opcode === Op.READ && oid >> 63n === 1n ? { delayMs: 1_500 } : undefined);
  await asked(Op.READ);
  const looks = count(Op.READ);
  // The next look comes when this one is over.
  await expect.poll(() => count(Op.READ), { interval: 20, timeout: RETRY_MS }).toBeGreaterThan(looks);
  cluster.fault = () => undefined;
  expect(lines).toEqual([]);
  await other.close();
});
