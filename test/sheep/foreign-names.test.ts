/** VDIs and snapshots that other tools have made in a cluster, with names and tags that Sheepgate does not allow. */
import type { Geometry, Peer } from 'nbd-server-ts';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { DirectOperations } from '../../src/operations/direct-operations.js';
import { VdiExports } from '../../src/export/vdi-exports.js';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { startStandIn, type TestCluster } from './clusters.js';
import { temporaryDirectory } from '../harness/daemon.js';

const PEER: Peer = { transport: 'unix', address: '/run/nbd.sock' };
const SHIFT = 20;
const SIZE = 8 * 2 ** SHIFT;

let cluster: TestCluster;
let store: SheepStore;
let catalog: VdiCatalog;
let exports: VdiExports;

beforeAll(async () => {
  cluster = await startStandIn();
  store = await SheepStore.open(cluster.address, { stateDirectory: temporaryDirectory() });
  catalog = new VdiCatalog(store);
  exports = new VdiExports(catalog);
});
afterAll(async () => {
  await catalog.close();
  await cluster.stop();
});

async function fill(name: string, byte: number): Promise<void> {
  const { device } = await exports.open(name, PEER);
  await device.write(0, Buffer.alloc(4096, byte), false);
  await device.close('disconnect');
}

/** The first byte, and the properties of the export. */
async function look(name: string): Promise<{ byte: number | undefined; name: string; geometry: Geometry }> {
  const described = await exports.describe(name, PEER);
  const { device, info } = await exports.open(name, PEER);
  const into = Buffer.alloc(1);
  await device.read(0, into);
  const { geometry } = device;
  await device.close('disconnect');
  expect(described.geometry).toEqual(geometry);
  expect(described.info.name).toBe(info.name);
  return { byte: into[0], name: info.name, geometry };
}

test('a VDI with a slash in its name and snapshots with a slash in their tags are listed, opened, cloned and deleted', async () => {
  await store.catalog.create('a/b', SIZE, SHIFT);
  await fill('@=a%2Fb', 1);
  await cluster.snapshot('a/b', 'x/y');
  await fill('@=a%2Fb', 2);
  await cluster.snapshot('a/b', 'p@q');
  await fill('@=a%2Fb', 3);

  const listed = [...(await exports.list(PEER))].map(({ name }) => name);
  expect(listed).toEqual(['@=a%2Fb@x%2Fy', '@=a%2Fb@p%40q', '@=a%2Fb']);
  const looked = [];
  for (const name of listed) looked.push(await look(name));
  expect(looked.map(({ byte }) => byte)).toEqual([1, 2, 3]);
  expect(looked.map(({ geometry }) => geometry.readOnly)).toEqual([true, true, false]);
  expect(looked.map(({ name }) => name)).toEqual(listed);

  // By id: the same data under a lasting name, read-only, as this vid may be a snapshot tomorrow.
  const records = await catalog.list();
  for (const [n, { vid }] of records.entries()) {
    const byId = await look(`@${vid.toString(16)}`);
    expect(byId).toMatchObject({ byte: n + 1, name: listed[n], geometry: { readOnly: true } });
  }
  const ofNow = await look('@=a%2Fb@now:nightly/since=x%2Fy');
  expect(ofNow).toMatchObject({ byte: 3, name: '@=a%2Fb@now:nightly/since=x%2Fy' });
  expect(ofNow.geometry.contexts).toEqual(['base:allocation', 'sheepgate:changed:x/y', 'qemu:dirty-bitmap:x/y']);

  const operations = new DirectOperations(catalog, exports);
  expect((await operations.listDetails()).map(({ name, tag }) => [name, tag])).toEqual([
    ['a/b', 'x/y'],
    ['a/b', 'p@q'],
    ['a/b', ''],
  ]);
  expect(await catalog.snapshot('@=a%2Fb', 'ours')).toMatchObject({ name: 'a/b', tag: 'ours' });
  expect(await catalog.clone(`@${records[0]?.vid.toString(16)}`, 'plain')).toMatchObject({ name: 'plain' });
  expect((await look('plain')).byte).toBe(1);
  expect(await catalog.rollback('@=a%2Fb@x%2Fy')).toMatchObject({ name: 'a/b', tag: '' });
  expect((await look('@=a%2Fb')).byte).toBe(1);
  await catalog.remove('plain');
  for (const { name } of await exports.list(PEER)) await catalog.remove(name);
  expect(await catalog.list()).toEqual([]);
});

test('the id of a VDI stays with its snapshot, and a temporary snapshot cannot be opened by its id', async () => {
  await catalog.create('vm1', SIZE, { blockSizeShift: SHIFT });
  await fill('vm1', 1);
  const id = `@${(await catalog.find('vm1')).vid.toString(16)}`;
  await catalog.snapshot('vm1', 'monday');
  await fill('vm1', 2);
  expect(await look(id)).toMatchObject({ byte: 1, name: 'vm1@monday' });
  const { device } = await exports.open('vm1@now', PEER);
  const temporary = (await catalog.list()).find(({ tag }) => tag === 'now');
  const byId = `@${temporary?.vid.toString(16)}`;
  await expect(exports.open(byId, PEER)).rejects.toMatchObject({ code: 'UNKNOWN' });
  await expect(catalog.remove(byId)).rejects.toMatchObject({ code: 'NO_VDI' });
  await expect(catalog.find('@ffffff')).rejects.toThrow(/nothing has the id ffffff/);
  await device.close('disconnect');
  expect((await catalog.list()).map(({ tag }) => tag)).toEqual(['monday', '']);
});

test('a snapshot that another tool gave the tag of a temporary one is kept, and named by its id', async () => {
  await catalog.create('vm3', SIZE, { blockSizeShift: SHIFT });
  for (const [n, tag] of ['now', 'now:nightly'].entries()) {
    await fill('vm3', n + 1);
    await cluster.snapshot('vm3', tag);
  }
  await fill('vm3', 3);
  const records = (await catalog.list()).filter(({ name, isSnapshot }) => name === 'vm3' && isSnapshot);
  const ids = records.map(({ vid }) => `@${vid.toString(16)}`);
  // As a daemon does at its start, and when a temporary snapshot ends.
  expect(await catalog.dropLeftovers()).toBe(0);
  for (const tag of ['now', 'now:nightly']) {
    await catalog.dropTemporary('vm3', tag);
    expect(await look(`vm3@${tag}`)).toMatchObject({ byte: 3, name: `vm3@${tag}` });
    await expect(catalog.remove(`vm3@${tag}`)).rejects.toThrow(
      /has no temporary snapshot "now\S*"; another tool has given this tag to @[0-9a-f]+$/,
    );
  }
  const listed = [...(await exports.list(PEER))].map(({ name }) => name).filter((name) => /^@[0-9a-f]|^vm3/.test(name));
  expect(listed).toEqual([...ids, 'vm3']);
  for (const [n, id] of ids.entries()) expect(await look(id)).toMatchObject({ byte: n + 1, name: id });
  const operations = new DirectOperations(catalog, exports);
  const details = (await operations.listDetails()).filter(({ name }) => name === 'vm3');
  expect(details.map(({ tag, vid }) => [tag, vid])).toEqual([
    ...records.map(({ tag, vid }) => [tag, vid]),
    ['', expect.any(Number)],
  ]);
  await catalog.clone(ids[0] ?? '', 'vm3-first');
  expect((await look('vm3-first')).byte).toBe(1);
  await catalog.remove('vm3-first');
  for (const id of ids) await catalog.remove(id);
  expect((await catalog.list()).filter(({ name }) => name === 'vm3')).toHaveLength(1);
});

test('two snapshots with one tag do not block the VDI, cannot be a base, and are opened by their ids', async () => {
  await catalog.create('vm2', SIZE, { blockSizeShift: SHIFT });
  await fill('vm2', 1);
  await cluster.snapshot('vm2', 'twice');
  await fill('vm2', 2);
  await cluster.snapshot('vm2', 'twice');
  await fill('vm2', 3);
  await cluster.snapshot('vm2', 'line\nfeed');
  expect((await look('vm2')).geometry.contexts).toEqual(['base:allocation']);
  await expect(exports.open('vm2/since=twice', PEER)).rejects.toThrow(/several snapshots have this tag/);
  await expect(exports.open('vm2/since=line%0Afeed', PEER)).rejects.toThrow(/control characters/);
  const twice = (await catalog.list()).filter(({ tag }) => tag === 'twice');
  expect(twice).toHaveLength(2);
  for (const [n, { vid }] of twice.entries()) expect((await look(`@${vid.toString(16)}`)).byte).toBe(n + 1);
});
