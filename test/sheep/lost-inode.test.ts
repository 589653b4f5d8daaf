/** A VDI whose inode is lost on all nodes is reported as damaged, and all other VDIs work. */
import fs from 'node:fs';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { zerosForMissing } from '../../src/store/sheep/zeros-for-missing.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { cleanUp, cli, cliJson, startDaemon, temporaryDirectory } from '../harness/daemon.js';
import { hash, StandIn } from './stand-in.js';

const OBJECT = 2 ** 20;
const BLOCK = 4096;
const VDI_BIT = 1n << 63n;
const SHIFT = { blockSizeShift: 20 };

let cluster: StandIn;
let catalog: VdiCatalog;
/** The vid of the working VDI "c", whose snapshot "c@m" exists. */
let lost: number;

async function open(withZeros = false): Promise<VdiCatalog> {
  return new VdiCatalog(
    await SheepStore.open(cluster.address, { retryMs: 5_000, ...(withZeros && zerosForMissing('the cluster')) }),
  );
}

async function startWith(options: ConstructorParameters<typeof StandIn>[0]): Promise<void> {
  cluster = await new StandIn({ nodes: 1, ...options }).start();
  const before = await open();
  for (const name of ['a', 'b', 'c']) {
    await before.create(name, 4 * OBJECT, SHIFT);
    const vdi = await before.openVdi(name);
    await vdi.write(0, Buffer.alloc(BLOCK, name), false);
    await before.release(vdi);
  }
  for (const name of ['b', 'c']) await before.snapshot(name, 'm');
  lost = (await before.find('c')).vid;
  await before.close();
  cluster.loseInode(lost);
  catalog = await open();
}

async function firstBlock(of: VdiCatalog, spec: string): Promise<string> {
  const vdi = await of.openVdi(spec);
  const data = Buffer.alloc(BLOCK);
  await vdi.read(0, data);
  await of.release(vdi);
  return data.toString('latin1', 0, 1);
}

afterEach(async () => {
  await catalog.close();
  await cluster.stop();
  cleanUp();
});

describe.each([
  ['a cluster', {}],
  // Where vids are used again they say nothing of the name, but there is a snapshot without a working VDI.
  ['a cluster that uses vids again', { recyclesVids: true }],
])('%s', (_, options) => {
  beforeEach(() => startWith(options));

  test('all other VDIs are listed, served and written, and the lost VDI is reported with its id', async () => {
    const id = lost.toString(16);
    const names = (await catalog.details()).map(({ name, tag }) => `${name}@${tag}`);
    expect(names).toEqual(['a@', 'b@m', 'b@', 'c@m']);
    expect(await catalog.damaged()).toMatchObject([{ vid: lost, likelyName: 'c', why: 'no node has its inode' }]);
    const { problems, vdis } = await catalog.check({ repair: false });
    expect(problems).toEqual([`damaged: c, probably, id ${id}: no node has its inode`]);
    expect(vdis).toBe(5);

    for (const spec of ['a', 'b', 'b@m', 'c@m']) expect(await firstBlock(catalog, spec)).toBe(spec.slice(0, 1));
    const vdi = await catalog.openVdi('a');
    await vdi.write(OBJECT, Buffer.alloc(BLOCK, 'x'), true);
    await catalog.release(vdi);
    const zeros = await open(true);
    for (const spec of ['a', 'c@m']) expect(await firstBlock(zeros, spec)).toBe(spec.slice(0, 1));
    expect(await zeros.damaged()).toHaveLength(1);
    await zeros.close();

    await expect(catalog.find('c')).rejects.toThrow(
      new RegExp(`id ${id} in .* cannot be read: .*; these can be read: c@m`),
    );
    await expect(catalog.find(`@${id}`)).rejects.toMatchObject({ code: 'DAMAGED' });
    await expect(catalog.find('nobody')).rejects.toMatchObject({ code: 'NO_VDI' });
  });
});

test('on a cluster that does not reuse vids, everything else works', async () => {
  await startWith({});
  await catalog.create('new', OBJECT, SHIFT);
  await catalog.snapshot('a', 'first');
  const { tag, vid } = await catalog.snapshotTemporary('a', 'now');
  await catalog.dropTemporary('a', tag, vid);
  await catalog.clone('c@m', 'd');
  expect(await firstBlock(catalog, 'd')).toBe('c');
  await catalog.rollback('b@m');
  await catalog.remove('a@first');
  await expect(catalog.create('c', OBJECT, SHIFT)).rejects.toMatchObject({ code: 'EXISTS' });
});

test('the name of a VDI that is lost cannot be used for a new one, and the error says why', async () => {
  await startWith({});
  cluster.loseInode((await catalog.find('a')).vid);
  await expect(catalog.create('a', OBJECT, SHIFT)).rejects.toThrow(/to find a name, nodes read the inodes/);
  await expect(catalog.find('a')).rejects.toMatchObject({ code: 'NO_VDI' });
});

test('if nodes cannot find a VDI by name because of the lost inode, the VDI keeps its content', async () => {
  await startWith({ recyclesVids: true });
  // The nodes find only VDIs behind the lost one.
  const behind = (await catalog.list()).filter(({ vid }) => vid < lost);
  expect(behind.length).toBeGreaterThan(0);
  for (const { name, tag } of behind) {
    const spec = tag === '' ? name : `${name}@${tag}`;
    await expect(catalog.remove(spec), spec).rejects.toMatchObject({ code: 'DAMAGED' });
    expect(await firstBlock(catalog, spec), spec).toBe(name);
  }
  await expect(catalog.create('new', OBJECT, SHIFT)).rejects.toMatchObject({ code: 'DAMAGED' });
});

test('the lost inode of a temporary snapshot blocks neither the disk nor another NAME@now', async () => {
  await startWith({});
  const taken = await catalog.snapshotTemporary('a', 'now');
  await catalog.dropTemporary('a', 'now', taken.vid);
  cluster.loseInode(taken.vid);
  expect(await firstBlock(catalog, 'a')).toBe('a');
  const { vid } = await catalog.snapshotTemporary('a', 'now');
  expect(vid).not.toBe(taken.vid);
  await catalog.dropTemporary('a', 'now', vid);
});

test('a hyper volume whose index cannot be read is listed as damaged, and hides no other VDI', async () => {
  await startWith({});
  const inode = cluster.objects.get(VDI_BIT | (BigInt(hash('a')) << 32n));
  // The inode says that an index exists, and none does.
  inode?.set([1], 553);
  inode?.fill(0xff, 4664, 4664 + 64);
  const details = await catalog.details();
  expect(details.map(({ name }) => name)).toEqual(['a', 'b', 'b', 'c']);
  expect(details[0]?.damage).toMatch(/what should be its index is something else/);
  expect((await catalog.check({ repair: false })).problems.join()).toMatch(/damaged: a, id .* is something else/);
});

test('the command line reports the same with and without a daemon, and exports the rest', async () => {
  await startWith({});
  const id = lost.toString(16);
  const at = ['--cluster', cluster.address];
  const image = path.join(temporaryDirectory(), 'c.img');
  expect(await cli(['export', 'c@m', image, '--missing=zero', ...at])).toMatchObject({ code: 0 });
  expect(fs.readFileSync(image, 'latin1')[0]).toBe('c');
  type Listed = readonly { readonly vid: number; readonly damage?: string }[];
  const damagedIn = async (...more: string[]): Promise<Listed> =>
    (await cliJson<Listed>(['vdi', 'list', ...at, ...more])).filter(({ damage }) => damage !== undefined);
  const direct = await damagedIn();
  expect(direct).toMatchObject([{ vid: lost, name: null, likelyName: 'c', damage: 'no node has its inode' }]);
  const daemon = await startDaemon({ cluster: cluster.address });
  const served = ['--control', daemon.control];
  expect(await damagedIn(...served)).toEqual(direct);
  const { stdout } = await cli(['vdi', 'list', ...at, ...served]);
  expect(stdout).toMatch(new RegExp(`\\(c\\?\\) +- +${id} .*damaged: no node has its inode`));
  const tree = await cli(['vdi', 'tree', ...at, ...served]);
  expect(tree.stdout).toContain(`(c?)  ${id}  [damaged: no node has its inode]`);
  await daemon.stop();
}, 60_000);

test('where nodes cannot find a name to lock it, the error says how to read the disk', async () => {
  await startWith({ recyclesVids: true, useLock: true });
  expect((await catalog.find('a')).vid).toBeLessThan(lost);
  await expect(firstBlock(catalog, 'a')).rejects.toMatchObject({ code: 'DAMAGED', message: /--missing=zero reads/ });
  expect(cluster.locks()).toEqual([]);
  const zeros = await open(true);
  expect(await firstBlock(zeros, 'a')).toBe('a');
  await zeros.close();
});
