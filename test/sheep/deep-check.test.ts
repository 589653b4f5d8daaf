/**
 * check --deep compares the copies of all nodes. Here against the stand-in, whose nodes can have differing copies; files
 * changed on disk, erasure codes and load are tested against real nodes (deep-check-real.test.ts).
 */
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { StripComparison } from '../../src/sheepdog/erasure-code.js';
import { deepCheck, type DeepCheckOptions, type DeepReport } from '../../src/store/sheep/deep/deep-check.js';
import { Throttle } from '../../src/store/sheep/deep/throttle.js';
import { Placement } from '../../src/sheepdog/hash-ring.js';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { attach, MIB, oneLineOf, patterned } from '../cli/both-ways.js';
import { localPlace } from '../cli/migration-stores.js';
import { BIN, cli, cliJson, ended, start, startDaemon, waitUntil } from '../harness/daemon.js';
import { StandIn } from './stand-in.js';
import { PeerOp } from './stand-in-copies.js';
import { until } from './clusters.js';

/** First bytes of the strips of an object, from the disks of real nodes (1.0.1); the last ones are parity. */
const STRIPS: readonly (readonly [data: number, strips: readonly string[]])[] = [
  [2, ['9c9a867ac0accdbc', '8420697275fb2b7a', 'acf3456ab7021c2d']],
  [2, ['25cfffc58be72c5a', 'fa768cb40922dc53', '86a019279270d148', '7e112e1cb9d4cb7e']],
  [
    4,
    [
      '0feb0a10dd611ee5dc2cc523',
      '5aebc0cac9ef9a06919047e6',
      '92077f2f32c0781cb7674b9a',
      'a1f32598eccd9ec5dd6415c8',
      'c2e2f73656bdb2bc18f4ca3f',
      '666aaf1e652d3123f704efdb',
    ],
  ],
];

describe('the erasure code of the nodes', () => {
  const strip = (text: string): Buffer => Buffer.from(text, 'hex');
  /** The stripes that do not match their parity, and which strip is wrong. */
  const compared = (data: number, numbers: readonly number[], parts: readonly Buffer[]): [number, number][] => {
    const found: [number, number][] = [];
    new StripComparison(data, numbers).compare(parts, 2, (...each) => found.push(each));
    return found;
  };

  test('strips that real nodes have written match, whichever subset is present', () => {
    for (const [data, texts] of STRIPS) {
      const all = [...texts.keys()];
      for (const without of [...all, -1]) {
        const numbers = all.filter((n) => n !== without);
        if (numbers.length <= data) continue;
        const parts = numbers.map((n) => strip(texts[n] as string));
        expect(compared(data, numbers, parts), `${texts.length} strips without ${without}`).toEqual([]);
      }
    }
  });

  test('a wrong strip is detected, and identified if there are two parity strips', () => {
    for (const [data, texts] of STRIPS) {
      for (const wrong of texts.keys()) {
        const parts = texts.map(strip);
        parts[wrong]?.writeUInt8((parts[wrong].readUInt8(5) + 1) & 255, 5);
        const told = texts.length - data > 1 ? wrong : -1;
        expect(compared(data, [...texts.keys()], parts), `strip ${wrong} of ${texts.length}`).toEqual([[2, told]]);
      }
    }
  });

  test('with two wrong strips, none is named as the wrong one', () => {
    const [data, texts] = STRIPS[2] as (typeof STRIPS)[number];
    const parts = texts.map(strip);
    parts[0]?.writeUInt8(1, 0);
    parts[3]?.writeUInt8(2, 0);
    expect(compared(data, [...texts.keys()], parts)).toEqual([[0, -1]]);
  });
});

test('the copies of an object belong on as many nodes, in different zones', () => {
  const node = (port: number, zone: number): ConstructorParameters<typeof Placement>[0][number] => {
    const address = Buffer.alloc(16);
    Buffer.from([127, 0, 0, 1]).copy(address, 12);
    return { host: '127.0.0.1', port, vnodes: 128, zone, space: 0, address, disks: [] };
  };
  const placement = new Placement([node(1, 7), node(2, 7), node(3, 8), node(4, 9)]);
  for (let idx = 0; idx < 50; idx++) {
    const holders = placement.holdersOf(0xabc, idx, 2);
    expect(holders[0]).toBe(placement.nodeOf(0xabc, idx));
    expect(new Set(holders.map((at) => (at < 2 ? 7 : at))).size).toBe(2);
    expect(placement.holdersOf(0xabc, idx, 9)).toHaveLength(3);
  }
  expect(new Placement([]).holdersOf(1, 1, 2)).toEqual([]);
});

test('the throttle limits the bytes read per second', async () => {
  const throttle = new Throttle(1_000_000);
  const startedAt = performance.now();
  await Promise.all(Array.from({ length: 11 }, () => throttle.take(20_000)));
  // The first read does not wait.
  expect(performance.now() - startedAt).toBeGreaterThan(190);
  const controller = new AbortController();
  const ended = new Throttle(1, controller.signal);
  await ended.take(1000);
  const waiting = ended.take(1);
  controller.abort();
  await expect(waiting).rejects.toThrow(/abort/);
});

describe('check --deep (stand-in)', () => {
  const SIZE = 3 * MIB;
  let standIn: StandIn;
  let store: SheepStore;
  let catalog: VdiCatalog;
  let vid: number;

  /** A cluster with a disk of three objects of 1 MiB, and a snapshot that shares two of them. */
  beforeAll(async () => {
    standIn = await new StandIn({ jitterMs: 0 }).start();
    store = await SheepStore.open(standIn.address, { retryMs: 5_000 });
    catalog = new VdiCatalog(store);
    await catalog.create('vm', SIZE, { blockSizeShift: 20 });
    const vdi = await catalog.openVdi('vm');
    await vdi.write(0, patterned(SIZE, 1), false);
    vid = vdi.record.vid;
    await catalog.snapshot('vm', 'a');
    await vdi.write(2 * MIB, patterned(512, 2), false);
    await catalog.release(vdi);
  });
  afterAll(async () => {
    await catalog.close();
    await standIn.stop();
  });
  beforeEach(() => void (standIn.seen.length = 0));
  afterEach(() => {
    standIn.copies.reset();
    standIn.fault = () => undefined;
    standIn.left.clear();
    expect(standIn.violations).toEqual([]);
  });
  const check = (options: DeepCheckOptions = {}): Promise<DeepReport> =>
    deepCheck(store.cluster, { settleMs: 100, rate: 2 ** 40, retryMs: 300, ...options });
  const oid = (idx: number, of = vid): bigint => (BigInt(of) << 32n) | BigInt(idx);
  const inodeOid = (of = vid): bigint => (1n << 63n) | (BigInt(of) << 32n);
  /** The numbers of the nodes that should have an object. */
  const holders = async (idx: number, high = vid): Promise<number[]> =>
    new Placement(await store.nodes()).holdersOf(high, idx, 2);
  const address = (node: number): string => `127.0.0.1:${standIn.ports[node]}`;
  const copyOf = (id: bigint): Buffer => Buffer.from(standIn.objects.get(id) as Buffer);

  test('every copy is read from the nodes that should have it; equal copies give no finding', async () => {
    const report = await check();
    // Two inodes; three objects of the snapshot, one of the disk.
    expect(report).toMatchObject({ vdis: 2, objects: 6, problems: [], findings: [], thin: [] });
    for (const idx of [0, 1, 2]) {
      const asked = standIn.seen.filter((request) => request.opcode === PeerOp.READ_PEER && request.oid === oid(idx));
      expect([...new Set(asked.map(({ node }) => node))].sort()).toEqual((await holders(idx)).sort());
      expect(asked.reduce((sum, { length }) => sum + length, 0)).toBe(2 * MIB);
    }
  });

  test('a copy that differs is reported with disk, bytes and nodes, also that of an inode', async () => {
    const [first, second] = (await holders(1)) as [number, number];
    const wrong = copyOf(oid(1));
    wrong.fill(0, 4096, 8192);
    wrong.writeUInt8(wrong.readUInt8(700_000) ^ 1, 700_000);
    standIn.copies.set(second, oid(1), () => wrong);
    const [, inodeNode] = (await holders(0, 0x8000_0000 + vid)) as [number, number];
    const inode = copyOf(inodeOid());
    inode.writeUInt8(1, 300);
    standIn.copies.set(inodeNode, inodeOid(), () => inode);
    const { problems, findings } = await check();
    const data = findings.find(({ part }) => part === 'data');
    expect(data).toMatchObject({
      kind: 'different',
      users: [
        { label: 'vm@a', from: MIB, to: 2 * MIB - 1 },
        { label: 'vm', from: MIB, to: 2 * MIB - 1 },
      ],
      ranges: [
        {
          ...{ from: 4096, to: 8192 },
          contents: [
            { nodes: [address(first)], isZeros: false },
            { nodes: [address(second)], isZeros: true },
          ],
        },
        { from: 699_904, to: 700_416 },
      ],
    });
    expect(findings).toHaveLength(2);
    expect(problems.join('\n')).toContain(
      `different: vm@a, vm: bytes ${MIB + 4096} to ${MIB + 8191} are not the same: ` +
        `${address(first)} | zeros on ${address(second)}; bytes ${MIB + 699_904} to ${MIB + 700_415} are not`,
    );
    expect(problems.join('\n')).toContain('different: the inode of vm@a: bytes 0 to 511 are not the same');
  });

  test('a missing copy is reported as degraded, an object without copies as lost', async () => {
    const [first, second] = (await holders(0)) as [number, number];
    standIn.copies.set(first, oid(0), () => undefined);
    for (const node of [0, 1, 2]) standIn.copies.set(node, oid(1), () => undefined);
    const { problems } = await check();
    expect(problems).toHaveLength(2);
    expect(problems.join('\n')).toContain(
      `degraded: vm@a bytes 0 to ${MIB - 1}, vm bytes 0 to ${MIB - 1}: no copy on ${address(first)}, only on ${address(second)}`,
    );
    expect(problems.join('\n')).toContain(`lost: vm@a bytes ${MIB} to ${2 * MIB - 1}, vm bytes`);
  });

  test('a write that has reached only one node so far is not reported', async () => {
    const [first] = (await holders(1)) as [number, number];
    const after = copyOf(oid(1));
    after.fill(9, 0, 65536);
    let isUnderWay = true;
    let seen = 0;
    // It has arrived at the last look but one.
    standIn.copies.set(first, oid(1), () => {
      if (++seen > 6) isUnderWay = false;
      return isUnderWay ? after : standIn.objects.get(oid(1));
    });
    expect((await check({ settleMs: 500 })).problems).toEqual([]);
    expect(isUnderWay).toBe(false);
  });

  test('bytes that change all the time are reported only if their copies are never equal', async () => {
    const nodes = (await holders(1)) as [number, number];
    let writes = 0;
    const content = (): Buffer => {
      const bytes = copyOf(oid(1));
      bytes.writeUInt32LE(++writes, 4096);
      return bytes;
    };
    // Most looks see one node before the write and the other node after it.
    let isBefore = 0;
    let last = content();
    for (const node of nodes) {
      standIn.copies.set(node, oid(1), () => {
        if (isBefore++ % 7 !== 0) last = content();
        return last;
      });
    }
    expect((await check()).problems).toEqual([]);
    for (const node of nodes) standIn.copies.set(node, oid(1), content);
    expect((await check()).problems.join()).toMatch(
      /^different: vm@a, vm: bytes \d+ to \d+ are not the same: [^|]+ \| [^|;]+$/,
    );
  });

  test('the check reads nothing while nodes recover, and continues after a change of members', async () => {
    const notes: string[] = [];
    standIn.copies.recovering = { finished: 3, total: 9 };
    const checking = check({ note: (line) => notes.push(line) });
    await until('it has noticed', () => notes.length > 0);
    standIn.copies.recovering = undefined;
    let reads = 0;
    standIn.fault = ({ opcode }) => {
      if (opcode === PeerOp.READ_PEER && ++reads === 5) standIn.copies.epoch = 2;
      return undefined;
    };
    expect((await checking).problems).toEqual([]);
    expect(notes).toEqual([
      expect.stringMatching(/^nodes recover \(9 of 27 objects\): the check waits until they have finished/),
      'the nodes have recovered',
    ]);
  });

  test('an unreachable node ends the check with an error that names it, and earlier findings are reported', async () => {
    const [first] = (await holders(0)) as [number];
    standIn.copies.set(first, oid(0), () => undefined);
    let isDown = false;
    standIn.fault = ({ opcode, node }) => {
      isDown ||= opcode === PeerOp.READ_PEER && standIn.seen.filter((each) => each.opcode === opcode).length > 20;
      return isDown && node === 2 && opcode > 0x80 ? { cut: 'before' } : undefined;
    };
    const { stoppedBy } = await check({ settleMs: 5_000 });
    expect(stoppedBy?.message).toMatch(new RegExp(`the node ${address(2)} cannot be asked: .*closed the connection`));
  });

  test('a check can be interrupted at any time', async () => {
    const controller = new AbortController();
    standIn.fault = ({ opcode }) => {
      if (opcode === PeerOp.READ_PEER) controller.abort(new Error('that will do'));
      return undefined;
    };
    const report = await check({ signal: controller.signal });
    expect(report.stoppedBy?.message).toBe('that will do');
    expect(report.objects).toBeLessThan(6);
  });

  test('a disk with more copies than the cluster has zones is one finding', async () => {
    standIn.left.add(1).add(2);
    const { thin, problems } = await check();
    expect(thin).toEqual([
      { label: 'vm@a', copies: 2, zones: 1 },
      { label: 'vm', copies: 2, zones: 1 },
    ]);
    expect(problems[0]).toMatch(
      /^degraded: all of vm@a, vm: 2 copies or strips are wanted, and the cluster has nodes in 1 zone/,
    );
    expect(problems).toHaveLength(1);
  });

  test('a disk with a damaged inode does not hide findings of other disks', async () => {
    const [first] = (await holders(2)) as [number];
    standIn.copies.set(first, oid(2), () => undefined);
    const inode = standIn.objects.get(inodeOid(vid + 1)) as Buffer;
    inode.writeUInt8(200, 555);
    const { problems } = await check();
    inode.writeUInt8(20, 555);
    expect(problems).toEqual([
      'not compared: vm: its inode is damaged (objects of 2^200 bytes)',
      expect.stringMatching(/^degraded: vm@a bytes \d+ to \d+: no copy on/),
    ]);
  });

  test('two VDIs with the same label are reported with their ids', async () => {
    const [first] = (await holders(0)) as [number];
    standIn.copies.set(first, oid(0), () => undefined);
    const inode = standIn.objects.get(inodeOid(vid + 1)) as Buffer;
    inode.write('vm@a', 0);
    const { findings } = await check();
    inode.write('vm\0\0', 0);
    expect(findings[0]?.users.map(({ label }) => label)).toEqual(['vm@a', `vm@a (@${(vid + 1).toString(16)})`]);
  });

  test('with disk vnodes each object is read from the nodes whose disks it belongs on', async () => {
    const byDisk = await new StandIn({ jitterMs: 0, diskVnodes: true, nodes: 4 }).start();
    const its = await SheepStore.open(byDisk.address);
    const disks = new VdiCatalog(its);
    await disks.create('vm', 16 * MIB, { blockSizeShift: 20 });
    const vdi = await disks.openVdi('vm');
    await vdi.write(0, patterned(16 * MIB, 1), false);
    const of = vdi.record.vid;
    await disks.release(vdi);
    const nodes = await its.nodes();
    const [usual, right] = [new Placement(nodes), new Placement(nodes, true)];
    const holdersBy = (placement: Placement, idx: number): number[] => placement.holdersOf(of, idx, 2);
    // Placed by nodes, it would be elsewhere.
    const idx =
      [...Array(16).keys()].find((n) => !holdersBy(usual, n).includes(holdersBy(right, n)[1] as number)) ?? -1;
    expect((await deepCheck(its.cluster, { rate: 2 ** 40 })).problems).toEqual([]);
    byDisk.copies.set(holdersBy(right, idx)[1] as number, oid(idx, of), () => undefined);
    const { problems } = await deepCheck(its.cluster, { rate: 2 ** 40, settleMs: 100 });
    expect(problems).toEqual([expect.stringMatching(new RegExp(`^degraded: vm bytes ${idx * MIB} to`))]);
    expect(byDisk.violations).toEqual([]);
    await disks.close();
    await byDisk.stop();
  });

  test('a cluster of 0.9 is refused at once', async () => {
    const old = await new StandIn({ jitterMs: 0 }).start();
    old.version = '0.9';
    const oldStore = await SheepStore.open(old.address);
    await expect(deepCheck(oldStore.cluster)).rejects.toThrow(
      /Sheepdog 0.9: copies are compared in clusters of 1.0 only/,
    );
    await oldStore.close();
    await old.stop();
  });

  test('the command runs beside clients, with a daemon or without, and exits with 1 if it has findings', async () => {
    const [first] = (await holders(0)) as [number];
    const daemon = await startDaemon({ cluster: standIn.address });
    const client = await attach(daemon, 'vm');
    const fine = await cli(['check', '--deep', '--cluster', standIn.address]);
    expect({ code: fine.code, stderr: fine.stderr }).toEqual({ code: 0, stderr: '' });
    expect(fine.stdout).toMatch(/^2 VDIs and snapshots, 6 objects, .* read from their nodes, 0 problems\n$/);
    standIn.copies.set(first, oid(0), () => undefined);
    // The cluster is the daemon's.
    const result = await cli(['check', '--deep', '--settle', '0.1', '--control', daemon.control]);
    expect(result.code, result.stderr).toBe(1);
    expect(result.stdout).toMatch(/^degraded: vm@a bytes .* 1 problems\n$/s);
    const json = await cli(['check', '--deep', '--settle', '0.1', '--json', '--cluster', standIn.address]);
    expect(json.code).toBe(1);
    expect(JSON.parse(json.stdout)).toMatchObject({
      ...{ vdis: 2, objects: 6, isComplete: true, problemsLeft: 1, thin: [] },
      findings: [{ kind: 'missing', part: 'data', missingOn: [address(first)], users: [{ label: 'vm@a' }, {}] }],
    });
    // At the slowest rate it takes 12 s: it has just begun.
    standIn.seen.length = 0;
    const slow = ['check', '--deep', '--rate', '1M', '--cluster', standIn.address];
    const interrupted = start(process.execPath, [BIN, ...slow]);
    let out = '';
    interrupted.stdout.on('data', (text: Buffer) => (out += text.toString()));
    await waitUntil(() => standIn.seen.some(({ opcode }) => opcode === PeerOp.READ_PEER), 'it reads');
    interrupted.kill('SIGINT');
    expect(await ended(interrupted)).toEqual({ code: 130, signal: null });
    expect(out).toMatch(/ read from their nodes, 0 problems; not everything was read\n$/);
    await client.disconnect();
    await daemon.stop();
  });

  test('a VDI that is deleted during the check is not reported as lost', async () => {
    const checking = check({ settleMs: 1000 });
    // The object that only the snapshot has.
    for (const node of [0, 1, 2]) standIn.copies.set(node, oid(2), () => undefined);
    await catalog.remove('vm@a');
    expect((await checking).problems).toEqual([]);
  });
});

test('a local store has no copies to compare: it refuses --deep and says what to do instead', async () => {
  const { argument } = localPlace();
  await cliJson(['vdi', 'create', 'vm', '1M', '--store', argument, '--json']);
  for (const [args, why] of [
    [['check', '--deep', '--store', argument], /--deep compares the copies on the nodes of a cluster/],
    [['check', '--deep', '--repair', '--store', argument], /'--deep' cannot be used with option '--repair'/],
    [['check', '--rate', '5M', '--store', argument], /--rate is an option of check --deep/],
    [['check', '--deep', '--rate', '5K', '--store', argument], /must be at least 1M/],
    [['check', '--deep', '--settle', 'x', '--store', argument], /must be 0 to 3600/],
  ] as const) {
    expect(oneLineOf(await cli(args), 2, args.join(' '))).toMatch(why);
  }
});
