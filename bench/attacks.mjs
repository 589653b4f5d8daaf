/**
 * The effect of one client on another: 4 KiB reads, one at a time, and visits (connect, read 4 KiB, leave), alone and beside
 * each kind of client of attack-clients.mjs at full speed. Owns every process and directory that it makes. The goal for reads:
 * a p99 below 10 ms, and a maximum below 50 ms or, on a noisy machine, twice the maximum alone. Visits have no time limit, but
 * none may fail.
 *
 *     npm run build && node bench/attacks.mjs [--only PATTERN] [--seconds 5] [--dist DIST] [--dir DIR] [--vdis 20000]
 *
 * It takes about four minutes. With --dist it runs another build.
 */
import { spawn } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import readline from 'node:readline';
import { BenchError, buildNbdload, buildSlowDisk, NBDLOAD, SLOW_DISK } from './nbdload.mjs';
import { readOptions } from './options.mjs';

const HERE = import.meta.dirname;
const CLIENTS = path.join(HERE, 'attack-clients.mjs');
const MIB = 2 ** 20;
const PAGE = 4096;
const READY_TIMEOUT_MS = 60_000;
const STOP_TIMEOUT_MS = 15_000;
/** An attack runs for this long before the measurement. */
const WARM_UP_MS = 1000;
/** A reader without an answer for this long after its time is stopped. */
const PATIENCE_SECONDS = 20;
const LIMIT_P99_MS = 10;
const LIMIT_MAX_MS = 50;

/** Another user, and so another peer for the daemon; 65534 is the user nobody. */
const STRANGER = process.getuid?.() === 0 ? { uid: 65534, gid: 65534 } : {};

/**
 * `item`: its number in the list of attacks. `store`: the store that is served. `isStranger`: the attack hits a limit per peer,
 * so the attacker must be another peer than the measured client; without root it is the same peer, and both are refused.
 * `slow`: by how much longer, in ms, each write or sync of its disk takes (slow-disk.c).
 */
const SCENARIOS = [
  { item: '-', name: 'nobody', store: 'few' },
  { item: '1', name: 'status-empty', what: 'BLOCK_STATUS of an empty 4 TiB disk', store: 'few' },
  { item: '1', name: 'changed', what: 'changed blocks of an empty 4 TiB disk', store: 'few' },
  { item: '1', name: 'trim-empty', what: 'TRIM of an empty 4 TiB disk', store: 'few' },
  { item: '1', name: 'fast-zero', what: 'FAST_ZERO of an empty 4 TiB disk', store: 'few' },
  { item: '1', name: 'cache', what: 'CACHE of an empty 4 TiB disk', store: 'few' },
  { item: '1', name: 'plain-4g', what: 'BLOCK_STATUS of 4 GiB, 32-bit lengths', store: 'few' },
  { item: '1', name: 'bad-requests', what: 'requests behind the end', store: 'few' },
  { item: '1', name: 'status-fragmented', what: 'BLOCK_STATUS of 256 MiB in 4 KiB pieces', store: 'few' },
  { item: '2', name: 'read-unread', what: '60 clients read 32 MiB each and take nothing', store: 'few' },
  { item: '2', name: 'write-unfinished', what: '50 writers one byte short of 32 MiB', store: 'few' },
  { item: '3', name: 'unflushed', what: 'leaves 16,384 objects unflushed, again and again', store: 'few' },
  { item: '3', name: 'trim-full', what: 'TRIM of a full map of 1 TiB', store: 'few' },
  { item: '4', name: 'handshakes', what: 'connections that never choose an export', store: 'few', isStranger: true },
  { item: '4', name: 'options', what: '4,096 options in one send', store: 'few' },
  { item: '4', name: 'list', what: '20 clients list all exports', store: 'many' },
  {
    item: '5',
    name: 'idle',
    what: '1,000 idle connections, 1,024 descriptors',
    store: 'few',
    descriptors: 1024,
    isStranger: true,
  },
  { item: '6', name: 'slow-writes', what: '32 writes at once, each takes 200 ms', store: 'few', slow: { write: 200 } },
  {
    item: '6',
    name: 'slow-new',
    what: '32 writes of new objects, each takes 200 ms',
    store: 'few',
    slow: { write: 200 },
  },
  {
    item: '6',
    name: 'slow-syncs',
    what: '8 disks flush, each sync takes 1 s; reads of 2 MiB',
    store: 'few',
    slow: { sync: 1000 },
    readBytes: 2 * MIB,
  },
  { item: '7', name: 'vdi-list', what: 'vdi list, again and again', store: 'many' },
];

const USAGE = `usage: node bench/attacks.mjs [options]
  --only PATTERN    only clients whose name matches this regular expression, for example "trim"
  --seconds S       how long each is measured (default 5)
  --vdis N          in the store with very many (default 20000)
  --serve-arg ARG   one more argument for "sheepgate serve"; may be repeated
  --dist DIST       another build, for a comparison
  --dir DIR         where the stores are put (default: the temporary directory)
names: ${SCENARIOS.map(({ name }) => name).join(', ')}`;

const values = readOptions({
  program: 'attacks',
  usage: USAGE,
  numbers: ['seconds', 'vdis'],
  options: {
    only: { type: 'string', default: '' },
    seconds: { type: 'string', default: '5' },
    vdis: { type: 'string', default: '20000' },
    dist: { type: 'string', default: path.join(HERE, '../dist') },
    dir: { type: 'string', default: os.tmpdir() },
    'serve-arg': { type: 'string', multiple: true, default: [] },
  },
});
const seconds = Number(values.seconds);
const dist = path.resolve(values.dist);
const directory = fs.mkdtempSync(path.join(path.resolve(values.dir), 'sheepgate-attacks-'));
// For strangers.
fs.chmodSync(directory, 0o711);
const children = new Set();
process.on('exit', () => {
  for (const child of children) child.kill('SIGKILL');
  fs.rmSync(directory, { recursive: true, force: true });
});
for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => process.exit(1));

try {
  await main();
} catch (error) {
  console.error(error instanceof BenchError ? `bench: ${error.message}` : error.stack);
  process.exit(1);
}

async function main() {
  const wanted = SCENARIOS.filter(({ name }) => name === 'nobody' || new RegExp(values.only).test(name));
  buildNbdload();
  // In separate processes, which exit: the daemon opens stores that another process has closed.
  for (const store of new Set(wanted.map(({ store: name }) => name))) await prepare(store);
  console.log(
    `${'item'.padEnd(5)}${'client'.padEnd(54)}reads, ms: p50    p99     max   visits, ms: p50    p99     max`,
  );
  let alone;
  const bad = [];
  for (const scenario of wanted) {
    const result = await measure(scenario);
    alone ??= result;
    const isGood =
      scenario.name === 'nobody' ||
      (result.isServed &&
        result.reads.p99 <= LIMIT_P99_MS &&
        result.reads.max <= Math.max(LIMIT_MAX_MS, 2 * alone.reads.max) &&
        result.failures === 0);
    if (!isGood) bad.push(scenario.name);
    console.log(
      `${scenario.item.padEnd(5)}${(scenario.what ?? 'no other client').padEnd(54)}     ${cells(result.reads)}            ` +
        `${cells(result.visits)}${isGood ? '' : '  over'}${result.isServed ? '' : '  not served'}${result.failures > 0 ? `  ${result.failures} visits failed` : ''}` +
        `  ${(result.peakBytes / MIB).toFixed(0)} MiB`,
    );
  }
  console.log(bad.length === 0 ? 'all within the goal' : `over the goal: ${bad.join(', ')}`);
  process.exit(bad.length === 0 ? 0 : 1);
}

function cells({ p50, p99, max }) {
  return [p50, p99, max].map((ms) => ms.toFixed(ms < 100 ? 2 : 0).padStart(7)).join(' ');
}

async function measure({ name, store, descriptors, isStranger, slow, readBytes = PAGE }) {
  const where = path.join(directory, store);
  // Not in the store: other users have no access there.
  const socket = path.join(directory, `${store}.sock`);
  const daemon = await serve(where, socket, descriptors, slow);
  const attacker =
    name === 'nobody' ? undefined : start(process.execPath, [CLIENTS, name, socket], isStranger ? STRANGER : {});
  await sleep(WARM_UP_MS);
  const visits = [];
  let failures = 0;
  const visitor = start(process.execPath, [CLIENTS, 'visitor', socket, 'data']);
  readline.createInterface({ input: visitor.stdout }).on('line', (line) => {
    if (/^\d+$/.test(line)) visits.push(Number(line) / 1000);
    else failures++;
  });
  const began = performance.now();
  const args = [
    `nbd+unix:///data?socket=${socket}`,
    '1',
    '1',
    String(readBytes),
    'read',
    'rand',
    String(seconds),
    String(64 * MIB),
  ];
  const load = start(NBDLOAD, args);
  let output = '';
  load.stdout.on('data', (chunk) => (output += chunk));
  const patience = setTimeout(() => load.kill('SIGKILL'), (seconds + PATIENCE_SECONDS) * 1000);
  await ended(load);
  clearTimeout(patience);
  const [, , p50, p99, max] = output.split(' ').map((word) => Number.parseFloat(word) / 1000);
  // A request without an answer counts with the time that it has waited.
  const waited = performance.now() - began;
  if (visits.length === 0) visits.push(waited);
  const peakBytes = 1024 * Number(/VmHWM:\s+(\d+)/.exec(fs.readFileSync(`/proc/${daemon.pid}/status`, 'utf8'))?.[1]);
  await stop(visitor);
  if (attacker !== undefined) await stop(attacker);
  await stop(daemon);
  visits.sort((a, b) => a - b);
  return {
    reads: { p50: p50 ?? waited, p99: p99 ?? waited, max: max ?? waited },
    isServed: max !== undefined,
    visits: { p50: quantile(visits, 0.5), p99: quantile(visits, 0.99), max: visits.at(-1) },
    failures,
    peakBytes,
  };
}

function quantile(sorted, share) {
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))];
}

// --- the stores

async function prepare(name) {
  const store = path.join(directory, name);
  const child = start(process.execPath, [
    '--input-type=module',
    '-e',
    `const { prepare } = await import(${JSON.stringify(path.join(HERE, 'attack-stores.mjs'))});
     await prepare(${JSON.stringify({ dist, store, kind: name, vdis: Number(values.vdis) })});`,
  ]);
  if ((await ended(child)) !== 0) throw new BenchError(`the store ${store} could not be prepared`);
}

// --- processes

async function serve(store, socket, descriptors, slow) {
  const args = [
    path.join(dist, '../bin/sheepgate.cjs'),
    'serve',
    '--json',
    '--store',
    store,
    '--listen',
    `unix:${socket}`,
    '--socket-mode',
    '666',
  ];
  args.push(...values['serve-arg']);
  const env = { ...process.env, ...(slow && slowDisk(store, slow)) };
  const daemon =
    descriptors === undefined
      ? start(process.execPath, args, { errors: 'ignore', env })
      : start('/bin/sh', ['-c', `ulimit -n ${descriptors} && exec "$@"`, 'sh', process.execPath, ...args], {
          errors: 'ignore',
          env,
        });
  let timer;
  await Promise.race([
    new Promise((resolve) => daemon.stdout.once('data', resolve)),
    ended(daemon).then((code) => {
      throw new BenchError(`the daemon ended during its start (${code})`);
    }),
    new Promise((_, reject) => {
      timer = setTimeout(() => reject(new BenchError('the daemon does not become ready')), READY_TIMEOUT_MS);
    }),
  ]);
  clearTimeout(timer);
  daemon.stdout.resume();
  return daemon;
}

/** Not LMDB's file: a client that opens a slow disk waits for its commits, which is not the effect of another client. */
function slowDisk(store, { write = 0, sync = 0 }) {
  buildSlowDisk();
  const directory = fs.realpathSync(store);
  return { LD_PRELOAD: SLOW_DISK, SLOW_DISK: directory, SLOW_WRITE_MS: `${write}`, SLOW_SYNC_MS: `${sync}` };
}

function start(command, args, { errors = process.env.ATTACK_DEBUG ? 'inherit' : 'ignore', ...options } = {}) {
  const child = spawn(command, args, { stdio: ['ignore', 'pipe', errors], ...options });
  children.add(child);
  child.over = new Promise((resolve) => {
    child.once('error', () => resolve(-1));
    child.once('exit', (code, signal) => {
      children.delete(child);
      resolve(code ?? signal);
    });
  });
  return child;
}

function ended(child) {
  return child.over;
}

async function stop(child) {
  child.kill('SIGTERM');
  const timer = setTimeout(() => child.kill('SIGKILL'), STOP_TIMEOUT_MS);
  await child.over;
  clearTimeout(timer);
}

function sleep(ms) {
  return new Promise((resolve) => setTimeout(resolve, ms));
}
