/**
 * Rolling restarts of real nodes under load: every node is killed in turn, comes back three seconds later and recovers,
 * while a client that knows all it wrote continues. In the same runs two bare clients: the first with any number of writes
 * in flight, the second with a single write in flight per object. At the end the test compares the clients' knowledge, reads
 * through this program, reads of `dog vdi read`, and every copy on the nodes' disks.
 *
 * A round takes 25 s; the test is skipped unless SHEEPGATE_ROLLING gives the number of rounds. Variations:
 * SHEEPGATE_ROLLING_FORMAT ("-c 2:1"), _NODES, _MIB (of each disk), _READS (share of reads, 0.3), _PREALLOCATED=1, _BARE=0
 * (without bare clients), _OURS=0 (bare clients only), _AT_ONCE (nodes killed together), _GATEWAY=1 (all clients use one
 * more node, which keeps no objects and is never killed), _LOG=1 (prints each kill, return and recovery). The result of each
 * round is printed.
 *
 * Nodes that end themselves (docs/cluster.md, "When nodes crash") are counted, and started again at once, as an operator or
 * a service manager does.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import { parseClusterAddress } from '../../src/store/sheep/cluster-address.js';
import { NodeConnection } from '../../src/store/sheep/connection.js';
import { deepCheck } from '../../src/store/sheep/deep/deep-check.js';
import { Flag, Opcode } from '../../src/sheepdog/protocol.js';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { realNodesMissing, startRealNodes, type RealNodes } from './clusters.js';
import { differingObjects, VerifiedLoad, type LoadedDisk } from './rolling-load.js';
import { encodeObjectRequest } from '../../src/sheepdog/headers.js';

const env = process.env;
const ROUNDS = Number(env['SHEEPGATE_ROLLING'] ?? 0);
const FORMAT = env['SHEEPGATE_ROLLING_FORMAT'] ?? '-c 2';
const NODES = Number(env['SHEEPGATE_ROLLING_NODES'] ?? 3);
const SIZE = Number(env['SHEEPGATE_ROLLING_MIB'] ?? 64) * 2 ** 20;
const READS = Number(env['SHEEPGATE_ROLLING_READS'] ?? 0.3);
const IS_PREALLOCATED = env['SHEEPGATE_ROLLING_PREALLOCATED'] === '1';
const AT_ONCE = Number(env['SHEEPGATE_ROLLING_AT_ONCE'] ?? 1);
const WITH_BARE = env['SHEEPGATE_ROLLING_BARE'] !== '0';
const WITH_OURS = env['SHEEPGATE_ROLLING_OURS'] !== '0';
const WITH_GATEWAY = env['SHEEPGATE_ROLLING_GATEWAY'] === '1';
const IS_CODED = FORMAT.includes(':');
const IS_VERBOSE = env['SHEEPGATE_ROLLING_LOG'] === '1';
const OBJECT = 4 * 2 ** 20;
const DEPTH = 8;
const AWAY_MS = 3_000;
const BEFORE_MS = 1_000;
const ROUND_MS = 300_000;
const RECOVERY_MS = 120_000;
/** Interval of the checks whether a node has ended itself. */
const SUPERVISION_MS = 100;
const RESTART_MS = 1_000;
/** Strips are compared when no client writes any more. */
const SETTLE_MS = 300;

const missing = ROUNDS > 0 ? realNodesMissing() : 'SHEEPGATE_ROLLING does not say how many rounds';
if (missing !== undefined) console.log(`no rolling restarts of real nodes: ${missing}`);

/** Uses one node at a time, and the next one when it fails; repeats nothing. The disk's objects must exist. */
class BareClient implements LoadedDisk {
  readonly #vid: number;
  readonly #addresses;
  #node = 0;
  #connection: Promise<NodeConnection> | undefined;

  constructor(cluster: RealNodes, vid: number) {
    this.#vid = vid;
    this.#addresses = parseClusterAddress(cluster.address);
  }

  read(offset: number, into: Buffer): Promise<void> {
    return this.#inObjects(offset, into, async (idx, at, part) => {
      await this.#ask(encodeObjectRequest(Opcode.READ_OBJ, 0, this.#vid, idx, at, part.length), { receive: part });
    });
  }

  write(offset: number, data: Buffer): Promise<void> {
    return this.#inObjects(offset, data, async (idx, at, part) => {
      await this.#ask(encodeObjectRequest(Opcode.WRITE_OBJ, Flag.WRITE, this.#vid, idx, at, part.length), {
        data: part,
      });
    });
  }

  close(): void {
    void this.#connection?.then((connection) => connection.destroy());
  }

  async #inObjects(
    offset: number,
    bytes: Buffer,
    work: (idx: number, at: number, part: Buffer) => Promise<void>,
  ): Promise<void> {
    for (let done = 0; done < bytes.length;) {
      const at = (offset + done) % OBJECT;
      const length = Math.min(OBJECT - at, bytes.length - done);
      await work(Math.floor((offset + done) / OBJECT), at, bytes.subarray(done, done + length));
      done += length;
    }
  }

  async #ask(header: Buffer, bytes: { data?: Buffer; receive?: Buffer }): Promise<void> {
    for (const until = Date.now() + 60_000; ;) {
      try {
        const answer = await (await this.#connected()).send({ header, ...bytes }, 60_000);
        if (answer.result === 0) return;
        if (Date.now() > until) throw new Error(`a node answers ${answer.result}`);
      } catch (error) {
        if (Date.now() > until) throw error;
      }
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  }

  #connected(): Promise<NodeConnection> {
    this.#connection ??= this.#connect();
    return this.#connection;
  }

  async #connect(): Promise<NodeConnection> {
    const address = this.#addresses[this.#node++ % this.#addresses.length];
    if (!address) throw new Error('no address');
    try {
      return await NodeConnection.connect(address, () => (this.#connection = undefined));
    } catch (error) {
      this.#connection = undefined;
      throw error;
    }
  }
}

interface Outcome {
  wrongReads: number;
  errors: number;
  /** Objects that differ from the client's knowledge: as read through this program, by `dog`, on a node's disk. */
  ours: number;
  dogs: number;
  copies: number;
  writes: number;
}

/** By name of the VDI: objects whose strips do not match each other, or are missing. */
async function wrongStrips(store: SheepStore): Promise<Map<string, number>> {
  const report = await deepCheck(store.cluster, { rate: 2 ** 40, settleMs: SETTLE_MS });
  if (report.stoppedBy) throw report.stoppedBy;
  const found = new Map<string, number>();
  for (const { users } of report.findings) {
    for (const { label } of users) found.set(label, (found.get(label) ?? 0) + 1);
  }
  return found;
}

/** Objects with a copy that differs, on a node that should have it; copies left on other nodes are not read. */
function differingCopies(cluster: RealNodes, name: string, vid: number, expected: Buffer): number[] {
  const ports = parseClusterAddress(cluster.address).map(({ port }) => port);
  // The first node keeps no objects.
  if (WITH_GATEWAY) ports.shift();
  const found = new Set<number>();
  for (const [n, port] of ports.entries()) {
    const objects = path.join(cluster.directory, `node${n}`, 'obj');
    for (const file of fs.readdirSync(objects)) {
      if (file.length !== 16 || !file.startsWith(vid.toString(16).padStart(8, '0'))) continue;
      const idx = parseInt(file.slice(8), 16);
      const content = fs.readFileSync(path.join(objects, file)).subarray(0, OBJECT);
      if (content.equals(expected.subarray(idx * OBJECT, (idx + 1) * OBJECT))) continue;
      const at = ['-a', '127.0.0.1', '-p', String(cluster.livePort()), '-i', String(idx)];
      const places = execFileSync('dog', ['vdi', 'object', 'location', ...at, name], { encoding: 'utf8' })
        .trimEnd()
        .split('\n');
      if (places.at(-1)?.includes(`:${port}`)) found.add(idx);
    }
  }
  return [...found];
}

/** A node that has just come back, or is being started again, does not answer at first. */
async function recovered(cluster: RealNodes): Promise<void> {
  for (const until = Date.now() + RECOVERY_MS; ; void (await sleep(200))) {
    try {
      await cluster.recovered();
      if (cluster.endedNodes().length === 0) return;
    } catch (error) {
      if (Date.now() > until) throw error;
    }
  }
}

/** Restarts nodes that end themselves. */
class Supervisor {
  /** The end of the log of each. */
  readonly crashes: string[] = [];
  readonly #cluster: RealNodes;
  readonly #timer: NodeJS.Timeout;
  #isStarting = false;
  #isOver = false;

  constructor(cluster: RealNodes) {
    this.#cluster = cluster;
    this.#timer = setInterval(() => void this.#look(), SUPERVISION_MS);
  }

  stop(): void {
    this.#isOver = true;
    clearInterval(this.#timer);
  }

  async #look(): Promise<void> {
    const ended = this.#cluster.endedNodes();
    if (this.#isStarting || ended.length === 0) return;
    this.#isStarting = true;
    const lines = this.#cluster.crashes();
    this.crashes.push(...lines);
    if (IS_VERBOSE) console.log(new Date().toISOString(), 'ended themselves:', lines.join('; '));
    // One after the other: a starting node ends as well if a node that it asks ends at that moment.
    for (const n of ended) {
      await sleep(RESTART_MS);
      if (this.#isOver) return;
      await this.#cluster.returnNode(n).catch(() => undefined);
    }
    this.#isStarting = false;
  }
}

/** Errors: `Error` (if the nodes do not recover in time). */
async function round(cluster: RealNodes): Promise<Record<string, Outcome>> {
  /** Disks whose parity is being rewritten: an operator waits for that before the next node. */
  const renewing = new Set<string>();
  const log = (line: string): void => {
    const [disk = ''] = line.split(':');
    // Rewriting may begin several times before it is done.
    if (line.includes('rebuilding the parity')) renewing.add(disk);
    if (line.includes('all parity is new')) renewing.delete(disk);
    if (IS_VERBOSE) console.log(new Date().toISOString(), line);
  };
  const store = await SheepStore.open(cluster.address, { log });
  const catalog = new VdiCatalog(store);
  const loads: Record<string, VerifiedLoad> = {};
  const bare: BareClient[] = [];
  try {
    return await roundWith(cluster, { store, catalog, loads, bare, isRenewing: () => renewing.size > 0 });
  } finally {
    for (const load of Object.values(loads)) void load.end();
    for (const client of bare) client.close();
    await catalog.close().catch(() => undefined);
  }
}

interface Clients {
  readonly store: SheepStore;
  readonly catalog: VdiCatalog;
  readonly loads: Record<string, VerifiedLoad>;
  readonly bare: BareClient[];
  readonly isRenewing: () => boolean;
}

async function roundWith(
  cluster: RealNodes,
  { store, catalog, loads, bare, isRenewing }: Clients,
): Promise<Record<string, Outcome>> {
  const vids: Record<string, number> = {};
  const make = async (name: string, isFull: boolean): Promise<number> => {
    await catalog.create(name, SIZE);
    const vdi = await catalog.openVdi(name);
    // Written once with zeros, so that all objects exist with the expected content.
    if (isFull) for (let at = 0; at < SIZE; at += OBJECT) await vdi.write(at, Buffer.alloc(OBJECT), false);
    vids[name] = vdi.record.vid;
    return vdi.record.vid;
  };
  const options = { size: SIZE, objectSize: OBJECT, depth: DEPTH, readShare: READS };
  if (WITH_BARE) {
    const many = new BareClient(cluster, await make('bare-many', true));
    const single = new BareClient(cluster, await make('bare-single', true));
    bare.push(many, single);
    loads['bare-many'] = new VerifiedLoad(many, options);
    loads['bare-single'] = new VerifiedLoad(single, { ...options, writesPerObject: 1 });
  }
  if (WITH_OURS) {
    await make('ours', IS_PREALLOCATED);
    const vdi = await catalog.openVdi('ours');
    const disk: LoadedDisk = {
      read: async (offset, into) => vdi.read(offset, into),
      write: async (offset, data) => vdi.write(offset, data, false),
    };
    loads['ours'] = new VerifiedLoad(disk, options);
  }
  for (let node = 0; node < NODES; node += AT_ONCE) {
    await sleep(BEFORE_MS);
    const killed = Array.from({ length: Math.min(AT_ONCE, NODES - node) }, (_, n) => node + n);
    if (IS_VERBOSE) console.log(new Date().toISOString(), 'kill', ...killed);
    for (const n of killed) await cluster.killNode(n);
    await sleep(AWAY_MS);
    if (IS_VERBOSE) console.log(new Date().toISOString(), 'return', ...killed);
    for (const n of killed) await cluster.returnNode(n);
    await recovered(cluster);
    if (IS_VERBOSE) console.log(new Date().toISOString(), 'recovered');
    if (!IS_CODED) continue;
    const isDone = (): boolean => store.cluster.recovery.isSteady && !isRenewing();
    for (const until = Date.now() + 60_000; !isDone() && Date.now() < until;) await sleep(50);
  }
  await Promise.all(Object.values(loads).map((load) => load.end()));
  await recovered(cluster);
  const strips = IS_CODED ? await wrongStrips(store) : undefined;
  const outcomes: Record<string, Outcome> = {};
  for (const [name, load] of Object.entries(loads)) {
    const copy = path.join(cluster.directory, 'read');
    const port = String(cluster.livePort());
    execFileSync('sh', ['-c', `dog vdi read -a 127.0.0.1 -p ${port} ${name} 0 ${SIZE} > ${copy}`]);
    const throughUs = Buffer.alloc(SIZE);
    await (await catalog.openVdi(name)).read(0, throughUs);
    outcomes[name] = {
      wrongReads: load.wrongReads.length,
      errors: load.errors.length,
      ours: differingObjects(throughUs, load.expected, OBJECT).length,
      dogs: differingObjects(fs.readFileSync(copy), load.expected, OBJECT).length,
      copies: strips
        ? (strips.get(name) ?? 0)
        : differingCopies(cluster, name, vids[name] as number, load.expected).length,
      writes: load.writes,
    };
    if (load.errors.length > 0) console.log(name, load.errors.slice(0, 3));
    if (IS_VERBOSE && load.wrongReads.length > 0) console.log(name, load.wrongReads.slice(0, 5));
  }
  return outcomes;
}

describe.skipIf(missing !== undefined)('rolling restarts of real nodes under load', () => {
  test(
    'the client’s knowledge, reads through this program, reads of dog and all copies are equal',
    async () => {
      const corrupted: Record<string, number> = {};
      let unfinished = 0;
      let crashed = 0;
      for (let n = 1; n <= ROUNDS; n++) {
        const cluster = await startRealNodes({ nodes: NODES, withGateway: WITH_GATEWAY, format: FORMAT.split(' ') });
        const supervisor = new Supervisor(cluster);
        try {
          const outcomes = await round(cluster);
          for (const [name, { wrongReads, errors, ours, dogs, copies }] of Object.entries(outcomes)) {
            corrupted[name] = (corrupted[name] ?? 0) + (wrongReads + errors + ours + dogs + copies > 0 ? 1 : 0);
          }
          console.log(`round ${n}: ${JSON.stringify(outcomes)}; corrupted so far: ${JSON.stringify(corrupted)}`);
        } catch (error) {
          unfinished++;
          console.log(`round ${n} came to no end (${unfinished} so far): ${(error as Error).message}`);
        } finally {
          supervisor.stop();
          await cluster.stop();
        }
        const { crashes } = supervisor;
        if (crashes.length === 0) continue;
        console.log(
          `nodes ended themselves in ${++crashed} rounds, in this ${crashes.length} times: ${crashes.join('; ')}`,
        );
      }
      expect(unfinished).toBe(0);
      expect(corrupted['ours'] ?? 0).toBe(0);
    },
    Math.max(1, ROUNDS) * ROUND_MS,
  );
});
