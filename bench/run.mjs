/**
 * Compares Sheepgate with its peers: the same data, the same load generator (nbdload, on libnbd), one machine, one run. Owns
 * every process and directory that it makes, and removes them however it ends. Rounds are interleaved and their order rotates,
 * so that a noisy minute affects all servers. Prints medians. Figures of different runs must not be compared.
 *
 *     npm run build && npm run bench -- --rounds 3 --seconds 1
 */
import { spawn, spawnSync } from 'node:child_process';
import fs from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { BenchError, buildNbdload, haveCommand, NBDLOAD, requireCommand } from './nbdload.mjs';
import { writePattern } from './pattern.mjs';

const KIB = 2 ** 10;
const MIB = 2 ** 20;
const GIB = 2 ** 30;
const HERE = path.dirname(fileURLToPath(import.meta.url));
const SHEEPGATE = path.join(HERE, '../bin/sheepgate.cjs');

const READY_TIMEOUT_MS = 30_000;
const STOP_TIMEOUT_MS = 10_000;
const FILL_TIMEOUT_MS = 10 * 60_000;

const USAGE = `usage: npm run bench -- [options]
  --span SIZE       how much data each server holds and is loaded on (default 1G; K, M, G)
  --rounds N        rounds per workload (default 5)
  --seconds S       length of one run of one server in one round (default 2)
  --only PATTERN    only workloads whose name matches this regular expression, for example "read" or "4 conn"
  --peers LIST      only these peers, by comma: nbdkit, qemu-raw, qemu-qcow2 (default all; "none" for none)
  --serve-arg ARG   one more argument for "sheepgate serve"; may be repeated
  --dir DIR         where the data is put (default: the temporary directory)
  --json FILE       write every sample there as well
  --quick           a smoke test: 64M, 1 round of 0.5 s; its figures mean nothing
  --list            print the workloads' names`;

/** The workloads of the table in README.md. */
const WORKLOADS = [
  { name: '4 KiB random read, QD 32, 1 conn', connections: 1, depth: 32, block: 4 * KIB, mode: 'read', order: 'rand' },
  { name: '4 KiB random read, QD 32, 4 conn', connections: 4, depth: 32, block: 4 * KIB, mode: 'read', order: 'rand' },
  { name: '4 KiB random write, QD 32', connections: 1, depth: 32, block: 4 * KIB, mode: 'write', order: 'rand' },
  { name: '64 KiB sequential read, QD 16', connections: 1, depth: 16, block: 64 * KIB, mode: 'read', order: 'seq' },
  { name: '1 MiB sequential read, QD 16', connections: 1, depth: 16, block: MIB, mode: 'read', order: 'seq' },
  { name: '1 MiB sequential write, QD 16', connections: 1, depth: 16, block: MIB, mode: 'write', order: 'seq' },
  { name: '4 KiB random read, QD 1', connections: 1, depth: 1, block: 4 * KIB, mode: 'read', order: 'rand' },
];

/** A server under test: `prepare` makes its empty disk, `command` is how it serves that disk on `socket`. */
const SERVERS = [
  {
    id: 'sheepgate',
    title: 'sheepgate',
    needs: [],
    version: () => `sheepgate ${lineOf(process.execPath, SHEEPGATE, '--version')} on node ${process.version}`,
    prepare: () => undefined,
    command: (disk, socket, { span, serveArgs }) => [
      process.execPath,
      [
        SHEEPGATE,
        'serve',
        '--json',
        '--store',
        disk,
        '--listen',
        `unix:${socket}`,
        '--create',
        `bench:${span}`,
        ...serveArgs,
      ],
    ],
    exportName: 'bench',
    saysWhenReady: true,
  },
  {
    id: 'nbdkit',
    title: 'nbdkit file',
    needs: ['nbdkit'],
    version: () => lineOf('nbdkit', '--version'),
    prepare: (disk, span) => fs.closeSync(emptyFile(disk, span)),
    command: (disk, socket) => ['nbdkit', ['-f', '--exit-with-parent', '-U', socket, 'file', disk]],
    exportName: '',
  },
  {
    id: 'qemu-raw',
    title: 'qemu-nbd raw',
    needs: ['qemu-nbd'],
    version: () => lineOf('qemu-nbd', '--version'),
    prepare: (disk, span) => fs.closeSync(emptyFile(disk, span)),
    command: (disk, socket) => ['qemu-nbd', [...QEMU_NBD, '-k', socket, '-f', 'raw', disk]],
    exportName: '',
  },
  {
    id: 'qemu-qcow2',
    title: 'qemu-nbd qcow2',
    needs: ['qemu-nbd', 'qemu-img'],
    version: () => undefined, // the same program as above
    prepare: (disk, span) => mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', disk, String(span)]),
    command: (disk, socket) => ['qemu-nbd', [...QEMU_NBD, '-k', socket, '-f', 'qcow2', disk]],
    exportName: '',
  },
];
const QEMU_NBD = ['-t', '-e', '16', '--cache=writeback', '--aio=threads', '--discard=unmap'];

/** An expected failure: printed as one line, without a stack. */
const options = readOptions();
const children = new Set();
const directories = [];

process.on('exit', cleanUp);
for (const [signal, number] of [
  ['SIGHUP', 1],
  ['SIGINT', 2],
  ['SIGTERM', 15],
]) {
  process.on(signal, () => process.exit(128 + number)); // cleanUp runs in 'exit'
}

try {
  await main();
} catch (error) {
  process.stderr.write(`bench: ${error instanceof BenchError ? error.message : error.stack}\n`);
  process.exit(1);
}

async function main() {
  const workloads = WORKLOADS.filter(({ name }) => options.only.test(name));
  if (workloads.length === 0) throw new BenchError(`no workload matches ${options.only}; --list shows their names`);
  buildNbdload();
  requireCommand('nbdcopy', 'libnbd-bin');
  const servers = SERVERS.filter(isWanted);
  requireSpace(servers.length * options.span * 1.1 + options.span);

  const data = temporaryDirectory(options.directory);
  const sockets = temporaryDirectory(os.tmpdir());
  const pattern = path.join(data, 'pattern');
  writePattern(pattern, options.span);
  const running = [];
  for (const server of servers) {
    note(`filling ${server.title}`);
    running.push(await startFilled(server, { data, sockets, pattern }));
  }
  fs.rmSync(pattern);
  // Otherwise the kernel would write back the dirty pages of the filling during the first rounds.
  spawnSync('sync', ['-f', data]);

  const results = [];
  for (const workload of workloads) results.push(await measure(workload, running));
  for (const { child } of running) await stop(child);
  note('');

  const machine = describeMachine(servers, data);
  process.stdout.write(`${machine.lines.map((line) => `- ${line}`).join('\n')}\n\n${table(servers, results)}\n`);
  if (options.json) fs.writeFileSync(options.json, `${JSON.stringify(report(machine, servers, results), null, 2)}\n`);
}

// --- what to run

function readOptions() {
  let values;
  try {
    ({ values } = parseArgs({
      options: {
        span: { type: 'string' },
        rounds: { type: 'string' },
        seconds: { type: 'string' },
        only: { type: 'string', default: '' },
        peers: { type: 'string' },
        'serve-arg': { type: 'string', multiple: true, default: [] },
        dir: { type: 'string', default: os.tmpdir() },
        json: { type: 'string' },
        quick: { type: 'boolean', default: false },
        list: { type: 'boolean', default: false },
        help: { type: 'boolean', short: 'h', default: false },
      },
    }));
    if (values.help || values.list) {
      process.stdout.write(values.help ? `${USAGE}\n` : WORKLOADS.map(({ name }) => `${name}\n`).join(''));
      process.exit(0);
    }
    const span = parseSize(values.span ?? (values.quick ? '64M' : '1G'));
    if (span < 4 * MIB || span % MIB !== 0) throw new BenchError('--span: whole MiB, at least 4M');
    return {
      span,
      rounds: positive('--rounds', values.rounds ?? (values.quick ? 1 : 5), Number.isInteger),
      seconds: positive('--seconds', values.seconds ?? (values.quick ? 0.5 : 2), Number.isFinite),
      only: new RegExp(values.only, 'i'),
      peers: parsePeers(values.peers),
      serveArgs: values['serve-arg'],
      directory: path.resolve(values.dir),
      json: values.json,
      quick: values.quick,
    };
  } catch (error) {
    process.stderr.write(`bench: ${error.message}\n${USAGE}\n`);
    process.exit(2);
  }
}

function parseSize(text) {
  const match = /^(\d+)([KMG]?)$/i.exec(text);
  if (!match) throw new BenchError(`"${text}" is not a size; give for example 512M or 1G`);
  return Number(match[1]) * { '': 1, K: KIB, M: MIB, G: GIB }[match[2].toUpperCase()];
}

function positive(name, text, isKind) {
  const value = Number(text);
  if (!(value > 0) || !isKind(value)) throw new BenchError(`${name}: "${text}" is not valid`);
  return value;
}

function parsePeers(text) {
  const known = SERVERS.filter(({ id }) => id !== 'sheepgate').map(({ id }) => id);
  if (text === undefined) return known;
  if (text === 'none') return [];
  const asked = text.split(',');
  const unknown = asked.filter((id) => !known.includes(id));
  if (unknown.length > 0) throw new BenchError(`no peer "${unknown[0]}"; there are ${known.join(', ')}`);
  return asked;
}

/** The requested servers that are installed. Prints a line for each peer that is left out because it is not installed. */
function isWanted(server) {
  if (server.id !== 'sheepgate' && !options.peers.includes(server.id)) return false;
  const missing = server.needs.filter((command) => !haveCommand(command));
  if (missing.length > 0) note(`left out: ${server.title} (no ${missing.join(', ')} on the PATH)`);
  return missing.length === 0;
}

// --- preparing

function requireSpace(bytes) {
  const { bavail, bsize } = fs.statfsSync(options.directory);
  if (bavail * bsize < bytes) {
    throw new BenchError(
      `${options.directory} has ${gib(bavail * bsize)} free, this needs ${gib(bytes)}; give --dir or a smaller --span`,
    );
  }
}

function temporaryDirectory(parent) {
  const directory = fs.mkdtempSync(path.join(parent, 'sheepgate-bench-'));
  directories.push(directory);
  return directory;
}

function emptyFile(file, size) {
  const fd = fs.openSync(file, 'w');
  fs.ftruncateSync(fd, size);
  return fd;
}

async function startFilled(server, { data, sockets, pattern }) {
  const disk = path.join(data, server.id);
  const socket = path.join(sockets, server.id);
  const log = path.join(sockets, `${server.id}.log`);
  server.prepare(disk, options.span);
  const [command, args] = server.command(disk, socket, options);
  const err = fs.openSync(log, 'w');
  const child = start(command, args, ['ignore', server.saysWhenReady ? 'pipe' : 'ignore', err]);
  fs.closeSync(err);
  const tail = () => fs.readFileSync(log, 'utf8').trim().split('\n').slice(-5).join('\n');
  const gone = ended(child).then(({ code, signal }) => {
    throw new BenchError(`${server.title} ended during its start (${signal ?? code}):\n${tail()}`);
  });
  gone.catch(() => undefined);
  const ready = server.saysWhenReady ? firstLine(child.stdout) : connectable(socket);
  await within(Promise.race([ready, gone]), READY_TIMEOUT_MS, () => `${server.title} is not ready:\n${tail()}`);
  const uri = `nbd+unix:///${server.exportName}?socket=${socket}`;
  const copied = await run('nbdcopy', ['--flush', pattern, uri], FILL_TIMEOUT_MS);
  if (copied.code !== 0) throw new BenchError(`filling ${server.title} failed: ${copied.stderr}\n${tail()}`);
  return { server, child, uri, tail };
}

/** Resolves when a server listens there. */
async function connectable(socket) {
  for (;;) {
    const isListening = await new Promise((resolve) => {
      const probe = net.connect(socket, () => resolve(true));
      probe.on('error', () => resolve(false));
      probe.on('connect', () => probe.destroy());
    });
    if (isListening) return;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

function firstLine(stream) {
  return new Promise((resolve) => {
    let text = '';
    stream.setEncoding('utf8').on('data', (chunk) => {
      text += chunk;
      if (text.includes('\n')) resolve();
    });
  });
}

// --- measuring

/** Samples of every server, by its id, one a round. */
async function measure(workload, running) {
  const samples = Object.fromEntries(running.map(({ server }) => [server.id, []]));
  for (let round = 0; round < options.rounds; round++) {
    for (let turn = 0; turn < running.length; turn++) {
      const { server, uri, tail } = running[(round + turn) % running.length];
      note(`${workload.name}: round ${round + 1} of ${options.rounds}, ${server.title}`);
      const { connections, depth, block, mode, order } = workload;
      const args = [uri, connections, depth, block, mode, order, options.seconds, options.span].map(String);
      const result = await run(NBDLOAD, args, options.seconds * 1000 + READY_TIMEOUT_MS);
      const [perSecond, , p50us, p99us, maxUs] = result.stdout.split(' ').map(Number.parseFloat);
      if (result.code !== 0 || !Number.isFinite(maxUs)) {
        throw new BenchError(
          `${workload.name} on ${server.title} failed (${result.signal ?? result.code}): ${result.stdout}${result.stderr}\n${tail()}`,
        );
      }
      samples[server.id].push({ perSecond, bytesPerSecond: perSecond * block, p50us, p99us, maxUs });
    }
  }
  return { workload, samples };
}

// --- telling

function describeMachine(servers, data) {
  const [cpu] = os.cpus();
  const revision = lineOf('git', '-C', HERE, 'rev-parse', '--short', 'HEAD');
  const versions = [...servers.map((server) => server.version()), lineOf('nbdcopy', '--version')].filter(Boolean);
  const filesystem = lineOf('stat', '-f', '-c', '%T', data);
  return {
    revision,
    versions,
    lines: [
      `${os.cpus().length} cores (${lineOf('uname', '-m')}, ${cpu?.model.trim() ?? 'unknown processor'}), shared by the load generator and the server under test; Linux ${os.release()}, ${gib(os.totalmem())} memory`,
      `${versions.join('; ')}; commit ${revision || 'unknown'}`,
      `${gib(options.span)} fully written, page cache warm, ${filesystem} in ${path.dirname(data)}, unix sockets; qemu-nbd ${QEMU_NBD.join(' ')}`,
      `medians of ${options.rounds} interleaved round(s) of ${options.seconds} s${options.quick ? '; a smoke test: the figures mean nothing' : ''}`,
    ],
  };
}

function table(servers, results) {
  const peers = servers.filter(({ id }) => id !== 'sheepgate');
  const hasNbdkit = peers.some(({ id }) => id === 'nbdkit');
  const head = ['rate (p50/p99 latency, µs)', ...servers.map(({ title }) => title)];
  if (hasNbdkit) head.push('vs nbdkit');
  if (peers.length > 0) head.push('vs best peer');
  const rows = results.map(({ workload, samples }) => {
    const rate = (id) => median(samples[id], 'perSecond');
    const cells = servers.map(({ id }) => {
      const latency = `${median(samples[id], 'p50us')}/${median(samples[id], 'p99us')}`;
      return `${formatRate(rate(id), workload.block)} (${latency})`;
    });
    if (hasNbdkit) cells.push(ratio(rate('sheepgate'), rate('nbdkit')));
    if (peers.length > 0) cells.push(ratio(rate('sheepgate'), Math.max(...peers.map(({ id }) => rate(id)))));
    return [workload.name, ...cells];
  });
  const lines = [head, head.map((_, column) => (column === 0 ? '---' : '---:')), ...rows];
  return lines.map((cells) => `| ${cells.join(' | ')} |`).join('\n');
}

function report(machine, servers, results) {
  return {
    date: new Date().toISOString(),
    machine: { arch: os.arch(), cores: os.cpus().length, cpu: os.cpus()[0]?.model, kernel: os.release() },
    revision: machine.revision,
    versions: machine.versions,
    span: options.span,
    rounds: options.rounds,
    seconds: options.seconds,
    servers: servers.map(({ id, title }) => ({ id, title })),
    workloads: results.map(({ workload, samples }) => ({
      ...workload,
      servers: Object.fromEntries(
        Object.entries(samples).map(([id, list]) => [
          id,
          {
            perSecond: median(list, 'perSecond'),
            bytesPerSecond: median(list, 'bytesPerSecond'),
            p50us: median(list, 'p50us'),
            p99us: median(list, 'p99us'),
            samples: list,
          },
        ]),
      ),
    })),
  };
}

function median(samples, field) {
  const sorted = samples.map((sample) => sample[field]).sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle] : Math.round((sorted[middle - 1] + sorted[middle]) / 2);
}

function formatRate(perSecond, block) {
  if (block > 4 * KIB) return `${((perSecond * block) / 1e9).toFixed(2)} GB/s`;
  return `${(perSecond / 1000).toFixed(perSecond < 20_000 ? 1 : 0)} k/s`;
}

function ratio(ours, theirs) {
  return `${(ours / theirs).toFixed(2)}x`;
}

function gib(bytes) {
  return bytes >= GIB ? `${Number((bytes / GIB).toFixed(1))} GiB` : `${Math.round(bytes / MIB)} MiB`;
}

/** On a terminal, progress overwrites itself; elsewhere, only left-out peers get a line. */
function note(text) {
  if (process.stderr.isTTY) process.stderr.write(`\r\x1b[K${text}${text.startsWith('left out') ? '\n' : ''}`);
  else if (text.startsWith('left out')) process.stderr.write(`${text}\n`);
}

// --- processes

function start(command, args, stdio) {
  const env = { ...process.env };
  for (const name of ['SHEEPGATE_STORE', 'SHEEPGATE_CONTROL']) delete env[name]; // never the user's own store
  const child = spawn(command, args, { env, stdio });
  children.add(child);
  child.once('exit', () => children.delete(child));
  return child;
}

function ended(child) {
  if (child.exitCode !== null || child.signalCode !== null) {
    return Promise.resolve({ code: child.exitCode, signal: child.signalCode });
  }
  return new Promise((resolve, reject) => {
    child.once('error', reject);
    child.once('close', (code, signal) => resolve({ code, signal }));
  });
}

async function run(command, args, timeoutMs) {
  const child = start(command, args, ['ignore', 'pipe', 'pipe']);
  let stdout = '';
  let stderr = '';
  child.stdout.setEncoding('utf8').on('data', (text) => (stdout += text));
  child.stderr.setEncoding('utf8').on('data', (text) => (stderr += text));
  const end = await within(ended(child), timeoutMs, () => `${command} ${args.join(' ')} still runs; ${stderr}`);
  return { ...end, stdout, stderr };
}

async function stop(child) {
  child.kill('SIGTERM');
  await within(ended(child), STOP_TIMEOUT_MS, () => `process ${child.pid} (${child.spawnfile}) ignores SIGTERM`);
}

function within(promise, timeoutMs, what) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new BenchError(`not within ${timeoutMs} ms: ${what()}`)), timeoutMs);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

function mustRun(command, args) {
  const result = spawnSync(command, args, { encoding: 'utf8' });
  if (result.status !== 0)
    throw new BenchError(`${command} ${args.join(' ')}: ${result.error?.message ?? result.stderr}`);
}

/** The first line a command prints, or nothing. */
function lineOf(command, ...args) {
  return (spawnSync(command, args, { encoding: 'utf8' }).stdout ?? '').split('\n')[0].trim();
}

function cleanUp() {
  for (const child of children) child.kill('SIGKILL');
  for (const directory of directories) fs.rmSync(directory, { recursive: true, force: true, maxRetries: 5 });
}
