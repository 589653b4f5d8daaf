/**
 * The cost of lookups in a cluster, counted in requests: looking up a name reads no other VDI, and a list reads every inode
 * and every table once. A lookup finds the same as a list, whatever other clients do meanwhile.
 */
import { afterEach, beforeEach, expect, test } from 'vitest';
import { VdiExports } from '../../src/export/vdi-exports.js';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { firstVid } from '../../src/sheepdog/vids-in-use.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { hash, Op, StandIn } from './stand-in.js';

const OBJECT = 2 ** 22;
const SIZE = 4 * OBJECT;
const DISKS = 40;
const PEER = { transport: 'internal', address: 'test' } as const;

let cluster: StandIn;
let catalog: VdiCatalog;

beforeEach(async () => {
  cluster = await new StandIn({ nodes: 1, jitterMs: 0 }).start();
  catalog = new VdiCatalog(await SheepStore.open(cluster.address));
});

afterEach(async () => {
  await catalog.close().catch(() => undefined);
  await cluster.stop();
});

/** The requests that `work` makes, by kind. */
async function requestsOf(work: () => Promise<unknown>): Promise<{ reads: number; bitmaps: number; all: number }> {
  const before = cluster.seen.length;
  await work();
  const seen = cluster.seen.slice(before);
  return {
    reads: seen.filter(({ opcode }) => opcode === Op.READ).length,
    bitmaps: seen.filter(({ opcode }) => opcode === Op.READ_VDIS || opcode === Op.READ_DEL_VDIS).length,
    all: seen.length,
  };
}

test('one disk among many is opened, described, snapshotted and shown without reading the others', async () => {
  for (let n = 0; n < DISKS; n++) await catalog.create(`disk-${n}`, SIZE);
  const exports = new VdiExports(catalog);
  const opening = await requestsOf(async () => catalog.release(await catalog.openVdi('disk-7')));
  expect(opening.reads).toBeLessThan(10);
  const describing = await requestsOf(() => exports.describe('disk-8', PEER));
  expect(describing.reads).toBeLessThan(10);
  expect((await requestsOf(() => catalog.snapshot('disk-9', 's'))).reads).toBeLessThan(20);
  expect((await requestsOf(() => catalog.create('new', SIZE))).reads).toBeLessThan(10);
  expect((await requestsOf(() => catalog.remove('new'))).reads).toBeLessThan(20);
  const { vid } = await catalog.find('disk-9');
  expect((await requestsOf(() => catalog.find(`@${vid.toString(16)}`))).reads).toBeLessThan(10);
});

test('looking up one disk after the other reads the vids in use once in a while, not each time', async () => {
  for (let n = 0; n < DISKS; n++) await catalog.create(`disk-${n}`, SIZE);
  const exports = new VdiExports(catalog);
  const began = performance.now();
  const { bitmaps } = await requestsOf(async () => {
    for (let n = 0; n < DISKS; n++) await exports.describe(`disk-${n}`, PEER);
  });
  const seconds = Math.ceil((performance.now() - began) / 1000);
  expect(bitmaps).toBeLessThanOrEqual(2 * (seconds + 1));
});

test('the details of all disks take a few requests for each, and equal the details of each disk alone', async () => {
  for (let n = 0; n < DISKS; n++) await catalog.create(`disk-${n}`, SIZE);
  const vdi = await catalog.openVdi('disk-3');
  await vdi.write(0, Buffer.alloc(OBJECT, 1), false);
  await vdi.write(OBJECT, Buffer.alloc(OBJECT, 1), false);
  await catalog.snapshot('disk-3', 's');
  await vdi.write(0, Buffer.alloc(OBJECT, 2), false);
  await catalog.release(vdi);
  await catalog.clone('disk-3@s', 'copy');
  let details: Awaited<ReturnType<VdiCatalog['details']>> = [];
  const { all } = await requestsOf(async () => (details = await catalog.details()));
  expect(all).toBeLessThan(4 * (DISKS + 2));
  expect(details).toHaveLength(DISKS + 2);
  for (const name of ['disk-3', 'disk-3@s', 'copy', 'disk-5']) {
    const one = await catalog.show(name);
    expect(details.find(({ vid }) => vid === one.vid)).toEqual(one);
  }
});

test('VDIs that other clients have just created, snapshotted or deleted are found as they are, also after a recent lookup', async () => {
  await catalog.create('disk', SIZE);
  await catalog.find('disk');
  for (let n = 0; n < 3; n++) cluster.externalSnapshot('disk', `by-others-${n}`);
  expect((await catalog.named('disk')).map(({ tag }) => tag)).toEqual([
    'by-others-0',
    'by-others-1',
    'by-others-2',
    '',
  ]);
  expect(await catalog.find('disk@by-others-1')).toMatchObject({ isSnapshot: true });
  await expect(catalog.find('later')).rejects.toThrow(/no VDI named "later"/);
  const other = new VdiCatalog(await SheepStore.open(cluster.address));
  await other.create('later', SIZE);
  expect(await catalog.find('later')).toMatchObject({ name: 'later' });
  await other.remove('later');
  await expect(catalog.find('later')).rejects.toThrow(/no VDI named "later"/);
  await other.close();
});

test('names with the same hash are told apart, and the hash is that of the nodes', async () => {
  const names = ['a', 'disk', 'ünïcode', 'x'.repeat(255)];
  for (const name of names) expect(firstVid(name)).toBe(hash(name));
  // Two names with neighbouring hashes share a run of vids in use.
  const places = new Map<number, string>();
  let pair: [string, string] | undefined;
  for (let n = 0; pair === undefined; n++) {
    const place = firstVid(`n${n}`);
    const other = places.get(place) ?? places.get(place - 1);
    if (other !== undefined) pair = [other, `n${n}`];
    places.set(place, `n${n}`);
  }
  for (const name of pair) await catalog.create(name, SIZE);
  for (const name of pair) await catalog.snapshot(name, 's');
  for (const name of pair) expect((await catalog.named(name)).map(({ tag }) => tag)).toEqual(['s', '']);
});
