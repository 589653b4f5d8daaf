/** Placement of objects, compared with a real cluster's, and the nodes that reads and writes therefore go to. */
import { afterEach, expect, test } from 'vitest';
import { Placement } from '../../src/sheepdog/hash-ring.js';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { until } from './clusters.js';
import { Op, StandIn } from './stand-in.js';
import type { ClusterNode } from '../../src/sheepdog/nodes.js';

/** Three nodes on loopback, two copies, vid 6d1d39: by idx, the node without a copy (seen in its directory). */
const PORTS = [7100, 7101, 7102];
const VID = 0x6d1d39;
const WITHOUT = '2012112021021120011112001022021121001020012221121121112211011002';
const OBJECT = 2 ** 20;

let cluster: StandIn | undefined;
afterEach(() => cluster?.stop());

test('the node that an object is read from has the object', () => {
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

/** The same for nodes built with disk vnodes, vid 755019: one disk of each, as in struct disk_info. */
const DISKS = [
  { port: 21320, vnodes: 6, disk: { id: 16089426570737024459n, space: 21577404416n } },
  { port: 21321, vnodes: 5, disk: { id: 7956994794318452934n, space: 21416996864n } },
  { port: 21322, vnodes: 5, disk: { id: 15568767215962854089n, space: 21386350592n } },
];
const VID_BY_DISK = 0x755019;
const WITHOUT_BY_DISK = '221122221022222120221111';

test('objects are placed by disks in a cluster with disk vnodes', () => {
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

test('in a cluster whose nodes keep no objects, no node is found for an object', () => {
  expect(new Placement([]).nodeOf(VID, 0)).toBe(-1);
});

test('reads go to the nodes that have the objects, writes go to one node, and the loss of a node is no error', async () => {
  const standIn = (cluster = await new StandIn().start());
  const store = await SheepStore.open(standIn.address, { retryMs: 10_000 });
  const catalog = new VdiCatalog(store);
  await catalog.create('disk', 32 * OBJECT, { blockSizeShift: 20 });
  const vdi = await catalog.openVdi('disk');
  await vdi.write(0, Buffer.alloc(32 * OBJECT, 7), false);
  const data = Buffer.alloc(4096);
  const readAll = async (): Promise<void> => {
    // In an order that starts no read-ahead.
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
