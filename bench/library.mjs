/**
 * The speed of the library nbd-server-ts alone: a disk in memory, beside `nbdkit memory`, under the load generator nbdload and
 * under fio. Owns every process and directory that it makes, and removes them however it ends. Servers are measured in turns and
 * their order rotates; the output is medians, and ratios are medians of the ratios of each round. Figures of different runs
 * must not be compared.
 *
 *     npm run build && node bench/library.mjs [--rounds 5] [--seconds 1.5] [--only PATTERN] [--also DIST]
 */
import { spawn, spawnSync } from 'node:child_process';
import fs from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { BenchError, buildNbdload, haveCommand, NBDLOAD, requireCommand } from './nbdload.mjs';
import { readOptions } from './options.mjs';

const HERE = import.meta.dirname;
const SERVER = path.join(HERE, 'library-server.mjs');
const DIST = path.join(HERE, '../nbd/dist');
const KIB = 2 ** 10;
const MIB = 2 ** 20;
const SPAN = 256 * MIB;
const READY_TIMEOUT_MS = 30_000;
/** Of the kernel's counts of CPU time in /proc. */
const TICKS_PER_SECOND = 100;

const options = readOptions({
  program: 'library',
  usage: `usage: npm run build && node bench/library.mjs [options]
  --rounds N        rounds per workload (default 5)
  --seconds S       length of one run of one server in one round (default 1.5)
  --only PATTERN    only workloads whose name matches this regular expression
  --also DIST       also measure this build of nbd-server-ts (a folder nbd/dist)
  --json FILE       write every sample there as well`,
  options: {
    rounds: { type: 'string', default: '5' },
    seconds: { type: 'string', default: '1.5' },
    only: { type: 'string', default: '' },
    also: { type: 'string' },
    json: { type: 'string' },
  },
  numbers: ['rounds', 'seconds'],
});
const rounds = Number(options.rounds);
const seconds = Number(options.seconds);

/** `goal`: the rate of the library as a multiple of nbdkit's. */
const WORKLOADS = [
  { name: '4 KiB random read, QD 32', block: 4 * KIB, depth: 32, mode: 'read', order: 'rand', goal: 1.9 },
  { name: '1 MiB sequential read, QD 16', block: MIB, depth: 16, mode: 'read', order: 'seq', goal: 1.6 },
  { name: '4 KiB random read, QD 1', block: 4 * KIB, depth: 1, mode: 'read', order: 'rand' },
  {
    name: '4 KiB random read, QD 32, fio',
    block: 4 * KIB,
    depth: 32,
    mode: 'read',
    order: 'rand',
    tool: 'fio',
    goal: 1.9,
  },
  {
    name: '1 MiB sequential read, QD 16, fio',
    block: MIB,
    depth: 16,
    mode: 'read',
    order: 'seq',
    tool: 'fio',
    goal: 1.6,
  },
  { name: '4 KiB random write, QD 32', block: 4 * KIB, depth: 32, mode: 'write', order: 'rand' },
  { name: '64 KiB sequential write, QD 16', block: 64 * KIB, depth: 16, mode: 'write', order: 'seq' },
  { name: '1 MiB sequential write, QD 16', block: MIB, depth: 16, mode: 'write', order: 'seq' },
];

const ours = (dist, kind) => (socket) => [process.execPath, [SERVER, dist, socket, String(SPAN), kind]];
/** `modes`: the workloads that the server is measured with. The first is compared with each of the others. */
const SERVERS = [
  { title: 'library', modes: ['read', 'write'], command: ours(DIST, 'fills') },
  {
    title: 'nbdkit memory',
    modes: ['read', 'write'],
    // Its default allocator is sparse, with a lock for each request; malloc is the faster one.
    command: (socket) => ['nbdkit', ['-f', '-U', socket, 'memory', `size=${SPAN}`, 'allocator=malloc']],
  },
  { title: 'library, buffers zeroed', modes: ['read'], command: ours(DIST, 'zeroed') },
  { title: 'library, late writes', modes: ['write'], command: ours(DIST, 'late') },
  ...(options.also === undefined
    ? []
    : [
        { title: 'also', modes: ['read', 'write'], command: ours(options.also, 'fills') },
        { title: 'also, late writes', modes: ['write'], command: ours(options.also, 'late') },
      ]),
];

const children = new Set();
const directory = fs.mkdtempSync(path.join(os.tmpdir(), 'nbd-library-'));
process.on('exit', () => {
  for (const child of children) child.kill('SIGKILL');
  fs.rmSync(directory, { recursive: true, force: true });
});
for (const [signal, number] of Object.entries({ SIGHUP: 1, SIGINT: 2, SIGTERM: 15 })) {
  process.on(signal, () => process.exit(128 + number)); // what was started is removed in 'exit'
}

try {
  await main();
  process.exit(0);
} catch (error) {
  process.stderr.write(`library: ${error instanceof BenchError ? error.message : error.stack}\n`);
  process.exit(1);
}

async function main() {
  const hasFio = haveCommand('fio') && spawnSync('fio', ['--enghelp=nbd']).status === 0;
  const workloads = WORKLOADS.filter(({ name, tool }) => new RegExp(options.only, 'i').test(name) && (hasFio || !tool));
  if (workloads.length === 0) throw new BenchError(`no workload matches ${options.only}`);
  if (!fs.existsSync(path.join(DIST, 'index.js'))) throw new BenchError(`${DIST} is missing; run 'npm run build'`);
  requireCommand('nbdkit', 'nbdkit');
  buildNbdload();
  const running = [];
  for (const server of SERVERS) running.push(await start(server, path.join(directory, String(running.length))));
  // Until its compiler knows the code, and its memory is mapped.
  for (const server of running) {
    for (const mode of server.modes) await measure(server, { ...workloads[0], tool: undefined, mode }, seconds / 2);
  }
  const results = [];
  for (const workload of workloads) {
    const servers = running.filter(({ modes }) => modes.includes(workload.mode));
    const samples = new Map(servers.map((server) => [server.title, []]));
    for (let round = 0; round < rounds; round++) {
      for (let turn = 0; turn < servers.length; turn++) {
        const server = servers[(round + turn) % servers.length];
        samples.get(server.title).push(await measure(server, workload, seconds));
      }
    }
    results.push({ workload, samples: Object.fromEntries(samples) });
    process.stdout.write(describe(workload, samples));
  }
  if (options.json) fs.writeFileSync(options.json, `${JSON.stringify(results, null, 2)}\n`);
}

async function start({ title, modes, command }, socket) {
  const [program, args] = command(socket);
  const child = spawn(program, args, { stdio: ['ignore', 'ignore', 'inherit'] });
  children.add(child);
  const end = Date.now() + READY_TIMEOUT_MS;
  while (!(await isListening(socket))) {
    if (child.exitCode !== null) throw new BenchError(`${title} ended during its start`);
    if (Date.now() > end) throw new BenchError(`${title} is not ready after ${READY_TIMEOUT_MS} ms`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  return { title, modes, pid: child.pid, socket };
}

function isListening(socket) {
  return new Promise((resolve) => {
    const probe = net.connect(socket, () => {
      probe.destroy();
      resolve(true);
    });
    probe.once('error', () => resolve(false));
  });
}

/** Requests a second, and the CPU time of the server for each, microseconds. */
async function measure({ title, pid, socket }, workload, length) {
  const uri = `nbd+unix:///?socket=${socket}`;
  const before = cpuSeconds(pid);
  const [program, args] =
    workload.tool === 'fio' ? fioCommand(uri, workload, length) : nbdloadCommand(uri, workload, length);
  const { stdout, stderr, code } = await run(program, args);
  const rate = workload.tool === 'fio' ? fioRate(stdout, workload.mode) : Number.parseFloat(stdout);
  if (code !== 0 || !(rate > 0)) throw new BenchError(`${workload.name} on ${title} failed: ${stdout}${stderr}`);
  return { perSecond: rate, cpuUs: ((cpuSeconds(pid) - before) * 1e6) / (rate * length) };
}

function nbdloadCommand(uri, { depth, block, mode, order }, length) {
  return [NBDLOAD, [uri, 1, depth, block, mode, order, length, SPAN].map(String)];
}

function fioCommand(uri, { depth, block, mode, order }, length) {
  const rw = order === 'rand' ? `rand${mode}` : mode;
  const job = {
    name: 'job',
    ioengine: 'nbd',
    uri,
    rw,
    bs: block,
    iodepth: depth,
    size: SPAN,
    runtime: `${length * 1000}ms`,
  };
  const args = Object.entries(job).map(([name, value]) => `--${name}=${value}`);
  return ['fio', [...args, '--time_based', '--norandommap', '--output-format=json']];
}

function fioRate(stdout, mode) {
  return JSON.parse(stdout.slice(stdout.indexOf('{'))).jobs[0][mode].iops;
}

function cpuSeconds(pid) {
  const stat = fs.readFileSync(`/proc/${pid}/stat`, 'utf8');
  // The name of the program, in parentheses, may contain blanks. utime and stime are the 14th and 15th field.
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  return (Number(fields[11]) + Number(fields[12])) / TICKS_PER_SECOND;
}

function run(program, args) {
  return new Promise((resolve, reject) => {
    const child = spawn(program, args, { stdio: ['ignore', 'pipe', 'pipe'], cwd: directory });
    children.add(child);
    let stdout = '';
    let stderr = '';
    child.stdout.setEncoding('utf8').on('data', (text) => (stdout += text));
    child.stderr.setEncoding('utf8').on('data', (text) => (stderr += text));
    child.once('error', reject);
    child.once('close', (code) => {
      children.delete(child);
      resolve({ code, stdout, stderr });
    });
  });
}

/** A line for each server: its rate and CPU time, and the first server's as a multiple of it. */
function describe({ name, goal }, samples) {
  const [first] = samples.values();
  const lines = Array.from(samples, ([title, list]) => {
    const rate = `${(median(list.map(({ perSecond }) => perSecond)) / 1000).toFixed(2)} k/s`;
    const cpu = `${median(list.map(({ cpuUs }) => cpuUs)).toFixed(1)} µs`;
    const ratioOf = (field) => median(list.map((sample, round) => first[round][field] / sample[field])).toFixed(2);
    const isFirst = list === first;
    const ratio = isFirst ? '' : `| ${ratioOf('perSecond')} | ${ratioOf('cpuUs')}`;
    const wanted = title.startsWith('nbdkit') && goal !== undefined ? ` (goal ${goal})` : '';
    return `| ${title} | ${rate} | ${cpu} ${isFirst ? '| |' : ratio + wanted} |\n`;
  });
  return `\n${name}\n\n| | rate | CPU a request | library's rate | library's CPU |\n| --- | ---: | ---: | ---: | ---: |\n${lines.join('')}`;
}

function median(values) {
  const sorted = values.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}
