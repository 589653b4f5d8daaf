/** Log lines about requests that wait for nodes: the disk, the nodes, the reason, the time; and how often they are repeated. */
import { afterEach, describe, expect, test } from 'vitest';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { WAITING_CHECK_MS, WaitingLog, type Waiter } from '../../src/store/sheep/waiting.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import type { Vdi } from '../../src/vdi/vdi.js';
import { waitUntil } from '../harness/daemon.js';
import { Op, Res, StandIn, type Seen } from './stand-in.js';

const SECOND = 1_000;
const MINUTE = 60 * SECOND;
const ATTEMPT_MS = 1_000;

describe('lines', () => {
  let lines: string[] = [];
  let now = 0;
  let log = new WaitingLog((line) => lines.push(line));

  afterEach(() => {
    lines = [];
    now = 0;
    log = new WaitingLog((line) => lines.push(line));
  });

  /** Advances to `end`, and gives the lines until then. */
  function pass(end: number, waiting: readonly (readonly [string, Waiter])[] = []): string[] {
    for (; now < end; now += WAITING_CHECK_MS) log.check(waiting, now);
    return lines.splice(0);
  }

  test('are written when requests of a disk wait, ever less often while they wait, and when the wait is over', () => {
    const waiter = { since: 0, why: 'n1 has not answered' };
    now = 5 * SECOND;
    const told = pass(2 * 60 * MINUTE, [
      ['vm1', waiter],
      ['vm1', { since: 3 * SECOND, why: 'n1 has not answered' }],
      ['vm2', { since: 4 * SECOND, why: 'n2 has not answered' }],
    ]);
    expect(told.slice(0, 4)).toEqual([
      'vm1: 2 requests wait for the cluster, the oldest for 5 s: n1 has not answered',
      'vm2: a request waits for the cluster for 1 s: n2 has not answered',
      'vm1: 2 requests wait for the cluster, the oldest for 15 s: n1 has not answered',
      'vm2: a request waits for the cluster for 11 s: n2 has not answered',
    ]);
    expect(told.length).toBeGreaterThan(2 * 12);
    expect(told.length).toBeLessThan(2 * 20);
    expect(pass(now + SECOND, [['vm2', { since: 4 * SECOND, why: 'n2 has not answered' }]])).toEqual([
      'vm1: no request waits for the cluster any more, after 7200 s',
    ]);
  });

  test('name a few reasons and the number of the others', () => {
    const waiting = Array.from({ length: 9 }, (_, n) => ['vm1', { since: 0, why: `n${n} has not answered` }] as const);
    expect(pass(1, waiting)[0]).toMatch(/n0 .*; n1 .*; n2 .*; n3 .*; and 5 more reasons$/);
  });

  test('of a disk that waits again and again are not more frequent, and say how often it waited', () => {
    let told: string[] = [];
    for (let n = 0; n < 100; n++) {
      told = [...told, ...pass(now + 2 * SECOND, [['vm1', { since: now, why: 'n1 has not answered' }]])];
      told = [...told, ...pass(now + 2 * SECOND)];
    }
    told = [...told, ...pass(now + 20 * MINUTE)];
    expect(told.length).toBeLessThan(20);
    const episodes = told.filter((line) => /a request waits for/.test(line)).length;
    const untold = told.reduce((sum, line) => sum + Number(/\((\d+) more times? since/.exec(line)?.[1] ?? 0), 0);
    expect(episodes + untold).toBe(100);
    // The earlier waits are forgotten by now: logged at once.
    expect(pass(now + 1, [['vm1', { since: now, why: 'n1 has not answered' }]])).toHaveLength(1);
  });
});

describe('requests', () => {
  let cluster: StandIn;
  let catalog: VdiCatalog;
  let lines: string[];

  async function connect(nodes: number, waitingMs = 200, attemptMs = 30_000): Promise<Vdi> {
    cluster = await new StandIn({ nodes, jitterMs: 0 }).start();
    lines = [];
    const log = (line: string): void => void lines.push(line);
    const store = await SheepStore.open(cluster.address, { attemptMs, waitingMs, log });
    catalog = new VdiCatalog(store);
    await catalog.create('disk', 2 ** 22, { blockSizeShift: 20 });
    const vdi = await catalog.openVdi('disk');
    await vdi.write(0, Buffer.alloc(4096, 1), false);
    return vdi;
  }

  afterEach(async () => {
    cluster.fault = () => undefined;
    await catalog.close().catch(() => undefined);
    await cluster.stop();
  });

  const isWrite = ({ opcode }: Seen): boolean => opcode === Op.WRITE;
  const told = (what: RegExp): Promise<string> =>
    waitUntil(() => lines.find((line) => what.test(line)), `${String(what)} is told`);

  test.each([
    ['a write', (vdi: Vdi) => vdi.write(0, Buffer.alloc(4096, 2), false)],
    ['a read', (vdi: Vdi) => vdi.read(0, Buffer.alloc(4096))],
    ['the first write to an object', (vdi: Vdi) => vdi.write(2 ** 20, Buffer.alloc(4096, 2), false)],
  ])('%s to a node that does not answer names the disk and the node', async (_what, ask) => {
    const vdi = await connect(1);
    let goOn: () => void = () => undefined;
    const resumed = new Promise<void>((resolve) => (goOn = resolve));
    cluster.fault = () => ({ until: resumed });
    const asked = Promise.resolve(ask(vdi));
    expect(await told(/^disk: a request waits/)).toMatch(
      /^disk: a request waits for the cluster for \d s: 127\.0\.0\.1:\d+ has not answered/,
    );
    cluster.fault = () => undefined;
    goOn();
    await asked;
    await told(/^disk: no request waits for the cluster any more/);
  });

  test('a read of an object shared with a snapshot names the disk that is read', async () => {
    const vdi = await connect(1, 600);
    await catalog.snapshot('disk', 'old');
    let goOn: () => void = () => undefined;
    const resumed = new Promise<void>((resolve) => (goOn = resolve));
    cluster.fault = ({ opcode }) => (opcode === Op.READ ? { until: resumed } : undefined);
    const reading = Promise.resolve(vdi.read(0, Buffer.alloc(4096)));
    await told(/^disk: a request waits/);
    goOn();
    await reading;
  });

  test('the answer of a halted cluster is the reason while the request is repeated', async () => {
    const vdi = await connect(1);
    cluster.fault = (request) => (isWrite(request) ? { result: Res.HALT } : undefined);
    const halted = Promise.resolve(vdi.write(0, Buffer.alloc(4096, 2), false));
    expect(await told(/^disk: a request waits/)).toMatch(
      /^disk: a request waits .*: the cluster answers .*HALT.* \(127\.0\.0\.1:\d+\)$/,
    );
    cluster.fault = () => undefined;
    await halted;
  });

  test('unreachable nodes are the reason until a node is reachable', async () => {
    const vdi = await connect(1);
    const [port] = cluster.ports;
    await cluster.stop();
    const alone = Promise.resolve(vdi.read(0, Buffer.alloc(4096)));
    expect(await told(/^disk: a request waits/)).toMatch(
      /^disk: a request waits .*: cannot connect to 127\.0\.0\.1:\d+: .*ECONNREFUSED/,
    );
    await cluster.startNode(0, port as number);
    await alone;
  });

  test('the reason of a write that a silent member may still carry out says so', async () => {
    const vdi = await connect(3, ATTEMPT_MS + 500, ATTEMPT_MS);
    let goOn: () => void = () => undefined;
    const resumed = new Promise<void>((resolve) => (goOn = resolve));
    // The first node is the node in use.
    cluster.fault = ({ node }) => (node === 0 ? { until: resumed } : undefined);
    const writing = Promise.resolve(vdi.write(0, Buffer.alloc(4096, 2), false));
    expect(await told(/^disk: a request waits/)).toMatch(
      /^disk: .*127\.0\.0\.1:\d+ did not answer in time, and may still carry out the request/,
    );
    goOn();
    await writing;
  });
});
