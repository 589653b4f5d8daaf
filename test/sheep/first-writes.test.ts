/** First writes to objects that a snapshot shares, against the stand-in: which are copied, and that no data are lost or mixed up. */
import { afterEach, beforeEach, expect, test } from 'vitest';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import type { Vdi } from '../../src/vdi/vdi.js';
import { Op, Res, StandIn, type Seen } from './stand-in.js';

const SHIFT = 22;
const OBJECT = 2 ** SHIFT;
const OBJECTS = 4;
const MIB = 2 ** 20;
/** SD_FLAG_CMD_COW. */
const COW = 2;

let cluster: StandIn;
let catalog: VdiCatalog;
let vdi: Vdi;

beforeEach(async () => {
  cluster = await new StandIn().start();
  catalog = new VdiCatalog(await SheepStore.open(cluster.address, { retryMs: 10_000 }));
  await catalog.create('disk', OBJECTS * OBJECT, { blockSizeShift: SHIFT });
  vdi = await catalog.openVdi('disk');
  await vdi.write(0, Buffer.alloc(OBJECTS * OBJECT, 0x11), false);
  await catalog.snapshot('disk', 'before');
  cluster.seen.length = 0;
});

afterEach(async () => {
  cluster.fault = () => undefined;
  await catalog.close();
  await cluster.stop();
});

const isData = ({ oid }: Seen): boolean => oid < 1n << 56n;
const copies = (): number =>
  cluster.seen.filter((seen) => isData(seen) && seen.opcode === Op.CREATE && (seen.flags & COW) !== 0).length;

function mib(at: number, fill: number, into: Vdi = vdi): Promise<void> {
  return Promise.resolve(into.write(at * MIB, Buffer.alloc(MIB, fill), false));
}

async function contents(name = 'disk'): Promise<number[]> {
  const open = await catalog.openVdi(name);
  const data = Buffer.alloc(OBJECTS * OBJECT);
  await open.read(0, data);
  await catalog.release(open);
  const fills: number[] = [];
  for (let at = 0; at < data.length; at += MIB) {
    const part = data.subarray(at, at + MIB);
    expect(part.every((byte) => byte === part[0])).toBe(true);
    fills.push(part[0] as number);
  }
  return fills;
}

const OLD = 0x11;

test('overwriting a disk in order, four requests at a time, copies no object', async () => {
  for (let at = 0; at < 16; at += 4) {
    await Promise.all([0, 1, 2, 3].map((n) => mib(at + n, at + n + 1)));
  }
  expect(copies()).toBe(0);
  expect(await contents()).toEqual(Array.from({ length: 16 }, (_, n) => n + 1));
  expect(await contents('disk@before')).toEqual(Array<number>(16).fill(OLD));
});

test('objects that are not overwritten whole are copied', async () => {
  await Promise.all([mib(0, 1), mib(1, 2), mib(5, 3), mib(6, 4)]);
  expect(copies()).toBe(2);
  expect(await contents()).toEqual([1, 2, OLD, OLD, OLD, 3, 4, ...Array<number>(9).fill(OLD)]);
});

test('a client with one write at a time is not delayed at each object', async () => {
  let waits = 0;
  const { setTimeout: real } = globalThis;
  // The wait itself is 3 ms: it is counted, not timed.
  globalThis.setTimeout = ((work: () => void, ms?: number) => {
    if (ms === 3) waits++;
    return real(work, ms);
  }) as typeof setTimeout;
  try {
    for (let at = 0; at < 16; at++) await mib(at, at + 1);
  } finally {
    globalThis.setTimeout = real;
  }
  expect(waits).toBe(1);
  expect(copies()).toBe(4);
  expect(await contents()).toEqual(Array.from({ length: 16 }, (_, n) => n + 1));
});

test('writes to the same bytes are done in the order of their arrival', async () => {
  await Promise.all([mib(0, 1), mib(1, 2), mib(0, 3), mib(1, 4), mib(2, 5), mib(3, 6)]);
  expect((await contents()).slice(0, 4)).toEqual([3, 4, 5, 6]);
});

test('an error fails all gathered writes, and the disk is unchanged', async () => {
  cluster.fault = ({ opcode, oid }) => (opcode === Op.CREATE && oid < 1n << 56n ? { result: Res.NO_SPACE } : undefined);
  const results = await Promise.allSettled([0, 1, 2, 3].map((n) => mib(n, n + 1)));
  expect(results.map((result) => ((result as PromiseRejectedResult).reason as { code: string }).code)).toEqual(
    Array(4).fill('NO_SPACE'),
  );
  cluster.fault = () => undefined;
  expect(await contents()).toEqual(Array<number>(16).fill(OLD));
  await Promise.all([0, 1, 2, 3].map((n) => mib(n, n + 1)));
  expect((await contents()).slice(0, 4)).toEqual([1, 2, 3, 4]);
});

test("another client's snapshot has all gathered writes or none, and no object is left over", async () => {
  const other = new VdiCatalog(await SheepStore.open(cluster.address, { retryMs: 10_000 }));
  let taken: Promise<unknown> | undefined;
  // The first piece has arrived, the others have not.
  cluster.fault = ({ opcode, oid, offset }) => {
    if (taken === undefined && opcode === Op.WRITE && oid < 1n << 56n && offset > 0) {
      taken = other.snapshot('disk', 'between');
      return { answerDelayMs: 200 };
    }
    return undefined;
  };
  await Promise.all([0, 1, 2, 3].map((n) => mib(n, n + 1)));
  await taken;
  expect((await contents()).slice(0, 4)).toEqual([1, 2, 3, 4]);
  const between = (await contents('disk@between')).slice(0, 4);
  expect([[OLD, OLD, OLD, OLD].join(), [1, 2, 3, 4].join()]).toContain(between.join());
  await other.close();
  await catalog.release(vdi);
  const report = await catalog.check({ repair: false });
  expect(report.problems).toEqual([]);
  expect(report.orphans).toBe(0);
  expect(cluster.violations).toEqual([]);
});
