/**
 * Clusters with less common nodes: on IPv6, with disk vnodes, of an older version, or not formatted. Against the stand-in,
 * and against real nodes: of the usual build where `sheep` and `dog` are on the PATH, of other builds where
 * SHEEPGATE_OLD_SHEEP and SHEEPGATE_DISKVNODES_SHEEP name a directory with the two programs.
 */
import { execFile, execFileSync, spawn } from 'node:child_process';
import fs from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { promisify } from 'node:util';
import { afterEach, describe, expect, test } from 'vitest';
import { parseClusterAddress } from '../../src/store/sheep/cluster-address.js';
import { readClusterReport } from '../../src/store/sheep/cluster-report.js';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { cleanUp, cli, cliJson, ok, skipBecause, temporaryDirectory } from '../harness/daemon.js';
import { realNodesMissing, until } from './clusters.js';
import { StandIn } from './stand-in.js';
import { StateOp, StateRes } from './stand-in-state.js';
import { decodeNodes } from '../../src/sheepdog/nodes.js';

const run = promisify(execFile);
const OBJECT = 2 ** 20;
const BLOCK = 4096;
const RETRY_MS = 10_000;

const ends: (() => Promise<void> | void)[] = [];
afterEach(async () => {
  for (const end of ends.splice(0).reverse()) await end();
  cleanUp();
});

async function standIn(options: ConstructorParameters<typeof StandIn>[0]): Promise<StandIn> {
  const cluster = await new StandIn(options).start();
  ends.push(() => cluster.stop());
  return cluster;
}

async function open(address: string): Promise<VdiCatalog> {
  const catalog = new VdiCatalog(await SheepStore.open(address, { retryMs: RETRY_MS }));
  ends.push(() => catalog.close().catch(() => undefined));
  return catalog;
}

async function hasIpv6(): Promise<boolean> {
  const server = net.createServer();
  const isThere = await new Promise<boolean>((resolve) => {
    server.once('error', () => resolve(false)).listen(0, '::1', () => resolve(true));
  });
  server.close();
  return isThere;
}

/** From one node's address the client learns all others, and continues with one of them. */
async function survivesItsNode(address: string, nodes: number, kill: () => Promise<void> | void): Promise<void> {
  const catalog = await open(address);
  await catalog.create('disk', 4 * OBJECT, { blockSizeShift: 20 });
  const vdi = await catalog.openVdi('disk');
  await vdi.write(0, Buffer.alloc(BLOCK, 1), false);
  const found = await cliJson<{ host: string; port: number }[]>(['node', 'list', '--cluster', address]);
  expect(found).toHaveLength(nodes);
  await kill();
  await vdi.write(BLOCK, Buffer.alloc(BLOCK, 2), false);
  const read = Buffer.alloc(2 * BLOCK);
  await vdi.read(0, read);
  expect(read.equals(Buffer.concat([Buffer.alloc(BLOCK, 1), Buffer.alloc(BLOCK, 2)]))).toBe(true);
  await catalog.release(vdi);
}

describe('addresses', () => {
  test.each([
    ['::1', '0'.repeat(31) + '1'],
    ['127.0.0.1', '0'.repeat(24) + '7f000001'],
    ['fd00::12:7', 'fd00000000000000000000000012' + '0007'],
    ['::ffff:a00:1', '00000000000000000000ffff0a000001'],
  ])('the list entry of %s is read as nodes write it', (host, hex) => {
    const entry = Buffer.alloc(80);
    Buffer.from(hex, 'hex').copy(entry, 24);
    entry.writeUInt16LE(7000, 40);
    expect(decodeNodes(entry, 1)).toMatchObject([{ host, port: 7000 }]);
  });

  test('a list of nodes with entries of an unknown length is an error, not an empty list', () => {
    expect(() => decodeNodes(Buffer.alloc(200), 2)).toThrow(/2 nodes has 200 bytes/);
  });

  test('an IPv6 address is the same in all its spellings', () => {
    expect(parseClusterAddress('[0:0:0:0:0:0:0:1]:7001,[FD00::0:1],[fe80::1%eth0]:7000')).toEqual([
      { host: '::1', port: 7001 },
      { host: 'fd00::1', port: 7000 },
      { host: 'fe80::1%eth0', port: 7000 },
    ]);
    expect(() => parseClusterAddress('::1')).toThrow(/goes in brackets, "\[::1\]"/);
    expect(() => parseClusterAddress('[node1]:7000')).toThrow(/"node1" is no IPv6 address/);
  });
});

test('nodes on ::1 are learnt and used', async (context) => {
  if (!(await hasIpv6())) skipBecause(context, 'there is no IPv6 loopback');
  const cluster = await standIn({ nodes: 2, host: '::1' });
  await survivesItsNode(cluster.addressOf(0), 2, () => cluster.stopNode(0));
  const { stdout } = await cli(['node', 'list', '--cluster', cluster.addressOf(1)]);
  expect(stdout).toContain(`[::1]:${cluster.ports[0]}`);
});

test('nodes with disk vnodes are learnt and used', async () => {
  const cluster = await standIn({ nodes: 2, diskVnodes: true });
  await survivesItsNode(cluster.addressOf(0), 2, () => cluster.stopNode(0));
});

test('a cluster that is not formatted reports its state and its nodes', async () => {
  const cluster = await standIn({ nodes: 2, isUnformatted: true });
  const at = ['--cluster', cluster.addressOf(0)];
  expect(await cliJson(['cluster', 'info', ...at])).toMatchObject({
    ...{ state: 'not-formatted', nodeCount: 2, createdAt: null, version: '1.0' },
  });
  expect((await cli(['cluster', 'info', ...at])).stdout).toContain("not formatted; 'dog cluster format' does that");
  expect(await cliJson(['node', 'list', ...at])).toHaveLength(2);
  await expect(SheepStore.open(cluster.addressOf(0))).rejects.toThrow(/not serve: it is not formatted/);
});

test.each(['0.8', '0.9'] as const)('a cluster of Sheepdog %s is read, and changes are refused', async (version) => {
  const cluster = await standIn({ nodes: 2 });
  const before = await open(cluster.addressOf(0));
  await before.create('disk', 4 * OBJECT);
  const vdi = await before.openVdi('disk');
  await vdi.write(0, Buffer.alloc(BLOCK, 1), false);
  await before.release(vdi);
  await before.snapshot('disk', 'monday');
  await before.create('gone', OBJECT);
  await before.remove('gone');
  await before.close();
  cluster.version = version;
  cluster.seen.length = 0;
  const catalog = await open(cluster.addressOf(0));
  expect((await catalog.list()).map(({ name, tag }) => `${name}@${tag}`)).toEqual(['disk@monday', 'disk@']);
  for (const spec of ['disk', 'disk@monday']) {
    const opened = await catalog.openVdi(spec);
    const read = Buffer.alloc(BLOCK);
    await opened.read(0, read);
    expect(read.equals(Buffer.alloc(BLOCK, 1))).toBe(true);
    await catalog.release(opened);
  }
  for (const change of [() => catalog.create('new', OBJECT), () => catalog.remove('disk@monday')]) {
    await expect(change()).rejects.toMatchObject({ code: 'READ_ONLY' });
  }
  const report = await readClusterReport(cluster.addressOf(0));
  expect(report).toMatchObject({
    version,
    copies: 2,
    store: 'plain',
    nodes: [{ host: '127.0.0.1', state: 'ok' }, {}],
  });
  await cluster.stopNode(0);
  expect(await catalog.list()).toHaveLength(2);
  // Looking up a name is the only request with data.
  expect(cluster.seen.filter(({ opcode, flags }) => (flags & 1) !== 0 && opcode !== 0x14)).toEqual([]);
});

test('a cluster of 0.8 that does not serve is reported with its reason', async () => {
  const cluster = await standIn({ nodes: 2 });
  cluster.version = '0.8';
  const { WAIT_FOR_FORMAT, WAIT_FOR_JOIN } = StateRes;
  const SHUTDOWN = 0x11;
  for (const [result, state, words] of [
    [WAIT_FOR_FORMAT, 'not-formatted', 'not formatted'],
    [WAIT_FOR_JOIN, 'waiting', 'waiting for its other nodes'],
    [SHUTDOWN, 'shutting-down', 'shutting down'],
  ] as const) {
    cluster.fault = ({ opcode }) => (opcode === StateOp.STAT_CLUSTER ? { result } : undefined);
    const at = ['--cluster', cluster.addressOf(0)];
    const info = await cliJson(['cluster', 'info', ...at]);
    expect(info).toMatchObject({ state, createdAt: null, nodes: [{ state: 'waiting' }, { state: 'waiting' }] });
    const { stdout } = await cli(['cluster', 'info', ...at]);
    expect(stdout).toContain(words);
    expect(stdout).not.toMatch(/^created/m);
  }
});

test('a cluster of an unknown version is refused, and the error says how to export the disks', async () => {
  const cluster = await standIn({ nodes: 1 });
  cluster.version = '0.7';
  await expect(SheepStore.open(cluster.address)).rejects.toThrow(/of an unsupported version: .*vdi read NAME/);
});

interface RealNodes {
  readonly host: string;
  readonly port: number;
  readonly dog: string;
  readonly directory: string;
  kill(n: number): Promise<void>;
}

/** Three nodes, of the `sheep` and `dog` in `bin` or on the PATH; if formatted, with two copies. */
async function realNodes(bin: string, host: string, isFormatted = true): Promise<RealNodes> {
  const sheep = path.join(bin, 'sheep');
  const dog = path.join(bin, 'dog');
  const memory = fs.existsSync('/dev/shm') ? '/dev/shm' : os.tmpdir();
  const directory = fs.mkdtempSync(path.join(memory, 'sheepgate-kinds-'));
  // The first of three free ports.
  const first = await new Promise<number>((resolve) => {
    const server = net.createServer().listen(0, host, () => {
      const { port } = server.address() as net.AddressInfo;
      server.close(() => resolve(port));
    });
  });
  // Before 1.0 nodes always went to the background.
  const { stdout: help } = await run(sheep, ['--help']);
  const pids: number[] = [];
  ends.push(async () => {
    for (const n of pids.keys()) await kill(n);
    fs.rmSync(directory, { recursive: true, force: true });
  });
  const kill = async (n: number): Promise<void> => {
    const pid = pids[n] as number;
    if (pid === 0) return;
    pids[n] = 0;
    process.kill(pid, 'SIGKILL');
    await until(`node ${n} has ended`, () => !fs.existsSync(`/proc/${pid}/mem`) || isZombie(pid));
  };
  for (let n = 0; n < 3; n++) {
    const pidFile = path.join(directory, `pid${n}`);
    const home = path.join(directory, `node${n}`);
    fs.mkdirSync(home);
    const where = ['-b', host, '-y', host, '-p', String(first + n), '-z', String(n), '-c', `local:${directory}/shm`];
    const foreground = help.includes('--foreground') ? ['-f'] : [];
    spawn(sheep, [...foreground, '-n', '-P', pidFile, ...where, home], { stdio: 'ignore' });
    await until(
      `node ${n} has started`,
      () => fs.existsSync(pidFile) && fs.readFileSync(pidFile, 'utf8').trim() !== '',
    );
    pids.push(Number(fs.readFileSync(pidFile, 'utf8')));
    await until(`node ${n} has joined`, async () => {
      const { stdout } = await run(dog, ['node', 'list', '-a', host, '-p', String(first), '-r']).catch(() => ({
        stdout: '',
      }));
      return stdout.trim().split('\n').filter(Boolean).length === n + 1;
    });
  }
  if (isFormatted) execFileSync(dog, ['cluster', 'format', '-a', host, '-p', String(first), '-c', '2']);
  return { host, port: first, dog, directory, kill };
}

function isZombie(pid: number): boolean {
  try {
    return /^State:\s+Z/m.test(fs.readFileSync(`/proc/${pid}/status`, 'utf8'));
  } catch {
    return true;
  }
}

const missing = realNodesMissing();
const usual = missing === undefined ? path.dirname(execFileSync('which', ['sheep'], { encoding: 'utf8' }).trim()) : '';

describe('real nodes', () => {
  test('on ::1 are learnt and used', async (context) => {
    if (missing !== undefined) skipBecause(context, missing);
    if (!(await hasIpv6())) skipBecause(context, 'there is no IPv6 loopback');
    const nodes = await realNodes(usual, '::1');
    await survivesItsNode(`[::1]:${nodes.port}`, 3, () => nodes.kill(0));
  }, 60_000);

  test('that are not formatted report their state and list all nodes', async (context) => {
    if (missing !== undefined) skipBecause(context, missing);
    const nodes = await realNodes(usual, '127.0.0.1', false);
    const at = ['--cluster', `127.0.0.1:${nodes.port}`];
    expect(await cliJson(['cluster', 'info', ...at])).toMatchObject({ state: 'not-formatted', nodeCount: 3 });
    expect(await cliJson(['node', 'list', ...at])).toHaveLength(3);
  }, 60_000);

  test('built with disk vnodes are learnt and used', async (context) => {
    const bin = process.env.SHEEPGATE_DISKVNODES_SHEEP;
    if (bin === undefined)
      skipBecause(context, 'SHEEPGATE_DISKVNODES_SHEEP names no directory with such a sheep and dog');
    const nodes = await realNodes(bin, '127.0.0.1');
    await survivesItsNode(`127.0.0.1:${nodes.port}`, 3, () => nodes.kill(0));
  }, 60_000);

  test('built with disk vnodes: check --deep compares copies on the nodes whose disks they belong on', async (context) => {
    const bin = process.env.SHEEPGATE_DISKVNODES_SHEEP;
    if (bin === undefined)
      skipBecause(context, 'SHEEPGATE_DISKVNODES_SHEEP names no directory with such a sheep and dog');
    const nodes = await realNodes(bin, '127.0.0.1');
    const at = `127.0.0.1:${nodes.port}`;
    const catalog = await open(at);
    await catalog.create('disk', 24 * OBJECT, { blockSizeShift: 20 });
    const vdi = await catalog.openVdi('disk');
    for (let idx = 0; idx < 24; idx++) await vdi.write(idx * OBJECT, Buffer.alloc(BLOCK, idx + 1), false);
    const { vid } = vdi.record;
    await catalog.release(vdi);
    const check = ['check', '--deep', '--rate', '1G', '--settle', '0.2', '--cluster', at];
    const fine = await cli(check);
    expect(fine.stdout).toMatch(/^1 VDIs and snapshots, 25 objects, .*, 0 problems\n$/);
    const file = path.join(nodes.directory, 'node1', 'obj');
    const mine = vid.toString(16).padStart(8, '0');
    const object = fs.readdirSync(file).find((name) => name.startsWith(mine)) ?? 'none';
    fs.writeFileSync(path.join(file, object), Buffer.alloc(OBJECT));
    const wrong = await cli(check);
    expect(wrong.stdout).toMatch(/^different: disk: bytes \d+ to \d+ are not the same: .*, 1 problems\n$/s);
    for (const part of [`zeros on 127.0.0.1:${nodes.port + 1}`, `(object ${object})`]) {
      expect(wrong.stdout).toContain(part);
    }
    expect(wrong.code).toBe(1);
  }, 60_000);

  test('of an older version return every byte that their own tool wrote, also when one node is gone', async (context) => {
    const bin = process.env.SHEEPGATE_OLD_SHEEP;
    if (bin === undefined)
      skipBecause(context, 'SHEEPGATE_OLD_SHEEP names no directory with the sheep and dog of 0.8 or 0.9');
    const nodes = await realNodes(bin, '127.0.0.1');
    const directory = temporaryDirectory();
    const at = (...args: string[]): string[] => [...args.slice(0, 2), '-p', String(nodes.port), ...args.slice(2)];
    const shell = (line: string): Promise<string> => ok('sh', ['-c', line]);
    const written = path.join(directory, 'written');
    await ok(nodes.dog, at('vdi', 'create', 'disk', '24M'));
    await shell(`head -c 9000448 /dev/urandom | '${nodes.dog}' ${at('vdi', 'write', 'disk', '3145728').join(' ')}`);
    await ok(nodes.dog, at('vdi', 'snapshot', '-s', 'monday', 'disk'));
    await shell(`head -c 1048576 /dev/urandom | '${nodes.dog}' ${at('vdi', 'write', 'disk', '4194304').join(' ')}`);
    await nodes.kill(1);
    const cluster = `127.0.0.1:${nodes.port},127.0.0.1:${nodes.port + 2}`;
    for (const [spec, args] of [
      ['disk', ['disk']],
      ['disk@monday', ['-s', 'monday', 'disk']],
    ] as const) {
      await shell(`'${nodes.dog}' ${at('vdi', 'read', ...args).join(' ')} > '${written}'`);
      const image = path.join(directory, spec);
      await cli(['export', spec, image, '--cluster', cluster]);
      expect(fs.readFileSync(image).equals(fs.readFileSync(written)), spec).toBe(true);
    }
    const store = path.join(directory, 'store');
    expect(await cli(['migrate', 'disk', '--from', `cluster:${cluster}`, '--to', store])).toMatchObject({ code: 0 });
  }, 120_000);
});
