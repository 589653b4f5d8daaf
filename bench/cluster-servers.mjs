/**
 * The servers that bench/cluster.mjs compares: three real Sheepdog nodes on loopback, a sheepgate daemon, tgt, `dog` and a bare
 * client of the nodes. Owns all processes, its directory and the VDIs in it. Does not depend on workloads or their results.
 */
import { spawn } from 'node:child_process';
import fs from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { BenchError, ISCSILOAD, NBDLOAD, SHEEPLOAD } from './nbdload.mjs';

const MIB = 2 ** 20;
const OBJECT_BYTES = 4 * MIB;
const NODES = 3;
const COPIES = 2;
const HOST = '127.0.0.1';
/** tgt drops the fifth digit of a node's port. */
const NODE_PORTS = { from: 8600, to: 9999 };
const OTHER_PORTS = { from: 21000, to: 29999 };
const READY_TIMEOUT_MS = 30_000;
const STOP_TIMEOUT_MS = 15_000;
const COMMAND_TIMEOUT_MS = 10 * 60_000;
const POLL_MS = 50;
/** Nodes and daemons are idle when all of them together used less than this in QUIET_MS. */
const QUIET_TICKS = 2;
const QUIET_MS = 200;
const QUIET_TIMEOUT_MS = 15_000;
/** The clock tick of /proc/PID/stat; the same on all Linux machines with these processors. */
const TICK_US = 10_000;
const TARGET = 'iqn.2026-01.bench:sheep';
/** A node maps memory for 512 KiB and more, and is slower then; 11 of these are nearly an object. */
const BARE_PIECE_BYTES = 344 * 1024;
const BARE_CONNECTIONS = 4;
const GREETING_BYTES = 18;
const EXPORT_BYTES = 10;
const OPT_EXPORT_NAME = 1;

const children = new Set();

/** Every process that was started, to end them however the run ends. */
export function killAll() {
  for (const child of children) child.kill('SIGKILL');
}

/** @returns {Promise<Nodes>} Errors: BenchError. */
export async function startNodes(directory) {
  const ports = await freePorts(NODES, NODE_PORTS);
  const nodes = [];
  for (let n = 0; n < NODES; n++) {
    const home = path.join(directory, `node${n}`);
    fs.mkdirSync(home);
    const log = path.join(directory, `node${n}.out`);
    // Without syncs: the disk is not measured here.
    const args = ['-f', '-n', '-b', HOST, '-y', HOST, '-p', `${ports[n]}`, '-z', `${n}`];
    const child = start('sheep', [...args, '-c', `local:${directory}/shm`, home], { log });
    nodes.push(child);
    await until(`node ${n} listens`, () => canConnect(ports[n]), child, log);
  }
  const cluster = new Nodes(directory, ports, nodes);
  await cluster.dog('cluster', 'format', '-c', `${COPIES}`);
  return cluster;
}

export class Nodes {
  constructor(directory, ports, nodes) {
    this.directory = directory;
    this.ports = ports;
    this.processes = nodes;
  }

  get address() {
    return this.ports.map((port) => `${HOST}:${port}`).join(',');
  }

  /** `dog`; its first two arguments are the command. Its stdin comes from `input`. */
  async dog(noun, verb, ...args) {
    return await run('dog', [noun, verb, '-a', HOST, '-p', `${this.ports[0]}`, ...args]);
  }

  /** A VDI with all its objects, none of them zeros. */
  async fill(name, size, pattern) {
    await this.dog('vdi', 'create', name, `${size}`);
    await this.write(name, size, pattern);
  }

  async write(name, size, pattern) {
    const input = fs.openSync(pattern, 'r');
    try {
      const args = ['vdi', 'write', '-a', HOST, '-p', `${this.ports[0]}`, name, '0', `${size}`];
      await run('dog', args, { input });
    } finally {
      fs.closeSync(input);
    }
  }

  /** Discarded. */
  async read(name, size) {
    const output = fs.openSync('/dev/null', 'w');
    try {
      const args = ['vdi', 'read', '-a', HOST, '-p', `${this.ports[0]}`, name, '0', `${size}`];
      await run('dog', args, { output });
    } finally {
      fs.closeSync(output);
    }
  }

  /** The vid of its working VDI, as hex. */
  async vidOf(name) {
    const list = await this.dog('vdi', 'list', '-r', name);
    // "= NAME ID SIZE USED SHARED CREATED VID COPIES TAG SHIFT": "s" begins a snapshot.
    const line = list.split('\n').find((each) => each.startsWith(`= ${name} `));
    const vid = line?.split(' ')[7];
    if (!/^[0-9a-f]+$/.test(vid ?? '')) throw new BenchError(`dog does not say which vid ${name} has:\n${list}`);
    return vid;
  }

  /** Resolves when all of them are idle. */
  async quiet(processes) {
    const all = [...this.processes, ...processes];
    const until = performance.now() + QUIET_TIMEOUT_MS;
    for (let before = ticksOf(all); performance.now() < until;) {
      await sleep(QUIET_MS);
      const now = ticksOf(all);
      if (now - before <= QUIET_TICKS) return;
      before = now;
    }
  }
}

/** Serves `name` over NBD. `dist`: the build to run. */
export class Gate {
  constructor(id, title, dist) {
    this.id = id;
    this.title = title;
    this.name = id;
    this.dist = dist;
    this.snapshots = 0;
  }

  async start(nodes, size, pattern, serveArgs) {
    this.nodes = nodes;
    await nodes.fill(this.name, size, pattern);
    this.socket = path.join(nodes.directory, `${this.id}.sock`);
    this.control = path.join(nodes.directory, `${this.id}.control`);
    const log = path.join(nodes.directory, `${this.id}.out`);
    this.program = path.join(this.dist, '../bin/sheepgate.cjs');
    const args = [this.program, 'serve', '--cluster', nodes.address, '--listen', `unix:${this.socket}`];
    args.push('--control', this.control, ...serveArgs);
    // No state of this cluster from earlier runs, and no other daemon of it.
    const runtime = path.join(nodes.directory, `${this.id}.run`);
    fs.mkdirSync(runtime, { mode: 0o700 });
    const env = { SHEEPGATE_STATE: path.join(nodes.directory, `${this.id}.state`), XDG_RUNTIME_DIR: runtime };
    this.process = start(process.execPath, args, { log, env });
    await until(`${this.title} listens`, () => canConnect(this.socket), this.process, log);
  }

  load({ depth, block, mode, order }, seconds, span, count = 0) {
    const uri = `nbd+unix:///${this.name}?socket=${this.socket}`;
    return measured(NBDLOAD, [uri, 1, depth, block, mode, order, seconds, span, count]);
  }

  async snapshot() {
    const tag = `s${this.snapshots++}`;
    await this.#command('vdi', 'snapshot', this.name, tag);
    return async () => {
      await this.#command('vdi', 'delete', `${this.name}@${tag}`);
    };
  }

  /** Opens NAME@now; the returned function closes it. */
  async openNow() {
    const socket = net.connect(this.socket);
    socket.on('error', () => undefined);
    let bytes = 0;
    const name = Buffer.from(`${this.name}@now`);
    const head = Buffer.alloc(20);
    head.writeUInt32BE(3); // NBD_FLAG_C_FIXED_NEWSTYLE, NBD_FLAG_C_NO_ZEROES
    head.write('IHAVEOPT', 4);
    head.writeUInt32BE(OPT_EXPORT_NAME, 12);
    head.writeUInt32BE(name.length, 16);
    await new Promise((resolve, reject) => {
      socket.once('close', () => reject(new BenchError(`${this.name}@now is refused`)));
      socket.on('data', (chunk) => {
        const isGreeted = bytes >= GREETING_BYTES;
        bytes += chunk.length;
        if (!isGreeted && bytes >= GREETING_BYTES) socket.write(Buffer.concat([head, name]));
        if (bytes >= GREETING_BYTES + EXPORT_BYTES) resolve();
      });
    });
    return async () => {
      const closed = new Promise((resolve) => socket.once('close', resolve));
      // Disconnect in order: otherwise the snapshot is kept, and the next NAME@now finds the same moment.
      socket.end(disconnectRequest());
      await closed;
    };
  }

  async #command(...args) {
    await run(process.execPath, [this.program, ...args, '--cluster', this.nodes.address, '--control', this.control]);
  }
}

function disconnectRequest() {
  const bytes = Buffer.alloc(28);
  bytes.writeUInt32BE(0x25609513);
  bytes.writeUInt16BE(2, 6); // NBD_CMD_DISC
  return bytes;
}

/** tgt with its Sheepdog backing store, over iSCSI on loopback. */
export class Tgt {
  id = 'tgt';
  title = 'tgt';
  name = 'tgt';
  snapshots = 0;

  async start(nodes, size, pattern) {
    this.nodes = nodes;
    await nodes.fill(this.name, size, pattern);
    const [port] = await freePorts(1, OTHER_PORTS);
    const control = path.join(nodes.directory, 'tgt');
    const log = path.join(nodes.directory, 'tgt.out');
    const env = { TGT_IPC_SOCKET: control };
    this.process = start('tgtd', ['-f', '--iscsi', `portal=${HOST}:${port}`], { log, env });
    // tgtd creates a socket with this name plus the number of the control port.
    const isThere = async () => (await canConnect(`${control}.0`)) && (await canConnect(port));
    await until('tgt listens', isThere, this.process, log);
    const tgtadm = (...args) => run('tgtadm', ['--lld', 'iscsi', ...args, '--tid', '1'], { env });
    await tgtadm('--op', 'new', '--mode', 'target', '-T', TARGET);
    const store = ['--bstype', 'sheepdog', '-b', `tcp:${HOST}:${nodes.ports[0]}:${this.name}`];
    await tgtadm('--op', 'new', '--mode', 'logicalunit', '--lun', '1', ...store);
    await tgtadm('--op', 'bind', '--mode', 'target', '-I', 'ALL');
    this.url = `iscsi://${HOST}:${port}/${TARGET}/1`;
  }

  load({ depth, block, mode, order }, seconds, span, count = 0) {
    return measured(ISCSILOAD, [this.url, depth, block, mode, order, seconds, span, count]);
  }

  /** Taken with `dog`, because tgt cannot take snapshots. tgt notices it by itself. */
  async snapshot() {
    const tag = `s${this.snapshots++}`;
    await this.nodes.dog('vdi', 'snapshot', '-s', tag, this.name);
    return async () => {
      await this.nodes.dog('vdi', 'delete', '-s', tag, this.name);
    };
  }
}

/** Pipes of `dog`: the whole disk at once, so only throughput is measured. */
export class Dog {
  id = 'dog';
  title = 'dog';
  name = 'dog';
  snapshots = 0;

  async start(nodes, size, pattern) {
    this.nodes = nodes;
    this.pattern = pattern;
    await nodes.fill(this.name, size, pattern);
  }

  canDo({ block }) {
    return block === MIB;
  }

  async load({ mode, block }, _seconds, span) {
    const began = performance.now();
    await (mode === 'read' ? this.nodes.read(this.name, span) : this.nodes.write(this.name, span, this.pattern));
    return { perSecond: span / block / ((performance.now() - began) / 1000) };
  }

  snapshot = Tgt.prototype.snapshot;
}

/** No gateway: the limit of the nodes. After a snapshot it makes the copies and enters each in the table. */
export class Bare {
  id = 'bare';
  title = 'bare client';
  name = 'bare';
  snapshots = 0;

  async start(nodes, size, pattern) {
    this.nodes = nodes;
    await nodes.fill(this.name, size, pattern);
    this.vid = await nodes.vidOf(this.name);
    /** The vid that owns all objects: the VDI's own, or that of a snapshot. */
    this.owner = this.vid;
  }

  async load({ depth, block, mode, order }, timeLimit, span, count = 0) {
    const pieces = Math.ceil(block / BARE_PIECE_BYTES);
    const piece = pieces === 1 ? block : BARE_PIECE_BYTES;
    const ports = this.nodes.ports.slice(0, mode === 'read' ? undefined : 1).join(',');
    const load = (operation, how, vid, inFlight, bytes, requests) =>
      measured(SHEEPLOAD, [
        ...[ports, BARE_CONNECTIONS, inFlight, bytes, operation, how, timeLimit, vid, span, requests, this.owner],
      ]);
    let seconds = 0;
    let left = count;
    if (mode === 'write' && this.owner !== this.vid) {
      // The first write to each object is a copy; later writes go in place.
      const objects = span / OBJECT_BYTES;
      const copied = await load('copy', 'each', this.vid, depth, block, objects);
      this.owner = this.vid;
      seconds = objects / copied.perSecond;
      left -= objects;
      if (left === 0) return copied;
    }
    const result = await load(mode, order, this.owner, depth * pieces, piece, left * pieces);
    const perSecond = (result.perSecond * piece) / block;
    return { ...result, perSecond: count > 0 ? count / (seconds + left / perSecond) : perSecond };
  }

  async snapshot() {
    const undo = await Tgt.prototype.snapshot.call(this);
    this.vid = await this.nodes.vidOf(this.name);
    return undo;
  }
}

/** CPU time of these processes so far, in units of TICK_US. */
function ticksOf(processes) {
  return processes.reduce((sum, { pid }) => sum + ticks(pid), 0);
}

export function cpuUs(processes) {
  return ticksOf(processes) * TICK_US;
}

function ticks(pid) {
  let line;
  try {
    line = fs.readFileSync(`/proc/${pid}/stat`, 'utf8');
  } catch {
    throw new BenchError(`process ${pid} has ended while it was measured`);
  }
  // After the name, which may have blanks: state is field 3, utime and stime are 14 and 15.
  const fields = line.replace(/^.*\) /s, '').split(' ');
  return Number(fields[11]) + Number(fields[12]);
}

// --- processes

async function measured(command, args) {
  const out = await run(command, args.map(String));
  const [perSecond, , p50us, p99us, maxUs] = out.split(' ').map(Number.parseFloat);
  if (!Number.isFinite(maxUs)) throw new BenchError(`${command} ${args.join(' ')} prints ${out}`);
  return { perSecond, p50us, p99us, maxUs };
}

function start(command, args, { log, env = {} }) {
  const out = fs.openSync(log, 'w');
  const child = spawn(command, args, { stdio: ['ignore', out, out], env: environment(env) });
  fs.closeSync(out);
  children.add(child);
  child.over = new Promise((resolve) => {
    child.once('error', (error) => resolve(error.message));
    child.once('exit', (code, signal) => {
      children.delete(child);
      resolve(signal ?? code);
    });
  });
  return child;
}

/** The output of the command. Errors: BenchError. */
function run(command, args, { input = 'ignore', output = 'pipe', env = {} } = {}) {
  return new Promise((resolve, reject) => {
    const child = spawn(command, args, { stdio: [input, output, 'pipe'], env: environment(env) });
    children.add(child);
    const timer = setTimeout(() => child.kill('SIGKILL'), COMMAND_TIMEOUT_MS);
    let out = '';
    let err = '';
    child.stdout?.setEncoding('utf8').on('data', (text) => (out += text));
    child.stderr.setEncoding('utf8').on('data', (text) => (err += text));
    child.once('error', (error) => reject(new BenchError(`${command}: ${error.message}`)));
    child.once('close', (code, signal) => {
      clearTimeout(timer);
      children.delete(child);
      if (code === 0) resolve(out);
      else reject(new BenchError(`${command} ${args.join(' ')} failed (${signal ?? code}): ${out}${err}`));
    });
  });
}

/** Never the user's own store. */
function environment(env) {
  const all = { ...process.env };
  for (const name of ['SHEEPGATE_STORE', 'SHEEPGATE_CLUSTER', 'SHEEPGATE_CONTROL', 'SHEEPGATE_CONFIG'])
    delete all[name];
  return { ...all, ...env };
}

export async function stop(child) {
  child.kill(child.spawnfile === 'tgtd' ? 'SIGKILL' : 'SIGTERM'); // tgtd does not end while it has a target
  const timer = setTimeout(() => child.kill('SIGKILL'), STOP_TIMEOUT_MS);
  await child.over;
  clearTimeout(timer);
}

async function until(what, isSo, child, log) {
  const deadline = performance.now() + READY_TIMEOUT_MS;
  const tail = () => fs.readFileSync(log, 'utf8').trim().split('\n').slice(-5).join('\n');
  let end;
  void child.over.then((how) => (end = { how }));
  while (!(await isSo())) {
    if (end) throw new BenchError(`before ${what}: ended (${end.how}):\n${tail()}`);
    if (performance.now() > deadline) throw new BenchError(`not within ${READY_TIMEOUT_MS} ms: ${what}\n${tail()}`);
    await sleep(POLL_MS);
  }
}

/** `where`: a port on loopback, or a socket's path. */
function canConnect(where) {
  return new Promise((resolve) => {
    const socket = typeof where === 'number' ? net.connect(where, HOST) : net.connect(where);
    socket.once('connect', () => resolve(true)).once('error', () => resolve(false));
    socket.once('connect', () => socket.destroy());
  });
}

async function freePorts(count, { from, to }) {
  const ports = [];
  for (let port = from; port <= to && ports.length < count; port++) if (await isFree(port)) ports.push(port);
  if (ports.length < count) throw new BenchError(`no free ports from ${from} to ${to}`);
  return ports;
}

function isFree(port) {
  return new Promise((resolve) => {
    const server = net.createServer().once('error', () => resolve(false));
    server.listen(port, HOST, () => server.close(() => resolve(true)));
  });
}

function sleep(ms) {
  return new Promise((resolve) => setTimeout(resolve, ms));
}
