/**
 * Hyper volumes: read with every hole in its place, and not changed by anything. With an index in the inode, as real
 * nodes make it, and with one of two levels, which takes half a million objects and is made by hand here.
 */
import fs from 'node:fs';
import path from 'node:path';
import { afterEach, describe, expect, test } from 'vitest';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { cli, run, startDaemon, temporaryDirectory } from '../harness/daemon.js';
import { realNodesMissing, startRealNodes, type RealNodes } from './clusters.js';
import { hash, StandIn } from './stand-in.js';

const OBJECT = 2 ** 22;
const TABLE = 4664;
const VDI_BIT = 1n << 63n;
const BTREE_BIT = 1n << 60n;
const MAGIC = 0x6274;
const HEADER = 8;

const ends: (() => Promise<void>)[] = [];
afterEach(async () => {
  for (const end of ends.splice(0).reverse()) await end();
});

/** One of 12 objects whose inode says it is a hyper volume; `write` fills in its index. */
async function standIn(
  write: (inode: Buffer, objects: Map<bigint, Buffer>, vid: number) => void,
): Promise<{ catalog: VdiCatalog; log: string[] }> {
  const cluster = await new StandIn().start();
  ends.push(() => cluster.stop());
  const log: string[] = [];
  const store = await SheepStore.open(cluster.address, { log: (line) => log.push(line) });
  const catalog = new VdiCatalog(store);
  ends.push(() => catalog.close());
  await catalog.create('hyper', 12 * OBJECT);
  const vid = hash('hyper');
  const inode = cluster.objects.get(VDI_BIT | (BigInt(vid) << 32n)) as Buffer;
  inode[553] = 1;
  write(inode, cluster.objects, vid);
  return { catalog, log };
}

/** Header and entries of a leaf in which these objects are the vid's. */
function leaf(vid: number, indices: readonly number[]): Buffer {
  const node = Buffer.alloc(HEADER + indices.length * 8);
  node.writeUInt16LE(MAGIC, 0);
  node.writeUInt16LE(1, 2);
  node.writeUInt32LE(indices.length, 4);
  for (const [n, idx] of indices.entries()) {
    node.writeUInt32LE(idx, HEADER + n * 8);
    node.writeUInt32LE(vid, HEADER + n * 8 + 4);
  }
  return node;
}

async function owned(catalog: VdiCatalog): Promise<number[]> {
  const vdi = await catalog.openVdi('hyper');
  const indices = [...vdi.opened.map.entries()].filter(([, owner]) => owner !== 0).map(([idx]) => idx);
  await catalog.release(vdi);
  return indices;
}

describe('a hyper volume', () => {
  test('with an index in its inode is read, and the log says that nothing more is done', async () => {
    const { catalog, log } = await standIn((inode, objects, vid) => {
      leaf(vid, [1, 5, 11]).copy(inode, TABLE);
      for (const idx of [1, 5, 11]) objects.set((BigInt(vid) << 32n) | BigInt(idx), Buffer.alloc(OBJECT, idx));
    });
    const vdi = await catalog.openVdi('hyper');
    const data = Buffer.alloc(vdi.size, 0xaa);
    await vdi.read(0, data);
    for (let idx = 0; idx < 12; idx++) {
      const fill = [1, 5, 11].includes(idx) ? idx : 0;
      expect(data.subarray(idx * OBJECT, (idx + 1) * OBJECT).equals(Buffer.alloc(OBJECT, fill))).toBe(true);
    }
    expect(vdi.record.isReadOnly).toBe(true);
    await expect(Promise.resolve(vdi.write(0, Buffer.alloc(10), false))).rejects.toThrow(/hyper volume/);
    await expect((async () => vdi.write(OBJECT, Buffer.alloc(10), false))()).rejects.toThrow(/hyper volume/);
    await catalog.release(vdi);
    expect(log.join()).toMatch(/hyper is a hyper volume: it is served read-only/);
    for (const refused of [catalog.snapshot('hyper', 'a'), catalog.snapshotTemporary('hyper', 'now')]) {
      await expect(refused).rejects.toThrow(/hyper volume .* not snapshotted/);
    }
    await expect(catalog.resize('hyper', 13 * OBJECT)).rejects.toThrow(/not resized/);
    expect(await catalog.show('hyper')).toMatchObject({ allocatedBytes: 3 * OBJECT });
    expect((await catalog.check({ repair: false })).problems).toEqual([]);
  });

  test('that nothing was ever written to is zeros', async () => {
    const { catalog } = await standIn(() => undefined);
    expect(await owned(catalog)).toEqual([]);
  });

  test('with an index of two levels is read from its leaves', async () => {
    const { catalog } = await standIn((inode, objects, vid) => {
      inode.writeUInt16LE(MAGIC, TABLE);
      inode.writeUInt16LE(2, TABLE + 2);
      inode.writeUInt32LE(2, TABLE + 4);
      for (const [n, indices] of [
        [0, 3],
        [4, 7, 10],
      ].entries()) {
        const oid = (BigInt(vid) << 32n) | BTREE_BIT | BigInt(n);
        inode.writeUInt32LE(indices.at(-1) as number, TABLE + HEADER + n * 16);
        inode.writeBigUInt64LE(oid, TABLE + HEADER + n * 16 + 8);
        objects.set(oid, leaf(vid, indices));
      }
    });
    expect(await owned(catalog)).toEqual([0, 3, 4, 7, 10]);
  });

  test.each([
    ['another magic', (inode: Buffer) => inode.writeUInt16LE(1, TABLE)],
    ['three levels', (inode: Buffer) => inode.writeUInt16LE(3, TABLE + 2)],
    ['more entries than have room', (inode: Buffer) => inode.writeUInt32LE(2 ** 20, TABLE + 4)],
  ])('whose index has %s is damaged, not empty', async (_, damage) => {
    const { catalog } = await standIn((inode, _objects, vid) => {
      leaf(vid, [1]).copy(inode, TABLE);
      damage(inode);
    });
    await expect(catalog.openVdi('hyper')).rejects.toMatchObject({ code: 'DAMAGED' });
  });
});

const missing = realNodesMissing();
if (missing !== undefined) console.log(`hyper volumes were not tried on real nodes: ${missing}`);

describe.skipIf(missing !== undefined)('a hyper volume of real nodes', () => {
  test('is an export that is read-only, equal to what dog reads, and deleted with all its objects', async () => {
    const cluster: RealNodes = await startRealNodes();
    ends.push(() => cluster.stop());
    const input = path.join(temporaryDirectory(), 'input');
    fs.writeFileSync(input, Buffer.alloc(3 * OBJECT, 'what was written to it '));
    await cluster.dog('vdi', 'create', '-y', 'hyper', String(64 * OBJECT));
    for (const at of [0, 7 * OBJECT - 4096, 60 * OBJECT]) {
      const wrote = await run('sh', ['-c', `dog vdi write -a 127.0.0.1 -p ${cluster.port} hyper ${at} < ${input}`]);
      expect(wrote.code, wrote.stderr).toBe(0);
    }
    const expected = Buffer.alloc(64 * OBJECT);
    for (const at of [0, 7 * OBJECT - 4096, 60 * OBJECT]) fs.readFileSync(input).copy(expected, at);
    const daemon = await startDaemon({ cluster: cluster.address });
    const info = await run('nbdinfo', [daemon.uri('hyper')]);
    expect(info.stdout).toMatch(/is_read_only: true/);
    const output = path.join(temporaryDirectory(), 'output');
    expect((await run('nbdcopy', [daemon.uri('hyper'), output])).code).toBe(0);
    expect(fs.readFileSync(output).equals(expected)).toBe(true);
    const at = ['--cluster', cluster.address, '--control', daemon.control];
    const exported = await cli(['export', 'hyper', `${output}.raw`, ...at]);
    expect(exported.code, exported.stderr).toBe(0);
    expect(fs.readFileSync(`${output}.raw`).equals(expected)).toBe(true);
    expect((await cli(['vdi', 'delete', 'hyper', ...at])).code).toBe(0);
    expect(await cluster.objects()).toEqual([]);
    await daemon.stop();
  }, 120_000);
});
