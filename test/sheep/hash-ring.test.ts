/** Where objects lie, against what a real cluster did with them; and what is made of it. */
import { afterEach, expect, test } from 'vitest';
import { Placement } from '../../src/sheepdog/hash-ring.js';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { until } from './clusters.js';
import { Op, StandIn } from './stand-in.js';
import type { ClusterNode } from '../../src/sheepdog/nodes.js';

/** Three nodes on loopback with two copies of each object, vid 6d1d39: by idx, the node that had none (from its directory). */
const PORTS = [7100, 7101, 7102];
const VID = 0x6d1d39;
const WITHOUT = '2012112021021120011112001022021121001020012221121121112211011002';
const OBJECT = 2 ** 20;

let cluster: StandIn | undefined;
afterEach(() => cluster?.stop());

test('the node an object is read from is one that has it', () => {
  const nodes = PORTS.map((port): ClusterNode => {
    const address = Buffer.alloc(16);
    Buffer.from([127, 0, 0, 1]).copy(address, 12);
    return { host: '127.0.0.1', port, vnodes: 128, zone: 0, space: 0, address, disks: [] };
  });
  const placement = new Placement(nodes);
  for (const [idx, without] of Array.from(WITHOUT).entries()) {
    const node = placement.nodeOf(VID, idx);
    expect(node, `object ${idx}`).toBeGreaterThanOrEqual(0);
    expect(node, `object ${idx}`).not.toBe(Number(without));
  }
});

/** The same of nodes that were built with disk vnodes, vid 755019: a disk of each, as struct disk_info has it. */
const DISKS = [
  { port: 21320, vnodes: 6, disk: { id: 16089426570737024459n, space: 21577404416n } },
  { port: 21321, vnodes: 5, disk: { id: 7956994794318452934n, space: 21416996864n } },
  { port: 21322, vnodes: 5, disk: { id: 15568767215962854089n, space: 21386350592n } },
];
const VID_BY_DISK = 0x755019;
const WITHOUT_BY_DISK = '221122221022222120221111';

test('placement goes by the disks of nodes where the cluster does', () => {
  const nodes = DISKS.map(({ port, vnodes, disk }): ClusterNode => {
    const address = Buffer.alloc(16);
    Buffer.from([127, 0, 0, 1]).copy(address, 12);
    return { host: '127.0.0.1', port, vnodes, zone: 0, space: 0, address, disks: [disk] };
  });
  const placement = new Placement(nodes, true);
  for (const [idx, without] of Array.from(WITHOUT_BY_DISK).entries()) {
    expect(placement.nodeOf(VID_BY_DISK, idx), `object ${idx}`).not.toBe(Number(without));
  }
});

test('a cluster whose nodes keep no objects has no node for an object', () => {
  expect(new Placement([]).nodeOf(VID, 0)).toBe(-1);
});

test('reads go to the nodes that have the objects, writes to one node, and losing a node is no error', async () => {
  const standIn = (cluster = await new StandIn().start());
  const store = await SheepStore.open(standIn.address, { retryMs: 10_000 });
  const catalog = new VdiCatalog(store);
  await catalog.create('disk', 32 * OBJECT, { blockSizeShift: 20 });
  const vdi = await catalog.openVdi('disk');
  await vdi.write(0, Buffer.alloc(32 * OBJECT, 7), false);
  const data = Buffer.alloc(4096);
  const readAll = async (): Promise<void> => {
    // In no order that reading ahead would notice.
    for (let n = 0; n < 32; n++) {
      data.fill(0);
      await vdi.read(((n * 11) % 32) * OBJECT + 4096, data);
      expect(data.every((byte) => byte === 7)).toBe(true);
    }
  };
  const nodesOf = (opcode: number): Set<number> =>
    new Set(standIn.seen.filter((request) => request.opcode === opcode).map(({ node }) => node));
  await until('reads are spread over all nodes', async () => {
    standIn.seen.length = 0;
    await readAll();
    return nodesOf(Op.READ).size === 3;
  });
  await vdi.write(0, Buffer.alloc(32 * OBJECT, 7), false);
  const [writer] = nodesOf(Op.WRITE);
  expect(nodesOf(Op.WRITE).size).toBe(1);
  await standIn.stopNode(((writer as number) + 1) % 3);
  await readAll();
  await standIn.stopNode(writer as number);
  await readAll();
  expect(standIn.violations).toEqual([]);
  await catalog.close();
});
