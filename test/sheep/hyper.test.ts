/**
 * Hyper volumes are read with every hole in its place, written, trimmed and deleted with all their objects; snapshots are
 * refused. With an index in the inode, as real nodes make it, and with an index of two levels, which real nodes make only
 * for half a million objects.
 */
import fs from 'node:fs';
import path from 'node:path';
import { afterEach, describe, expect, test } from 'vitest';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { objectsOf } from '../../src/vdi/vdi.js';
import { cli, run, startDaemon, temporaryDirectory } from '../harness/daemon.js';
import { InDoubt } from '../../src/store/sheep/stalled-nodes.js';
import { realNodesMissing, startRealNodes, until, type RealNodes } from './clusters.js';
import { hash, Op, Res, StandIn } from './stand-in.js';

const OBJECT = 2 ** 22;
const TABLE = 4664;
const VDI_BIT = 1n << 63n;
const BTREE_BIT = 1n << 60n;
const MAGIC = 0x6274;
const HEADER = 8;
/** A size that no table covers. */
const FAR = 2 ** 21 + 17;

const ends: (() => Promise<void>)[] = [];
afterEach(async () => {
  for (const end of ends.splice(0).reverse()) await end();
});

/** A VDI of 12 objects whose inode marks it as a hyper volume; `write` fills in its index. */
async function standIn(
  write: (inode: Buffer, objects: Map<bigint, Buffer>, vid: number) => void,
): Promise<{ cluster: StandIn; store: SheepStore; catalog: VdiCatalog }> {
  const cluster = await new StandIn().start();
  ends.push(() => cluster.stop());
  const store = await SheepStore.open(cluster.address, { retryMs: 300, attemptMs: 30_000 });
  const catalog = new VdiCatalog(store);
  ends.push(() => catalog.close());
  await catalog.create('hyper', 12 * OBJECT);
  const vid = hash('hyper');
  const inode = cluster.objects.get(VDI_BIT | (BigInt(vid) << 32n)) as Buffer;
  inode[553] = 1;
  write(inode, cluster.objects, vid);
  return { cluster, store, catalog };
}

/** Header and entries of a leaf in which these objects belong to the vid. */
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

/** The indexes of the objects, of millions of entries. */
function presentIn(map: Uint32Array): number[] {
  const present: number[] = [];
  for (let idx = 0; idx < map.length; idx++) if (map[idx] !== 0) present.push(idx);
  return present;
}

async function owned(catalog: VdiCatalog): Promise<number[]> {
  const vdi = await catalog.openVdi('hyper');
  const indices = presentIn(objectsOf(vdi).map);
  await catalog.release(vdi);
  return indices;
}

describe('a hyper volume', () => {
  test('with an index in its inode is read, and snapshots of it are refused', async () => {
    const { catalog } = await standIn((inode, objects, vid) => {
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
    await catalog.release(vdi);
    for (const refused of [() => catalog.snapshot('hyper', 'a'), () => catalog.snapshotTemporary('hyper', 'now')]) {
      await expect(refused()).rejects.toThrow(/hyper volume .* cannot be snapshotted/);
    }
    expect(await catalog.show('hyper')).toMatchObject({ allocatedBytes: 3 * OBJECT });
    expect((await catalog.check({ repair: false })).problems).toEqual([]);
  });

  test('of 256 TiB is checked with memory for its existing objects only', async () => {
    const { cluster, catalog } = await standIn((inode, objects, vid) => {
      inode.writeBigUInt64LE(2n ** 48n, 536);
      leaf(vid, [1, 2 ** 26 - 1]).copy(inode, TABLE);
      objects.set((BigInt(vid) << 32n) | 1n, Buffer.alloc(OBJECT, 1));
    });
    // A process with too little heap would end here: Node has 2 to 4 GiB.
    let most = 0;
    const watch = setInterval(() => (most = Math.max(most, process.memoryUsage().heapUsed)), 20);
    const before = process.memoryUsage().heapUsed;
    const report = await catalog.check({ repair: false });
    clearInterval(watch);
    const from = (2 ** 26 - 1) * OBJECT;
    expect(report).toMatchObject({ objects: 2, problems: [`lost: hyper bytes ${from} to ${from + OBJECT - 1}`] });
    expect(Math.max(most, process.memoryUsage().heapUsed) - before).toBeLessThan(256 * 2 ** 20);
    expect(cluster.violations).toEqual([]);
  });

  test('that was never written reads as zeros', async () => {
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
    ['a leaf in its inode', 1],
    ['leaves of another VDI', 2],
    ['nothing', 0],
  ])(
    'with %s is written and trimmed, has the new content when it is opened again, and is deleted whole',
    async (_, depth) => {
      const { cluster, catalog } = await standIn((inode, objects, own) => {
        if (depth === 0) return;
        for (const idx of [1, 5, 11]) objects.set((BigInt(own) << 32n) | BigInt(idx), Buffer.alloc(OBJECT, idx));
        if (depth === 1) return void leaf(own, [1, 5, 11]).copy(inode, TABLE);
        inode.writeUInt32LE(1, 568);
        inode.writeUInt16LE(MAGIC, TABLE);
        inode.writeUInt16LE(2, TABLE + 2);
        inode.writeUInt32LE(1, TABLE + 4);
        inode.writeUInt32LE(11, TABLE + HEADER);
        inode.writeBigUInt64LE((BigInt(own) << 32n) | BTREE_BIT, TABLE + HEADER + 8);
        objects.set((BigInt(own) << 32n) | BTREE_BIT, leaf(own, [1, 5, 11]));
      });
      await catalog.resize('hyper', FAR * OBJECT + OBJECT);
      const expected = new Map<number, Buffer>();
      if (depth !== 0) for (const idx of [1, 5, 11]) expected.set(idx, Buffer.alloc(OBJECT, idx));
      for (const round of [1, 2, 3]) {
        const vdi = await catalog.openVdi('hyper');
        const places = [0, 1, 2, 5, 9, 2 ** 16 - 1, 2 ** 16, 2 ** 20 + 3, FAR];
        for (let step = 0; step < 20; step++) {
          await Promise.all(
            places
              .filter(() => Math.random() < 0.4)
              .map(async (idx) => {
                const before = expected.get(idx) ?? Buffer.alloc(OBJECT);
                if (Math.random() < 0.3) {
                  await vdi.zero(idx * OBJECT, OBJECT, { noHole: false, fua: false });
                  expected.delete(idx);
                  return;
                }
                const within = Math.floor(Math.random() * (OBJECT - 1000));
                const data = Buffer.alloc(1000, 16 * round + step);
                await vdi.write(idx * OBJECT + within, data, false);
                data.copy(before, within);
                expected.set(idx, before);
              }),
          );
        }
        await catalog.release(vdi);
        const again = await catalog.openVdi('hyper');
        expect(presentIn(objectsOf(again).map)).toEqual([...expected.keys()].sort((a, b) => a - b));
        for (const [idx, content] of expected) {
          const data = Buffer.alloc(OBJECT);
          await again.read(idx * OBJECT, data);
          expect(data.equals(content)).toBe(true);
        }
        await catalog.release(again);
      }
      const own = [...cluster.objects.keys()].filter((oid) => !(oid & (VDI_BIT | BTREE_BIT)));
      expect(own.map((oid) => Number(oid & 0xffffffffn)).sort((a, b) => a - b)).toEqual(
        [...expected.keys()].sort((a, b) => a - b),
      );
      await catalog.remove('hyper');
      expect(cluster.dataObjects()).toEqual([]);
      expect(cluster.violations).toEqual([]);
    },
  );

  test('with one leaf in our form and one in another form is rewritten', async () => {
    const REGION = 2 ** 16;
    const { cluster, catalog } = await standIn((inode, objects, own) => {
      inode.writeUInt32LE(2, 568);
      inode.writeUInt16LE(MAGIC, TABLE);
      inode.writeUInt16LE(2, TABLE + 2);
      inode.writeUInt32LE(2, TABLE + 4);
      const whole = leaf(
        0,
        Array.from({ length: REGION }, (_, n) => REGION + n),
      );
      for (const [n, node] of [leaf(own, [5, REGION - 1]), whole].entries()) {
        const oid = (BigInt(own) << 32n) | BTREE_BIT | BigInt(n);
        inode.writeUInt32LE((n + 1) * REGION - 1, TABLE + HEADER + n * 16);
        inode.writeBigUInt64LE(oid, TABLE + HEADER + n * 16 + 8);
        objects.set(oid, node);
      }
      for (const idx of [5, REGION - 1]) objects.set((BigInt(own) << 32n) | BigInt(idx), Buffer.alloc(OBJECT, 1));
    });
    await catalog.resize('hyper', 2 * REGION * OBJECT);
    const vdi = await catalog.openVdi('hyper');
    for (const idx of [7, REGION + 7]) await vdi.write(idx * OBJECT, Buffer.alloc(10, 1), false);
    await catalog.release(vdi);
    expect(await owned(catalog)).toEqual([5, 7, REGION - 1, REGION + 7]);
    await catalog.remove('hyper');
    expect(cluster.dataObjects()).toEqual([]);
  });

  test('whose index cannot be written fails the write, and reads show the content on the nodes', async () => {
    const { cluster, catalog } = await standIn((inode, objects, own) => {
      leaf(own, [1]).copy(inode, TABLE);
      objects.set((BigInt(own) << 32n) | 1n, Buffer.alloc(OBJECT, 1));
    });
    const vdi = await catalog.openVdi('hyper');
    for (const failing of [Op.CREATE, Op.WRITE]) {
      cluster.fault = ({ opcode, oid }) =>
        opcode === failing && (oid & (BTREE_BIT | VDI_BIT)) !== 0n ? { result: Res.NO_SPACE } : undefined;
      await expect((async () => vdi.write(3 * OBJECT, Buffer.alloc(10, 3), false))()).rejects.toThrow(/full/);
    }
    cluster.fault = () => undefined;
    expect(objectsOf(vdi).map[3]).toBe(0);
    await vdi.write(3 * OBJECT, Buffer.alloc(10, 3), false);
    await catalog.release(vdi);
    expect(await owned(catalog)).toEqual([1, 3]);
    await catalog.remove('hyper');
    expect(cluster.dataObjects()).toEqual([]);
  });

  test.each([
    ['a hyper volume', 1],
    ['a table', 0],
  ])(
    'refuses writes to an entry that a stalled node may still change, until the outcome is known: %s',
    async (_, policy) => {
      const { cluster, store, catalog } = await standIn((inode) => {
        inode[553] = policy;
      });
      const vdi = await catalog.openVdi('hyper');
      await vdi.write(0, Buffer.alloc(10, 1), false);
      await vdi.write(OBJECT, Buffer.alloc(10, 1), false);
      // The clearing of an entry is given up by the client, and the node does it later all the same.
      const index = objectsOf(vdi);
      const original = store.cluster.writeObject.bind(store.cluster);
      let settle: () => void = () => undefined;
      const settled = new Promise<void>((resolve) => (settle = resolve));
      store.cluster.writeObject = (...args) => {
        const later = settled.then(() => original(...args));
        return Promise.reject(new InDoubt('no answer', later));
      };
      await expect(Promise.resolve(index.setOwner(0, 0))).rejects.toThrow(/no answer/);
      store.cluster.writeObject = original;
      await expect((async () => vdi.write(0, Buffer.alloc(10, 2), false))()).rejects.toThrow(/given up/);
      await vdi.write(OBJECT, Buffer.alloc(10, 2), false);
      settle();
      await until('the entry is what the node made of it', () => objectsOf(vdi).map[0] === 0);
      await until('its object is gone', () => !cluster.objects.has(BigInt(hash('hyper')) << 32n));
      // The node has removed the object before its answer is here.
      const write = async (): Promise<void> => vdi.write(0, Buffer.alloc(10, 3), false);
      const isInDoubt = (error: Error): false => {
        if (!error.message.includes('given up')) throw error;
        return false;
      };
      await until('the entry is in doubt no longer', () => write().then(() => true, isInDoubt));
      await catalog.release(vdi);
      expect(await owned(catalog)).toEqual([0, 1]);
      expect(cluster.violations).toEqual([]);
    },
  );

  test.each([
    ['another magic', (inode: Buffer) => inode.writeUInt16LE(1, TABLE)],
    ['three levels', (inode: Buffer) => inode.writeUInt16LE(3, TABLE + 2)],
    ['more entries than fit', (inode: Buffer) => inode.writeUInt32LE(2 ** 20, TABLE + 4)],
  ])('whose index has %s is reported as damaged, not as empty', async (_, damage) => {
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
  test('reads as dog wrote it, dog reads what is written here, and all its objects are deleted with it', async () => {
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
    const output = path.join(temporaryDirectory(), 'output');
    expect((await run('nbdcopy', [daemon.uri('hyper'), output])).code).toBe(0);
    expect(fs.readFileSync(output).equals(expected)).toBe(true);
    for (let n = 0; n < 24; n++) {
      const [from, length] = [
        Math.floor(Math.random() * 63 * 1024) * 4096,
        4096 * (1 + Math.floor(Math.random() * 500)),
      ];
      const io = n % 3 === 2 ? `discard ${((7 * n) % 64) * OBJECT} ${OBJECT}` : `write -P ${n + 1} ${from} ${length}`;
      const wrote = await run('qemu-io', ['-f', 'raw', '-d', 'unmap', '-c', io, daemon.uri('hyper')]);
      expect(wrote.code, wrote.stderr + wrote.stdout).toBe(0);
      if (n % 3 === 2) expected.fill(0, ((7 * n) % 64) * OBJECT, (((7 * n) % 64) + 1) * OBJECT);
      else expected.fill(n + 1, from, from + length);
    }
    expect((await run('nbdcopy', [daemon.uri('hyper'), output])).code).toBe(0);
    expect(fs.readFileSync(output).equals(expected)).toBe(true);
    const read = `dog vdi read -a 127.0.0.1 -p ${cluster.port} hyper 0 ${64 * OBJECT} > ${output}.dog`;
    expect((await run('sh', ['-c', read])).code).toBe(0);
    expect(fs.readFileSync(`${output}.dog`).equals(expected)).toBe(true);
    const at = ['--cluster', cluster.address, '--control', daemon.control];
    const exported = await cli(['export', 'hyper', `${output}.raw`, ...at]);
    expect(exported.code, exported.stderr).toBe(0);
    expect(fs.readFileSync(`${output}.raw`).equals(expected)).toBe(true);
    expect((await cli(['vdi', 'delete', 'hyper', ...at])).code).toBe(0);
    expect(await cluster.objects()).toEqual([]);
    await daemon.stop();
  }, 120_000);
});
