/**
 * The clusters that the suite runs against: the stand-in always, real nodes where `sheep` and `dog` are on the PATH. Owns
 * their start and end, and the ways to inspect them from outside.
 */
import { execFile, execFileSync, spawn, type ChildProcess } from 'node:child_process';
import fs from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { promisify } from 'node:util';
import { afterAll } from 'vitest';
import { StandIn, type StandInOptions } from './stand-in.js';

const run = promisify(execFile);
const NODES = 3;
const START_TIMEOUT_MS = 60_000;

/** Ends real nodes that a failed test, or a failed start, has left. */
const stops: (() => Promise<void>)[] = [];
afterAll(async () => {
  for (const stop of stops) await stop();
});

export interface RealNodes extends TestCluster {
  readonly directory: string;
  /** Of the first node. */
  readonly port: number;
  /** Run `dog`; its first two arguments are the command. */
  dog(...args: string[]): Promise<string>;
  /** Start a killed node at once, even while others recover. */
  returnNode(n: number): Promise<void>;
  /** Nodes that have ended by themselves and were not started again. */
  endedNodes(): number[];
  /** The process of a running node. */
  livePort(): number;
  /** SIGSTOP: the node keeps its connections and does nothing. */
  pauseNode(n: number): void;
  resumeNode(n: number): void;
}

export interface RealNodesOptions {
  readonly nodes?: number;
  /** One more node, which keeps no objects (`sheep -g`). It is the last one, and the first in `address`. */
  readonly withGateway?: boolean;
  /** Options for `dog cluster format`. */
  readonly format?: readonly string[];
}

export interface TestCluster {
  /** Value for --cluster. */
  readonly address: string;
  /** Does what `dog vdi snapshot` does, as another client. */
  snapshot(name: string, tag: string): Promise<void>;
  /** Does what `dog vdi lock unlock` does with the lock that a killed client has left; nothing in a cluster without locks. */
  unlock(name: string): Promise<void>;
  /** Oids of existing data objects, leaves of hyper volumes and ledgers, once the references given up so far are accounted for. */
  objects(): Promise<string[]>;
  /** Remove a data object from all nodes, as if their disks died together. */
  loseObject(vid: number, idx: number): void;
  /** The snapshots of a VDI as `dog` lists them, oldest first; undefined without `dog`. */
  tagsSeen(name: string): Promise<string[] | undefined>;
  killNode(n: number): Promise<void>;
  restartNode(n: number): Promise<void>;
  /** Resolves when recovery has moved all objects after a change of members. */
  recovered(): Promise<void>;
  /** The end of the log of each node that has ended by itself. */
  crashes(): string[];
  /** Violations of the protocol that the stand-in saw. */
  violations(): readonly string[];
  stop(): Promise<void>;
}

export async function startStandIn(options: StandInOptions = {}): Promise<TestCluster> {
  const cluster = await new StandIn({ nodes: NODES, ...options }).start();
  const ports = [...cluster.ports];
  return {
    address: cluster.address,
    snapshot: (name, tag) => {
      cluster.externalSnapshot(name, tag);
      return Promise.resolve();
    },
    unlock: () => Promise.resolve(),
    objects: async () => {
      await cluster.settled();
      return [...cluster.dataObjects(), ...[...cluster.ledgers.keys()].map((oid) => `ledger ${oid.toString(16)}`)];
    },
    loseObject: (vid, idx) => {
      if (!cluster.objects.delete((BigInt(vid) << 32n) | BigInt(idx))) throw new Error('there is no such object');
    },
    tagsSeen: () => Promise.resolve(undefined),
    killNode: (n) => cluster.stopNode(n),
    restartNode: (n) => cluster.startNode(n, ports[n] as number),
    recovered: () => Promise.resolve(),
    crashes: () => [],
    violations: () => cluster.violations,
    stop: () => cluster.stop(),
  };
}

/** Why no real nodes can be tested; undefined if they can. */
export function realNodesMissing(): string | undefined {
  for (const tool of ['sheep', 'dog']) {
    try {
      execFileSync('which', [tool], { stdio: 'ignore' });
    } catch {
      return `${tool} is not on the PATH`;
    }
  }
  return undefined;
}

/** Nodes on loopback, each with its own directory: by default three, with two copies. */
export async function startRealNodes(options: RealNodesOptions = {}): Promise<RealNodes> {
  const { nodes: keepers = NODES, withGateway = false, format = ['-c', '2'] } = options;
  const count = withGateway ? keepers + 1 : keepers;
  const memory = fs.existsSync('/dev/shm') ? '/dev/shm' : os.tmpdir();
  const directory = fs.mkdtempSync(path.join(memory, 'sheepgate-nodes-'));
  const ports = await freePorts(count);
  const nodes: (ChildProcess | undefined)[] = [];
  const start = async (n: number): Promise<void> => {
    const port = String(ports[n]);
    const home = path.join(directory, `node${n}`);
    fs.mkdirSync(home, { recursive: true });
    nodes[n] = spawn(
      'sheep',
      // Without syncs: these tests do not test the disk.
      [
        '-f',
        '-n',
        '-b',
        '127.0.0.1',
        '-y',
        '127.0.0.1',
        '-p',
        port,
        '-z',
        String(n),
        '-c',
        `local:${directory}/shm`,
        ...(n === keepers ? ['-g'] : []),
        home,
      ],
      { stdio: 'ignore' },
    );
    await until(`node ${n} listens`, () => canConnect(ports[n] as number));
  };
  const isRunning = (node: ChildProcess | undefined): boolean => node?.exitCode === null && node.signalCode === null;
  const livePort = (): number => ports[nodes.findIndex(isRunning)] as number;
  const endedNodes = (): number[] => [...nodes.keys()].filter((n) => nodes[n] && !isRunning(nodes[n]));
  const dog = async (...args: string[]): Promise<string> => {
    const port = livePort();
    return (await run('dog', [...args.slice(0, 2), '-a', '127.0.0.1', '-p', String(port), ...args.slice(2)])).stdout;
  };
  const kill = async (n: number): Promise<void> => {
    const node = nodes[n];
    if (!node) return;
    nodes[n] = undefined;
    if (!isRunning(node)) return;
    const ended = new Promise((resolve) => node.once('exit', resolve));
    node.kill('SIGKILL');
    await ended;
  };
  const stop = async (): Promise<void> => {
    for (let n = 0; n < count; n++) await kill(n);
    fs.rmSync(directory, { recursive: true, force: true });
  };
  stops.push(stop);
  const haveJoined = (some: number): Promise<void> =>
    until('all nodes have joined', async () => (await dog('node', 'list', '-r')).trim().split('\n').length === some);
  for (let n = 0; n < keepers; n++) await start(n);
  await haveJoined(keepers);
  await dog('cluster', 'format', ...format);
  // A gateway node that runs before the format hangs in it (1.0.1).
  if (withGateway) await start(keepers);
  if (withGateway) await haveJoined(count);
  const recovered = (): Promise<void> =>
    until('the nodes have recovered', async () => (await dog('node', 'recovery', '-r')).trim() === '');
  const named = withGateway ? [ports.at(-1), ...ports.slice(0, -1)] : ports;
  return {
    address: named.map((port) => `127.0.0.1:${port}`).join(','),
    snapshot: async (name, tag) => {
      await dog('vdi', 'snapshot', '-s', tag, name);
    },
    unlock: async (name) => {
      if (format.includes('-l')) await dog('vdi', 'lock', 'unlock', name);
    },
    directory,
    port: ports[0] as number,
    dog,
    returnNode: start,
    endedNodes,
    livePort,
    pauseNode: (n) => nodes[n]?.kill('SIGSTOP'),
    resumeNode: (n) => nodes[n]?.kill('SIGCONT'),
    objects: () => settledObjects(directory),
    loseObject: (vid, idx) => loseObject(directory, vid, idx),
    tagsSeen: async (name) => {
      // s NAME ID SIZE USED SHARED TIME VID COPIES TAG: snapshots begin with an s.
      const lines = (await dog('vdi', 'list', '-r')).split('\n').map((line) => line.trim().split(' '));
      return lines
        .filter(([kind, found]) => kind === 's' && found === name)
        .sort((a, b) => Number(a[2]) - Number(b[2]))
        .map((fields) => fields.slice(9, -1).join(' '));
    },
    killNode: kill,
    restartNode: async (n) => {
      // A node that comes back during a recovery may bring old copies with it, with any client.
      await recovered();
      await start(n);
    },
    recovered,
    crashes: () => {
      return endedNodes().map((n) => {
        const lines = fs
          .readFileSync(path.join(directory, `node${n}`, 'sheep.log'), 'utf8')
          .trimEnd()
          .split('\n');
        const last = lines.slice(lines.findLastIndex((line) => line.includes('started')) + 1);
        const signal = nodes[n]?.signalCode ?? `code ${nodes[n]?.exitCode}`;
        return `node ${n} (${signal}): ${last.filter((line) => line.includes('PANIC')).join(', ') || lines.at(-1)}`;
      });
    },
    violations: () => [],
    stop,
  };
}

/** Nodes give references up in the background: reads the list until it no longer changes. */
async function settledObjects(directory: string): Promise<string[]> {
  let last: string[] = [];
  let same = 0;
  await until('the nodes have settled', () => {
    const now = objectNames(directory);
    same = now.join() === last.join() ? same + 1 : 0;
    last = now;
    return same >= 10;
  });
  return last;
}

function objectNames(directory: string): string[] {
  const names = new Set<string>();
  for (const node of fs.readdirSync(directory)) {
    const objects = path.join(directory, node, 'obj');
    if (!fs.existsSync(objects)) continue;
    for (const name of fs.readdirSync(objects)) if (/^[01][0-9a-f]{15}/.test(name)) names.add(name);
  }
  return [...names].sort();
}

function loseObject(directory: string, vid: number, idx: number): void {
  const name = vid.toString(16).padStart(8, '0') + idx.toString(16).padStart(8, '0');
  let found = 0;
  for (const node of fs.readdirSync(directory)) {
    const file = path.join(directory, node, 'obj', name);
    if (!fs.existsSync(file)) continue;
    fs.unlinkSync(file);
    found++;
  }
  if (found === 0) throw new Error(`no node has the object ${name}`);
}

async function freePorts(count: number): Promise<number[]> {
  const servers = await Promise.all(
    Array.from(
      { length: count },
      () =>
        new Promise<net.Server>((resolve) => {
          const server = net.createServer().listen(0, '127.0.0.1', () => resolve(server));
        }),
    ),
  );
  const ports = servers.map((server) => (server.address() as net.AddressInfo).port);
  await Promise.all(servers.map((server) => new Promise((resolve) => server.close(resolve))));
  return ports;
}

function canConnect(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = net.connect(port, '127.0.0.1');
    socket.once('connect', () => {
      socket.destroy();
      resolve(true);
    });
    socket.once('error', () => resolve(false));
  });
}

/** Wait for a condition, for a limited time. */
export async function until(what: string, condition: () => boolean | Promise<boolean>): Promise<void> {
  const deadline = Date.now() + START_TIMEOUT_MS;
  while (!(await condition())) {
    if (Date.now() > deadline) throw new Error(`waited too long: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}
