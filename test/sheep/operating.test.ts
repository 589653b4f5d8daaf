/**
 * Commands for the operator of a cluster: copies of a VDI, locks and their holders, the state of the nodes. Against the
 * stand-in, and against real nodes where they are installed: there the output is compared with that of `dog`.
 */
import fs from 'node:fs';
import path from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { openOperations } from '../../src/operations/open-operations.js';
import type { Operations, Redundancy } from '../../src/operations/operations.js';
import { clusterLocation } from '../../src/store/sheep/cluster-address.js';
import { leftNodes, readClusterReport } from '../../src/store/sheep/cluster-report.js';
import { decodeVdiStates } from '../../src/sheepdog/state-layouts.js';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { formatRedundancy, parseRedundancy } from '../../src/store/redundancy.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { attach, MIB, storeWith, testStore, WAYS, type TestStore } from '../cli/both-ways.js';
import { startDaemon, temporaryDirectory, waitUntil, type Daemon } from '../harness/daemon.js';
import { realNodesMissing, startRealNodes, type RealNodes } from './clusters.js';
import { Op, StandIn } from './stand-in.js';
import { StateOp, StateRes } from './stand-in-state.js';
import { copyPolicyOf, redundancyOf } from '../../src/store/sheep/redundancy-of.js';

const SIZE = 8 * MIB;
const SHIFT = ['--block-size-shift', '20'];
const NODES = 4;

interface Lock {
  readonly name: string | null;
  readonly tag: string | null;
  readonly vid: number;
  readonly isSnapshot: boolean;
  readonly isDeleted: boolean;
  readonly kind: string;
  readonly holders: { readonly node: string; readonly isMember: boolean }[];
  readonly usedBy: string[];
}

test('copies and erasure codes are written as dog writes them', () => {
  for (const text of ['1', '2', '31', '2:1', '4:2', '8:15', '16:15']) {
    const redundancy = parseRedundancy(text);
    expect(redundancy && formatRedundancy(redundancy)).toBe(text);
    expect(redundancy && redundancyOf(copyPolicyOf(redundancy))).toEqual(redundancy);
  }
  for (const text of ['', '0', '32', '-1', '1.5', '2:', ':1', '2:0', '2:16', '3:1', '1:1', '32:1', '2:1:1', 'x']) {
    expect(parseRedundancy(text), text).toBeUndefined();
  }
  // dog/common.c, parse_copy.
  expect(copyPolicyOf({ dataStrips: 16, parityStrips: 15 })).toEqual({ copies: 31, copyPolicy: 0x8f });
  expect(copyPolicyOf({ dataStrips: 2, parityStrips: 1 })).toEqual({ copies: 3, copyPolicy: 0x11 });
});

test('a list of locks in another format is distinguished from that of Sheepdog 1.0', () => {
  expect(decodeVdiStates(Buffer.alloc(0))).toEqual([]);
  expect(decodeVdiStates(Buffer.alloc(1427))).toBeUndefined();
  // A lock_state is never 0.
  expect(decodeVdiStates(Buffer.alloc(2 * 1428))).toBeUndefined();
});

test('a former member is reported missing since the first epoch without it, and a node that came back is not', () => {
  const node = (port: number): { host: string; port: number } => ({ host: '10.0.0.1', port });
  const epochs = [
    [7, [1, 2]],
    [6, [1, 2, 3]],
    [5, [1, 3]],
    [4, [1, 2, 4]],
  ].map(([epoch, ports]) => ({ epoch, since: Number(epoch) * 1000, nodes: (ports as number[]).map(node) }));
  expect(leftNodes([1, 2].map(node), epochs as never)).toEqual([
    { node: '10.0.0.1:3', epoch: 7, since: 7000 },
    { node: '10.0.0.1:4', epoch: 5, since: 5000 },
  ]);
  expect(leftNodes([node(1)], epochs as never)[0]).toEqual({ node: '10.0.0.1:2', epoch: 0, since: 0 });
});

describe.each(WAYS)('in a local store, %s', (way) => {
  test('copies are refused with one line, no VDI is created, and there are no locks', async () => {
    const target = await testStore(way);
    const line = await target.fails('vdi', 'create', 'vm', '1M', '--copies', '2');
    expect(line).toContain('--copies 2 is for Sheepdog clusters (--cluster)');
    expect(line).toContain(`${target.store} is a local store, which keeps every object once`);
    if (way === WAYS[0]) expect(fs.existsSync(target.store)).toBe(false);
    await target.ok('vdi', 'create', 'vm', '1M');
    expect((await target.json<{ redundancy: null }>('vdi', 'show', 'vm')).redundancy).toBeNull();
    const operations = await operationsOn(target.store, undefined);
    const beginning = { by: 'import', of: '', run: '1', size: MIB, overwrites: true, goesOn: false } as const;
    const redundancy = { dataStrips: 2, parityStrips: 1 };
    for (const name of ['vm', 'other']) {
      await expect(operations.begin(name, { ...beginning, redundancy })).rejects.toThrow(
        /--copies 2:1 is for Sheepdog/,
      );
    }
    await expect(operations.locks()).rejects.toMatchObject({ code: 'UNSUPPORTED' });
    await expect(operations.unlock('vm')).rejects.toThrow(/only clusters have locks on VDIs/);
    expect((await operations.list()).map(({ name, unfinished }) => [name, unfinished])).toEqual([['vm', undefined]]);
    await operations.close();
    await target.daemon?.stop();
  });
});

function operationsOn(store: string, control: string | undefined): Promise<Operations> {
  return openOperations({ store, control, isStoreGiven: true, mayCreate: false });
}

describe.each(WAYS)('of a cluster, %s', (way) => {
  let cluster: StandIn;
  let daemon: Daemon | undefined;
  let operations: Operations;
  /** The same, as text of the command line. */
  let target: TestStore;

  beforeAll(async () => {
    cluster = await new StandIn({ nodes: NODES, useLock: true, jitterMs: 0 }).start();
    daemon = way === WAYS[0] ? undefined : await startDaemon({ cluster: cluster.address });
    const control = daemon === undefined ? [] : ['--control', daemon.control];
    target = storeWith('', daemon, ['--cluster', cluster.address, ...control]);
    operations = await operationsOn(clusterLocation(cluster.address), daemon?.control);
    expect(operations.isDaemon).toBe(daemon !== undefined);
  });
  afterAll(async () => {
    await operations.close();
    await daemon?.stop();
    await cluster.stop();
  });

  const create = async (name: string, redundancy?: Redundancy): Promise<number> =>
    (await operations.create(name, SIZE, { blockSizeShift: 20, redundancy })).vid;
  const node = (n: number): string => `127.0.0.1:${cluster.ports[n]}`;

  test('a VDI has the requested copies or erasure code, and so have its snapshots and clones', async () => {
    await create('plain');
    await create('three', { copies: 3 });
    await target.ok('vdi', 'create', 'code', '8M', '--copies', '2:1', ...SHIFT);
    const code = { dataStrips: 2, parityStrips: 1 };
    expect((await operations.show('plain')).redundancy).toEqual({ copies: 2 });
    expect((await operations.show('three')).redundancy).toEqual({ copies: 3 });
    expect((await operations.show('code')).redundancy).toEqual(code);
    expect(await target.json('vdi', 'show', 'code')).toMatchObject({ redundancy: { policy: 'erasure', ...code } });
    expect(await target.ok('vdi', 'show', 'code')).toContain('erasure code 2:1, any 2 of 3 strips are enough');
    await operations.snapshot('code', 's');
    await operations.clone('code@s', 'copy');
    const listed = await operations.list();
    const codes = listed.filter(({ name }) => name === 'code' || name === 'copy').map(({ redundancy }) => redundancy);
    expect(codes).toEqual([code, code, code]);
    expect(cluster.violations).toEqual([]);
  });

  test('more copies or strips than nodes are refused with both numbers, and no VDI is created', async () => {
    const line = await target.fails('vdi', 'create', 'much', '8M', '--copies', '5');
    expect(line).toContain('--copies 5 needs 5 nodes in zones of their own');
    expect(line).toContain('has 4 nodes in 4 zones');
    await expect(create('much', { dataStrips: 4, parityStrips: 2 })).rejects.toThrow(/--copies 4:2 needs 6 nodes/);
    expect((await operations.list()).map(({ name }) => name)).not.toContain('much');
  });

  test('an import has the requested copies, and an import over a VDI with other copies is refused at once', async () => {
    const image = path.join(temporaryDirectory(), 'image');
    fs.writeFileSync(image, Buffer.alloc(2 * MIB, 7));
    const made = await target.run(['import', image, 'imported', '--copies', '2:1', ...SHIFT]);
    expect(made.code, made.stderr).toBe(0);
    expect((await operations.show('imported')).redundancy).toEqual({ dataStrips: 2, parityStrips: 1 });
    const over = { by: 'import', of: '', run: '1', size: MIB, overwrites: true, goesOn: false } as const;
    await expect(operations.begin('imported', { ...over, redundancy: { copies: 3 } })).rejects.toThrow(
      'imported exists and keeps erasure code 2:1; leave --copies 3 out',
    );
    expect((await operations.show('imported')).unfinished).toBeUndefined();
    await operations.begin('imported', { ...over, redundancy: { dataStrips: 2, parityStrips: 1 } });
    await operations.finish('imported', '1');
  });

  test('a lock is shown with the node it was taken through, and ends only if the command names that node', async () => {
    const vid = await create('vm');
    expect(await operations.locks()).toEqual({ areEnforced: true, locks: [] });
    await expect(operations.unlock('vm')).rejects.toMatchObject({ code: 'NOT_LOCKED' });

    // A client that is unknown here.
    cluster.state.locked.set(vid, 2);
    expect(await target.json<Lock[]>('vdi', 'lock', 'list')).toEqual([
      {
        ...{ name: 'vm', tag: null, vid, isSnapshot: false, isDeleted: false, kind: 'exclusive' },
        holders: [{ node: node(2), isMember: true }],
        usedBy: [],
      },
    ]);
    expect(await target.ok('vdi', 'lock', 'list')).toMatch(new RegExp(`^vm .* exclusive  ${node(2)} +no$`, 'm'));

    const line = await target.fails('vdi', 'lock', 'unlock', 'vm');
    expect(line).toContain(`vm (id ${vid.toString(16)}) is locked through ${node(2)}, a member of the cluster`);
    expect(line).toContain(`'sheepgate vdi lock unlock vm --held-by ${node(2)}'`);
    // Taken by another client since the list was read.
    await expect(operations.unlock('vm', { heldBy: node(1) })).rejects.toThrow(
      `is locked through ${node(2)}, not through ${node(1)}; nothing was done`,
    );
    expect(cluster.state.locked.has(vid)).toBe(true);

    const done = await target.ok('vdi', 'lock', 'unlock', 'vm', '--held-by', node(2));
    expect(done).toBe(`unlocked vm (id ${vid.toString(16)}), which was locked through ${node(2)}\n`);
    expect(cluster.state.locked.has(vid)).toBe(false);
  });

  test('a lock held through a node that left ends only if the command names that node, as its client may still write', async () => {
    const { vid } = await operations.show('vm');
    cluster.state.locked.set(vid, 3);
    cluster.left.add(3);
    try {
      const { locks } = await operations.locks();
      expect(locks).toMatchObject([{ spec: 'vm', holders: [{ node: node(3), isMember: false }] }]);
      await expect(operations.unlock('vm')).rejects.toThrow(
        'no longer a member, but the client that asked it for the lock may be writing through another node',
      );
      await operations.unlock('vm', { heldBy: node(3) });
      expect(cluster.state.locked.size).toBe(0);
    } finally {
      cluster.left.delete(3);
    }
  });

  test('a lock on a snapshot or on a deleted VDI is listed as such, and ending it ends no other lock', async () => {
    const old = await create('snapped');
    await operations.snapshot('snapped', 's');
    const { vid } = await operations.show('snapped');
    const deleted = await create('gone');
    await operations.remove('gone');
    for (const locked of [old, vid, deleted]) cluster.state.locked.set(locked, 0);
    const { locks } = await operations.locks();
    expect(locks.find((lock) => lock.vid === old)).toMatchObject({ name: 'snapped', tag: 's', isSnapshot: true });
    expect(locks.find((lock) => lock.vid === deleted)).toMatchObject({ name: null, isDeleted: true });
    await expect(operations.unlock('snapped@s')).rejects.toThrow(
      /a client that had the VDI open when this snapshot was taken/,
    );
    await operations.unlock('snapped@s', { heldBy: node(0) });
    expect([...cluster.state.locked.keys()].sort()).toEqual([vid, deleted].sort());
    await operations.unlock(`@${deleted.toString(16)}`);
    expect([...cluster.state.locked.keys()]).toEqual([vid]);
    // A lock can be named by the id of its VDI, even if the record of the VDI is lost.
    await expect(operations.unlock(`@${vid.toString(16)}`)).rejects.toMatchObject({ code: 'NEEDS_FORCE' });
    const oid = (1n << 63n) | (BigInt(vid) << 32n);
    cluster.fault = ({ opcode, oid: asked }) => (opcode === Op.READ && asked === oid ? { result: 2 } : undefined);
    expect((await operations.locks()).locks).toMatchObject([{ vid, name: null, isDeleted: false }]);
    await expect(operations.unlock(`@${vid.toString(16)}`)).rejects.toMatchObject({ code: 'NEEDS_FORCE' });
    cluster.fault = () => undefined;
    cluster.state.locked.clear();
  });

  test('a shared lock ends node by node', async () => {
    const { vid } = await operations.show('vm');
    cluster.state.shared.set(vid, [1, 2]);
    const { locks } = await operations.locks();
    expect(locks).toMatchObject([{ kind: 'shared', holders: [{ node: node(1) }, { node: node(2) }] }]);
    await operations.unlock('vm', { heldBy: node(2) });
    expect(cluster.state.shared.get(vid)).toEqual([1]);
    await operations.unlock('vm', { heldBy: node(1) });
    expect(cluster.state.shared.size).toBe(0);
  });
});

test('a VDI restored or migrated into a cluster has the requested copies', async () => {
  const cluster = await new StandIn({ jitterMs: 0 }).start();
  const local = await testStore(WAYS[0]);
  await local.ok('vdi', 'create', 'vm', '4M', ...SHIFT);
  const backup = path.join(temporaryDirectory(), 'backup');
  await local.ok('backup', 'vm', '--to', backup);
  const target = storeWith('', undefined, ['--cluster', cluster.address]);
  for (const [name, command] of [
    ['restored', () => target.run(['restore', backup, 'restored', '--copies', '3'])],
    [
      'migrated',
      () =>
        local.run([
          'migrate',
          'vm',
          '--from',
          local.store,
          '--to',
          `cluster:${cluster.address}`,
          '--as',
          'migrated',
          '--copies',
          '3',
        ]),
    ],
  ] as const) {
    const result = await command();
    expect(result.code, result.stderr).toBe(0);
    const { redundancy } = await target.json<{ redundancy: object }>('vdi', 'show', name);
    expect(redundancy, name).toEqual({ policy: 'replicated', copies: 3 });
  }
  await cluster.stop();
});

describe('a lock of this program', () => {
  test('is never ended while a client has the disk open, and is shown with that client', async () => {
    const cluster = await new StandIn({ useLock: true, jitterMs: 0 }).start();
    const daemon = await startDaemon({ cluster: cluster.address, args: ['--create', 'vm:8M'] });
    const through = storeWith('', daemon, ['--cluster', cluster.address, '--control', daemon.control]);
    // This command does not find the daemon's control socket, as if it ran on the nodes.
    const directly = storeWith('', undefined, ['--cluster', cluster.address]);
    const client = await attach(daemon, 'vm');
    const [lock] = await directly.json<Lock[]>('vdi', 'lock', 'list');
    expect(lock).toMatchObject({ name: 'vm', kind: 'exclusive' });
    expect(lock?.usedBy).toHaveLength(1);
    const heldBy = lock?.holders[0]?.node ?? '';
    for (const target of [through, directly]) {
      expect(await target.fails('vdi', 'lock', 'unlock', 'vm', '--held-by', heldBy)).toMatch(
        /vm is open by .* and cannot be unlocked now; disconnect first/,
      );
    }
    expect(cluster.state.locked.size).toBe(1);
    await client.disconnect();
    await waitUntil(() => cluster.state.locked.size === 0, 'the lock is given back');

    // The command that the refusal names ends the lock of a killed daemon.
    await attach(daemon, 'vm');
    await waitUntil(() => cluster.state.locked.size === 1, 'the disk is locked');
    await daemon.kill();
    const catalog = new VdiCatalog(await SheepStore.open(cluster.address));
    await expect(catalog.openVdi('vm')).rejects.toMatchObject({ code: 'LOCKED' });
    const line = await directly.fails('vdi', 'lock', 'unlock', 'vm');
    const [, named = ''] = /--held-by (\S+)'/.exec(line) ?? [];
    await directly.ok('vdi', 'lock', 'unlock', 'vm', '--held-by', named);
    await catalog.release(await catalog.openVdi('vm'));
    await catalog.close();
    await cluster.stop();
  });

  test('is not asked for in a cluster without locks', async () => {
    const cluster = await new StandIn({ jitterMs: 0 }).start();
    const target = storeWith('', undefined, ['--cluster', cluster.address]);
    const listed = await target.run(['vdi', 'lock', 'list', '--json']);
    expect([listed.code, listed.stdout]).toEqual([0, '[]\n']);
    expect(listed.stderr).toContain('note: this cluster was formatted without locks');
    const catalog = new VdiCatalog(await SheepStore.open(cluster.address));
    await catalog.create('vm', SIZE);
    await expect(catalog.unlock('vm')).rejects.toMatchObject({ code: 'UNSUPPORTED' });
    await catalog.close();
    await cluster.stop();
  });

  test('among many VDIs is found: the request is repeated with a larger buffer', async () => {
    const cluster = await new StandIn({ useLock: true, jitterMs: 0 }).start();
    const store = await SheepStore.open(cluster.address);
    let refused = 0;
    cluster.fault = ({ opcode, length }) => {
      if (opcode !== StateOp.GET_VDI_COPIES || length >= 2 ** 22) return undefined;
      refused++;
      return { result: StateRes.BUFFER_SMALL };
    };
    const { vid } = await store.catalog.create('vm', SIZE, 22);
    cluster.state.locked.set(vid, 1);
    expect(await store.catalog.locks.list()).toMatchObject([{ vid, kind: 'exclusive' }]);
    expect(refused).toBe(2);
    await store.close();
    await cluster.stop();
  });

  test('that is taken again just after it was ended is reported, and so is a VDI that changes at that moment', async () => {
    const cluster = await new StandIn({ useLock: true, jitterMs: 0 }).start();
    const catalog = new VdiCatalog(await SheepStore.open(cluster.address));
    const { vid } = await catalog.create('vm', SIZE);
    const heldBy = `127.0.0.1:${cluster.ports[1]}`;
    cluster.state.locked.set(vid, 1);
    cluster.fault = ({ opcode }) => (opcode === Op.RELEASE_VDI ? { result: 0 } : undefined);
    await expect(catalog.unlock('vm', { heldBy })).rejects.toMatchObject({ code: 'IO' });
    cluster.fault = ({ opcode }) => {
      // Another client takes a snapshot after the locks were read: the name now belongs to another vid.
      if (opcode === StateOp.GET_VDI_COPIES && cluster.state.locked.size === 1) cluster.externalSnapshot('vm', 's');
      return undefined;
    };
    await expect(catalog.unlock('vm', { heldBy })).rejects.toMatchObject({ code: 'NOT_LOCKED' });
    expect(cluster.state.locked.has(vid)).toBe(true);
    await catalog.close();
    await cluster.stop();
  });
});

describe('the state of a cluster', () => {
  let cluster: StandIn;
  let target: TestStore;

  beforeEach(async () => {
    cluster = await new StandIn({ useLock: true, jitterMs: 0 }).start();
    target = storeWith('', undefined, ['--cluster', cluster.address]);
  });
  afterEach(() => cluster.stop());

  test('shows members and their changes, missing nodes, space, and the progress of recovery', async () => {
    const [a, b, c] = cluster.ports as [number, number, number];
    cluster.state.epochs = [
      { epoch: 3, sinceSec: 1_700_000_200, ports: [a, b, c] },
      { epoch: 2, sinceSec: 1_700_000_100, ports: [a, b] },
      { epoch: 1, sinceSec: 1_700_000_000, ports: [a, b, 7999] },
    ];
    cluster.state.recovery.set(2, [1, 30, 120]).set(1, [0, 0, 0]);
    const info = await target.json('cluster', 'info');
    expect(info).toMatchObject({
      ...{ status: 1, state: 'running', nodeCount: 3, zones: 3, copies: 2, copyPolicy: 0, enforcesLocks: true },
      redundancy: { policy: 'replicated', copies: 2 },
      recovery: { isEnabled: true, nodes: 2, done: 30, total: 120 },
      space: { size: 3 * 1024 * MIB, free: 2997 * MIB, unknownNodes: 0 },
      left: [{ node: '127.0.0.1:7999', epoch: 2, since: '2023-11-14T22:15:00.000Z' }],
      epochs: [
        { epoch: 3, since: '2023-11-14T22:16:40.000Z', nodes: [a, b, c].map((port) => `127.0.0.1:${port}`) },
        { epoch: 2 },
        { epoch: 1 },
      ],
    });
    const text = await target.ok('cluster', 'info');
    expect(text).toMatch(/^recovery +running on 2 of 3 nodes: 30 of 120 objects \(25 %\)$/m);
    expect(text).toMatch(/^left +127\.0\.0\.1:7999, with epoch 2, /m);
    expect(text).toMatch(new RegExp(`^ +3  \\S+ +3  \\+ 127\\.0\\.0\\.1:${c}$`, 'm'));
    expect(text).toMatch(/^ +2  \S+ +2  - 127\.0\.0\.1:7999$/m);
    // Fewer epochs are requested, with room for more members than there are now.
    expect((await target.json<{ epochs: object[] }>('cluster', 'info', '--epochs', '2')).epochs).toHaveLength(2);
    cluster.state.epochs.push({ epoch: 0, sinceSec: 0, ports: Array.from({ length: 100 }, (_, n) => 8000 + n) });
    expect((await target.json<{ left: object[] }>('cluster', 'info')).left).toHaveLength(101);

    const nodes = await target.json<object[]>('node', 'list');
    expect(nodes).toMatchObject([
      {
        host: '127.0.0.1',
        port: a,
        zone: 0,
        vnodes: 128,
        state: 'ok',
        size: 1024 * MIB,
        free: 1000 * MIB,
        recovery: null,
      },
      { port: b, state: 'recovering', recovery: { phase: 'preparing', done: 0, total: 0 } },
      { port: c, state: 'recovering', recovery: { phase: 'copying', done: 30, total: 120 } },
    ]);
    const list = await target.ok('node', 'list');
    expect(list).toMatch(new RegExp(`127\\.0\\.0\\.1:${a} +0 +128 +1 GiB +24 MiB +1000 MiB +ok$`, 'm'));
    expect(list).toMatch(/recovering, 30 of 120 objects \(25 %\)$/m);
    expect(list).toMatch(/recovering, being prepared$/m);
  });

  test('comes from another node if the first one has ended, and names a node that accepts connections without answering', async () => {
    cluster.state.isRecoveryDisabled = true;
    cluster.state.epochs = [{ epoch: 1, sinceSec: 1_700_000_000, ports: cluster.ports }];
    await cluster.stopNode(0);
    const info = await target.json<{ nodes: { state: string; reason: string | null }[] }>('cluster', 'info');
    expect(info).toMatchObject({ space: { unknownNodes: 1 }, recovery: { isEnabled: false } });
    expect(info.nodes.map(({ state }) => state)).toEqual(['unreachable', 'ok', 'ok']);
    expect(info.nodes[0]?.reason).toContain('ECONNREFUSED');
    const text = await target.ok('cluster', 'info');
    expect(text).toMatch(/^recovery +none is running; 1 node does not report it; disabled/m);
    expect(text).toMatch(/, without 1 node that does not report it$/m);

    cluster.fault = ({ node, opcode }) =>
      node === 2 && opcode === StateOp.STAT_SHEEP ? { until: new Promise(() => undefined) } : undefined;
    const { nodes } = await readClusterReport(cluster.address, { answerMs: 300 });
    expect(nodes.map(({ state, reason }) => [state, reason])).toEqual([
      ['unreachable', expect.stringContaining('ECONNREFUSED')],
      ['ok', null],
      ['silent', 'no answer within 0.3 s'],
    ]);

    await cluster.stopNode(1);
    await cluster.stopNode(2);
    expect(await target.fails('node', 'list')).toContain('no node reports the state of the cluster');
  });

  test('is shown as soon as one of the named nodes answers, however many do not', async () => {
    cluster.fault = ({ node }) => (node < 2 ? { until: new Promise(() => undefined) } : undefined);
    const startedAt = performance.now();
    const { stateName, nodes } = await readClusterReport(cluster.address, { answerMs: 1_000 });
    expect(performance.now() - startedAt).toBeLessThan(1_900);
    expect(stateName).toBe('running');
    expect(nodes.map(({ state }) => state)).toEqual(['silent', 'silent', 'ok']);
    cluster.fault = () => ({ until: new Promise(() => undefined) });
    await expect(readClusterReport(cluster.address, { answerMs: 300 })).rejects.toThrow(
      /no node reports the state of the cluster: .*; .*; .*answers nothing/,
    );
    expect(performance.now() - startedAt).toBeLessThan(2_700);
  });

  test('is shown for an unformatted cluster, and for a cluster that waits for nodes, with their addresses', async () => {
    cluster.state.notServing = StateRes.WAIT_FOR_FORMAT;
    const fresh = await target.json<{ nodes: object[] }>('cluster', 'info');
    expect(fresh).toMatchObject({ state: 'not-formatted', createdAt: null, redundancy: null, epochs: [], left: [] });
    expect(fresh.nodes).toMatchObject([{ state: 'waiting' }, { state: 'waiting' }, { state: 'waiting' }]);
    expect(fresh).toMatchObject({ space: { size: null, free: null, unknownNodes: 3 } });
    const text = await target.ok('cluster', 'info');
    expect(text).toContain("not formatted; 'dog cluster format'");
    expect(text).toMatch(/^space +unknown, no node reports it$/m);
    expect(await target.ok('node', 'list')).toContain('waiting: it answers WAIT_FOR_FORMAT');

    cluster.state.notServing = StateRes.WAIT_FOR_JOIN;
    cluster.state.epochs = [{ epoch: 4, sinceSec: 1_700_000_000, ports: [...cluster.ports, 7999] }];
    expect(await target.json('cluster', 'info')).toMatchObject({
      state: 'waiting',
      left: [{ node: '127.0.0.1:7999', epoch: null, since: null }],
    });
    expect(await target.ok('cluster', 'info')).toMatch(/^left +127\.0\.0\.1:7999, the cluster waits for it$/m);
  });
});

const missing = realNodesMissing();
if (missing !== undefined) console.log(`operators' commands were not tried on real nodes: ${missing}`);

describe.skipIf(missing !== undefined)('on real nodes', () => {
  let cluster: RealNodes;
  let target: TestStore;

  beforeAll(async () => {
    cluster = await startRealNodes({ nodes: 4, format: ['-c', '2', '-l'] });
    target = storeWith('', undefined, ['--cluster', cluster.address]);
  }, 60_000);
  afterAll(() => cluster.stop());

  test('copies, locks and recovery are the same as those of dog', async () => {
    const image = path.join(temporaryDirectory(), 'image');
    fs.writeFileSync(image, Buffer.alloc(192 * MIB, 'what is to be recovered '));
    await target.ok('import', image, 'vm', '--copies', '3', ...SHIFT);
    await target.ok('vdi', 'create', 'code', '8M', '--copies', '2:1');
    expect(await target.fails('vdi', 'create', 'much', '8M', '--copies', '4:1')).toContain('has 4 nodes in 4 zones');
    const copies = new Map(
      (await cluster.dog('vdi', 'list', '-r')).split('\n').map((line) => [line.split(' ')[1], line.split(' ')[8]]),
    );
    expect([copies.get('vm'), copies.get('code')]).toEqual(['3', '2:1']);

    const daemon = await startDaemon({ cluster: cluster.address });
    await attach(daemon, 'code');
    const [lock] = await target.json<Lock[]>('vdi', 'lock', 'list');
    expect(lock).toMatchObject({ name: 'code', kind: 'exclusive', holders: [{ isMember: true }] });
    const [host, port] = (lock?.holders[0]?.node ?? '').split(':');
    expect(await cluster.dog('vdi', 'lock', 'list')).toContain(`ip:${host} port:${port}`);
    expect(await target.fails('vdi', 'lock', 'unlock', 'code')).toContain('is open by');
    await daemon.kill();
    const [, heldBy = ''] = /--held-by (\S+)'/.exec(await target.fails('vdi', 'lock', 'unlock', 'code')) ?? [];
    await target.ok('vdi', 'lock', 'unlock', 'code', '--held-by', heldBy);
    expect(await target.json('vdi', 'lock', 'list')).toEqual([]);
    expect((await cluster.dog('vdi', 'lock', 'list')).trim().split('\n')).toHaveLength(1);

    // A node that has lost its disk: recovery restores all its objects.
    await cluster.killNode(3);
    const [, , , gone] = cluster.address.split(',');
    await waitUntil(
      async () => (await target.json<{ nodeCount: number }>('cluster', 'info')).nodeCount === 3,
      'the node has left',
    );
    await cluster.recovered();
    expect(await target.json('cluster', 'info')).toMatchObject({ epoch: 2, left: [{ node: gone, epoch: 2 }] });
    fs.rmSync(path.join(cluster.directory, 'node3'), { recursive: true });
    // Polled without pause: on a quiet machine recovery is shorter than a command.
    const seen: number[] = [];
    let isOver = false;
    const watching = waitUntil(async () => {
      const { nodes } = await readClusterReport(cluster.address);
      const recovery = nodes.find(({ node }) => node === gone)?.recovery;
      if (recovery?.phase === 'copying') seen.push(recovery.done);
      return isOver;
    }, 'recovery is over');
    await cluster.restartNode(3);
    await cluster.recovered();
    isOver = true;
    await watching;
    expect(seen.length).toBeGreaterThan(0);
    expect(seen).toEqual([...seen].sort((x, y) => x - y));
    expect(await target.json('cluster', 'info')).toMatchObject({ epoch: 3, nodeCount: 4, left: [] });
  }, 120_000);
});
