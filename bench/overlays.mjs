/**
 * What 4 KiB writes cost right after a snapshot, on a fully written disk: in place, over the snapshot, and the same over a qcow2
 * overlay of qemu-nbd, with and without extended_l2. Servers take turns in each round; the output is medians of the rates and of
 * the ratios within a round, the 99th percentile, and the bytes that the disk has written for each byte of the client, with one
 * sync at the end; and of reads before the snapshot and after those writes. Owns everything that it makes. The bytes written are
 * those of the whole disk: nothing else should write to it.
 *
 *     npm run build && node bench/overlays.mjs [--size 1073741824] [--rounds 5] [--seconds 3] [--count N] [--dir DIR]
 */
import { execFileSync, spawn } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { buildNbdload, NBDLOAD } from './nbdload.mjs';
import { readOptions } from './options.mjs';

const HERE = path.dirname(fileURLToPath(import.meta.url));
const USAGE = `usage: node bench/overlays.mjs [options]
  --size BYTES      of the disk (default 1 GiB)
  --rounds N        rounds (default 5)
  --seconds S       length of a measurement (default 3)
  --count N         writes of a measurement, in place of --seconds
  --depths N,N      requests at a time (default 1,16)
  --program FILE    bin/sheepgate.cjs of another build, for a comparison
  --dir DIR         where the data is put (default: the temporary directory)`;
const values = readOptions({
  program: 'overlays',
  usage: USAGE,
  numbers: ['size', 'rounds', 'seconds'],
  options: {
    size: { type: 'string', default: String(2 ** 30) },
    rounds: { type: 'string', default: '5' },
    seconds: { type: 'string', default: '3' },
    count: { type: 'string' },
    depths: { type: 'string', default: '1,16' },
    program: { type: 'string', default: path.join(HERE, '../bin/sheepgate.cjs') },
    dir: { type: 'string', default: os.tmpdir() },
  },
});
const SIZE = Number(values.size);
const directory = fs.mkdtempSync(path.join(path.resolve(values.dir), 'sheepgate-overlays-'));
const children = [];
process.on('exit', () => {
  for (const child of children) child.kill('SIGKILL');
  fs.rmSync(directory, { recursive: true, force: true });
});
buildNbdload();
const cli = path.resolve(values.program);
const store = path.join(directory, 'store');
const socket = path.join(directory, 'sheepgate.sock');
const qemuSocket = path.join(directory, 'qemu.sock');
const base = path.join(directory, 'base.raw');
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const median = (list) => [...list].sort((a, b) => a - b)[list.length >> 1];

async function start(command, args, at) {
  fs.rmSync(at, { force: true });
  const child = spawn(command, args, { stdio: 'ignore' });
  children.push(child);
  for (let n = 0; n < 400 && !fs.existsSync(at); n++) await sleep(25);
  return async () => {
    child.kill('SIGTERM');
    await new Promise((resolve) => child.once('exit', resolve));
  };
}

function load(
  uri,
  depth,
  mode = 'write',
  pattern = 'rand',
  seconds = values.seconds,
  block = 4096,
  count = values.count,
) {
  const args = [uri, '1', String(depth), String(block), mode, pattern, String(seconds)];
  if (count !== undefined) args.push(String(SIZE), String(count));
  const [rate, , p50, p99] = execFileSync(NBDLOAD, args, { encoding: 'utf8' }).split(' ').map(Number);
  return { rate, p50, p99, writes: count === undefined ? rate * Number(seconds) : Number(count) };
}

/** Bytes that the disk below the directory has written since it was attached. */
function written() {
  const { dev } = fs.statSync(directory);
  const device = `/sys/dev/block/${Math.floor(dev / 256)}:${dev % 256}/stat`;
  return fs.existsSync(device) ? Number(fs.readFileSync(device, 'utf8').trim().split(/\s+/)[6]) * 512 : NaN;
}

/** A measurement with the bytes written for each byte of the client, after a sync of everything. */
function measured(uri, depth) {
  execFileSync('sync');
  const before = written();
  const result = load(uri, depth);
  execFileSync('sync');
  return { ...result, amplification: (written() - before) / (result.writes * 4096) };
}

const sheepgate = (...args) => execFileSync(process.execPath, [cli, ...args, '--store', store], { encoding: 'utf8' });
const stop = await start(
  process.execPath,
  [cli, 'serve', '--store', store, '--listen', `unix:${socket}`, '--create', `disk:${SIZE}`],
  socket,
);
const uri = `nbd+unix:///disk?socket=${socket}`;
load(uri, 8, 'write', 'seq', 600, 2 ** 20, SIZE / 2 ** 20);
const hasQemu = fs.existsSync('/usr/bin/qemu-nbd');
if (hasQemu) {
  execFileSync('truncate', ['-s', String(SIZE), base]);
  const stopRaw = await start('qemu-nbd', ['-f', 'raw', '-t', '-k', qemuSocket, base], qemuSocket);
  load(`nbd+unix:///?socket=${qemuSocket}`, 8, 'write', 'seq', 600, 2 ** 20, SIZE / 2 ** 20);
  await stopRaw();
}

async function onQcow2(depth, options) {
  const overlay = path.join(directory, 'overlay.qcow2');
  fs.rmSync(overlay, { force: true });
  execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', base, '-F', 'raw', '-o', options, overlay]);
  const stopQemu = await start('qemu-nbd', ['-f', 'qcow2', '-t', '-k', qemuSocket, overlay], qemuSocket);
  try {
    return measured(`nbd+unix:///?socket=${qemuSocket}`, depth);
  } finally {
    await stopQemu();
  }
}

async function mergedAgain() {
  for (let n = 0; n < 6000; n++) {
    const { merging } = JSON.parse(sheepgate('vdi', 'show', 'disk', '--json'));
    if (merging === undefined) return;
    await sleep(100);
  }
}

for (const depth of values.depths.split(',').map(Number)) {
  const rounds = [];
  const readRatios = [];
  for (let round = 0; round < Number(values.rounds); round++) {
    const result = { 'in place': measured(uri, depth) };
    const reads = { before: load(uri, depth, 'read') };
    sheepgate('vdi', 'snapshot', 'disk', 's');
    result['after a snapshot'] = measured(uri, depth);
    reads.after = load(uri, depth, 'read');
    readRatios.push(reads.after.rate / reads.before.rate);
    sheepgate('vdi', 'delete', 'disk@s');
    await mergedAgain();
    if (hasQemu) {
      result.qcow2 = await onQcow2(depth, 'compat=1.1');
      result['qcow2 extended_l2'] = await onQcow2(depth, 'compat=1.1,extended_l2=on,cluster_size=128k');
    }
    rounds.push(result);
  }
  console.log(`4 KiB random writes, ${depth} at a time, on ${SIZE / 2 ** 20} MiB`);
  for (const name of Object.keys(rounds[0])) {
    const of = (pick) => median(rounds.map((round) => pick(round[name])));
    const ratio = median(rounds.map((round) => round['after a snapshot'].rate / round[name].rate));
    console.log(
      `  ${name.padEnd(18)} ${(of((each) => each.rate) / 1000).toFixed(1).padStart(7)} k/s` +
        `  p99 ${String(of((each) => each.p99)).padStart(6)} us` +
        `  written ${of((each) => each.amplification)
          .toFixed(1)
          .padStart(6)} bytes a byte` +
        `  after a snapshot: ${ratio.toFixed(2)} times this rate`,
    );
  }
  console.log(`  reads after these writes: ${median(readRatios).toFixed(2)} times the rate before the snapshot`);
}
await stop();
process.exit(0);
