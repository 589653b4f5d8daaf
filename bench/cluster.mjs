/**
 * Sheepgate in front of a Sheepdog cluster, compared with the alternatives: tgt with its Sheepdog backing store over iSCSI,
 * pipes of `dog`, and a bare client, the limit of the nodes. Three real nodes, two copies, all on loopback and in one run;
 * rounds are interleaved and their order rotates. Prints medians, and medians of the ratios of each round. Owns what it starts.
 * The goal, at 32 requests at a time and at 1 MiB: twice tgt, or 0.9 of the bare client, where the nodes are the limit.
 *
 *     npm run build && node bench/cluster.mjs [--quick]
 *
 * It takes about 15 minutes, with --quick two. With --also DIST another build is measured in the same run.
 */
import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { Bare, cpuUs, Dog, Gate, killAll, startNodes, stop, Tgt } from './cluster-servers.mjs';
import { BenchError, buildIscsiload, buildNbdload, buildSheepload, haveCommand } from './nbdload.mjs';
import { readOptions } from './options.mjs';
import { writePattern } from './pattern.mjs';

const KIB = 2 ** 10;
const MIB = 2 ** 20;
const HERE = import.meta.dirname;
const OBJECT_BYTES = 4 * MIB;
/** In units of the span: two copies of five disks, of one more during a snapshot, and the data to be written. */
const COPIES_OF_ALL = 14;
const TIMES_TGT = 2;
const SHARE_OF_BARE = 0.9;

const LOADS = [
  { name: '4 KiB random read, QD 1', depth: 1, block: 4 * KIB, mode: 'read', order: 'rand' },
  { name: '4 KiB random read, QD 32', depth: 32, block: 4 * KIB, mode: 'read', order: 'rand' },
  { name: '4 KiB random write, QD 1', depth: 1, block: 4 * KIB, mode: 'write', order: 'rand' },
  { name: '4 KiB random write, QD 32', depth: 32, block: 4 * KIB, mode: 'write', order: 'rand' },
  { name: '1 MiB sequential read, QD 4', depth: 4, block: MIB, mode: 'read', order: 'seq' },
  { name: '1 MiB sequential write, QD 4', depth: 4, block: MIB, mode: 'write', order: 'seq' },
];

const USAGE = `usage: node bench/cluster.mjs [options]
  --rounds N        rounds of each load (default 5)
  --seconds S       how long each is measured in a round (default 2)
  --span MIB        the size of each disk (default 256)
  --only PATTERN    only loads whose name matches this regular expression, for example "1 MiB" or "after"
  --peers LIST      beside sheepgate, by comma: tgt, dog, bare (default all; "none" for none)
  --serve-arg ARG   one more argument for "sheepgate serve"; may be repeated
  --dist DIST       another build
  --also DIST       a second build, measured beside it
  --dir DIR         where the nodes keep their objects (default /dev/shm, or the temporary directory)
  --json FILE       write every sample there as well
  --quick           2 rounds of half a second on disks of 64 MiB: the figures say little
The nodes are those on the PATH: sheep, dog; tgtd and tgtadm for tgt.`;

const values = readOptions({
  program: 'cluster',
  usage: USAGE,
  numbers: ['rounds', 'seconds', 'span'],
  options: {
    rounds: { type: 'string', default: process.argv.includes('--quick') ? '2' : '5' },
    seconds: { type: 'string', default: process.argv.includes('--quick') ? '0.5' : '2' },
    span: { type: 'string', default: process.argv.includes('--quick') ? '64' : '256' },
    only: { type: 'string', default: '' },
    peers: { type: 'string', default: 'tgt,dog,bare' },
    'serve-arg': { type: 'string', multiple: true, default: [] },
    dist: { type: 'string', default: path.join(HERE, '../dist') },
    also: { type: 'string' },
    dir: { type: 'string', default: fs.existsSync('/dev/shm') ? '/dev/shm' : os.tmpdir() },
    json: { type: 'string' },
    quick: { type: 'boolean', default: false },
  },
});
const seconds = Number(values.seconds);
const rounds = Math.ceil(Number(values.rounds));
const span = Math.ceil((Number(values.span) * MIB) / OBJECT_BYTES) * OBJECT_BYTES;
const directories = [];
process.on('exit', () => {
  killAll();
  for (const directory of directories) fs.rmSync(directory, { recursive: true, force: true, maxRetries: 5 });
});
for (const signal of ['SIGHUP', 'SIGINT', 'SIGTERM']) process.on(signal, () => process.exit(1));

try {
  await main();
  process.exit(0);
} catch (error) {
  process.stderr.write(`cluster: ${error instanceof BenchError ? error.message : error.stack}\n`);
  process.exit(1);
}

async function main() {
  const missing = ['sheep', 'dog'].filter((command) => !haveCommand(command));
  if (missing.length > 0) {
    throw new BenchError(
      `nothing is measured: no ${missing.join(' and ')} on the PATH (Sheepdog 1.0, built from source)`,
    );
  }
  const asked = values.peers.split(',').filter((peer) => peer !== 'none');
  const unknown = asked.find((peer) => !['tgt', 'dog', 'bare'].includes(peer));
  if (unknown !== undefined) throw new BenchError(`--peers: no peer "${unknown}"; there are tgt, dog, bare`);
  const isWanted = (name) => new RegExp(values.only, 'i').test(name);
  const rows = [
    ...LOADS.map((load) => ({ ...load, title: load.name })),
    ...LOADS.map((load) => ({ ...load, title: `${load.name}, after a snapshot`, isAfterSnapshot: true })),
  ].filter(({ title }) => isWanted(title));
  if (rows.length === 0) throw new BenchError(`no load matches ${values.only}`);

  const gates = [new Gate('gate', 'sheepgate', path.resolve(values.dist))];
  if (values.also !== undefined) gates.push(new Gate('also', 'the other build', path.resolve(values.also)));
  buildNbdload();
  const peers = [];
  if (asked.includes('tgt') && isTgtThere()) {
    buildIscsiload();
    peers.push(new Tgt());
  }
  if (asked.includes('dog')) peers.push(new Dog());
  if (asked.includes('bare')) {
    buildSheepload();
    peers.push(new Bare());
  }
  const servers = [...gates, ...peers];
  const needed = span * COPIES_OF_ALL;
  const { bavail, bsize } = fs.statfsSync(values.dir);
  if (bavail * bsize < needed) {
    throw new BenchError(`${values.dir} has too little space, this needs ${needed / MIB} MiB; give --dir or --span`);
  }

  const directory = fs.mkdtempSync(path.join(path.resolve(values.dir), 'sheepgate-cluster-'));
  directories.push(directory);
  const pattern = path.join(directory, 'pattern');
  writePattern(pattern, span);
  note('starting the nodes');
  const nodes = await startNodes(directory);
  for (const server of servers) {
    note(`filling ${server.title}`);
    await server.start(nodes, span, pattern, values['serve-arg']);
  }

  const began = performance.now();
  const results = [];
  for (const row of rows) results.push(await measureRow(row, nodes, servers));
  note('');
  const about = describe(servers, (performance.now() - began) / 60_000);
  process.stdout.write(`${about.map((line) => `- ${line}`).join('\n')}\n`);
  for (const isAfterSnapshot of [false, true]) {
    const of = results.filter(({ row }) => Boolean(row.isAfterSnapshot) === isAfterSnapshot);
    if (of.length > 0) process.stdout.write(`\n${table(of, servers, isAfterSnapshot)}\n`);
  }
  if (values.json)
    fs.writeFileSync(values.json, `${JSON.stringify({ about, rounds, seconds, span, results }, null, 2)}\n`);
  for (const { process: daemon } of servers) if (daemon) await stop(daemon);
}

function isTgtThere() {
  const missing = ['tgtd', 'tgtadm'].filter((command) => !haveCommand(command));
  if (missing.length > 0) note(`left out: tgt (no ${missing.join(', ')} on the PATH; apt-get install tgt)\n`);
  return missing.length === 0;
}

// --- measuring

/** Samples of all columns, one a round. */
async function measureRow(row, nodes, servers) {
  const columns = columnsOf(row, servers);
  const samples = Object.fromEntries(columns.map(({ id }) => [id, []]));
  for (let round = 0; round < rounds; round++) {
    for (let turn = 0; turn < columns.length; turn++) {
      const column = columns[(round + turn) % columns.length];
      note(`${row.title}: round ${round + 1} of ${rounds}, ${column.title}`);
      samples[column.id].push(await measure(row, column, nodes, servers));
    }
  }
  return { row, samples };
}

/** The servers of a row. After a snapshot also NAME@now, which sheepgate can use where the others need a snapshot. */
function columnsOf(row, servers) {
  const columns = servers
    .filter((server) => server.canDo?.(row) ?? true)
    .map((server) => ({
      id: server.id,
      title: server.title,
      server,
      before: row.isAfterSnapshot ? 'snapshot' : undefined,
    }));
  if (row.isAfterSnapshot) {
    const gates = servers.filter((server) => server instanceof Gate);
    columns.push(
      ...gates.map((server) => ({
        id: `${server.id}@now`,
        title: `${server.title}, NAME@now`,
        server,
        before: 'openNow',
      })),
    );
  }
  return columns;
}

async function measure(row, { server, before }, nodes, servers) {
  const isFirstWrite = row.isAfterSnapshot && row.mode === 'write';
  const undo = before && (await server[before]?.());
  const own = server.process ? [server.process] : [];
  const all = servers.flatMap(({ process: daemon }) => daemon ?? []);
  await nodes.quiet(all);
  // An object has only one first write after a snapshot: write each object once, or the whole disk in order.
  const order = isFirstWrite && row.order === 'rand' ? 'each' : row.order;
  const count = isFirstWrite ? span / (order === 'each' ? OBJECT_BYTES : row.block) : 0;
  const ownBefore = cpuUs(own);
  const nodesBefore = cpuUs(nodes.processes);
  const result = await server.load({ ...row, order }, seconds, span, count);
  const requests = count || (server.id === 'dog' ? span / row.block : result.perSecond * seconds);
  const sample = {
    ...result,
    requests,
    cpuUs: cpuUs(own) - ownBefore,
    nodesCpuUs: cpuUs(nodes.processes) - nodesBefore,
  };
  await undo?.();
  return sample;
}

// --- telling

function table(results, servers, isAfterSnapshot) {
  const columns = columnsOf({ ...results[0].row, block: MIB }, servers);
  const has = (id) => servers.some((server) => server.id === id);
  const gateIds = columns.filter(({ server }) => server instanceof Gate).map(({ id }) => id);
  const short = (id) => columns.find((column) => column.id === id).title.replace('sheepgate, ', '');
  const head = [
    isAfterSnapshot ? 'after a snapshot' : '',
    ...columns.map(({ title }) => title.replace('sheepgate, ', '')),
  ];
  const ratios = [];
  for (const id of gateIds) for (const peer of ['tgt', 'bare']) if (has(peer)) ratios.push([id, peer]);
  if (has('also')) ratios.push(['gate', 'also']);
  head.push(...ratios.map(([id, peer]) => `${short(id)} / ${columns.find((column) => column.id === peer).title}`));
  if (has('tgt') || has('bare')) head.push('goal');
  head.push('CPU µs: sheepgate', ...(has('tgt') ? ['tgt'] : []), 'nodes');
  const rows = results.map(({ row, samples }) => {
    const cells = columns.map(({ id }) =>
      samples[id] ? rate(median(samples[id].map((s) => s.perSecond)), row.block) : '–',
    );
    for (const [id, peer] of ratios) cells.push(paired(samples, id, peer)?.toFixed(2) ?? '–');
    if (has('tgt') || has('bare')) cells.push(goal(row, samples));
    cells.push(
      cpuOf(samples.gate, 'cpuUs'),
      ...(has('tgt') ? [cpuOf(samples.tgt, 'cpuUs')] : []),
      cpuOf(samples.gate, 'nodesCpuUs'),
    );
    return [row.name, ...cells];
  });
  const lines = [head, head.map((_, column) => (column === 0 ? '---' : '---:')), ...rows];
  return lines.map((cells) => `| ${cells.join(' | ')} |`).join('\n');
}

function goal(row, samples) {
  if (row.depth === 1) return 'none';
  const tgt = paired(samples, 'gate', 'tgt');
  const bare = paired(samples, 'gate', 'bare');
  if (tgt >= TIMES_TGT) return `${TIMES_TGT} tgt`;
  if (bare >= SHARE_OF_BARE) return `${SHARE_OF_BARE} bare`;
  return 'missed';
}

/** The median of the ratios of each round. */
function paired(samples, id, peer) {
  if (!samples[id] || !samples[peer]) return undefined;
  return median(samples[id].map(({ perSecond }, round) => perSecond / samples[peer][round].perSecond));
}

/** Per request, over all rounds, because its clock is coarse. */
function cpuOf(samples, field) {
  const sum = (what) => samples.reduce((total, sample) => total + sample[what], 0);
  return Math.round(sum(field) / sum('requests')).toString();
}

function median(numbers) {
  const sorted = [...numbers].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

function rate(perSecond, block) {
  if (block > 4 * KIB) return `${((perSecond * block) / MIB).toFixed(0)} MiB/s`;
  return perSecond < 10_000 ? `${perSecond.toFixed(0)}/s` : `${(perSecond / 1000).toFixed(1)} k/s`;
}

function describe(servers, minutes) {
  const versions = [
    lineOf(process.execPath, path.join(HERE, '../bin/sheepgate.cjs'), '--version').replace(/^/, 'sheepgate '),
  ];
  versions.push(`Node ${process.version.slice(1)}`, lineOf('sheep', '--version'));
  if (servers.some(({ id }) => id === 'tgt')) versions.push(`tgt ${lineOf('tgtd', '--version')}`);
  return [
    `${os.cpus().length} cores (${os.arch()}) for nodes, servers and load; Linux ${os.release().replace(/-.*/, '')}, ${Math.round(os.totalmem() / 2 ** 30)} GiB`,
    `${versions.join('; ')}; commit ${lineOf('git', '-C', HERE, 'rev-parse', '--short', 'HEAD') || 'unknown'}`,
    `3 nodes, 2 copies, no syncs, objects on ${lineOf('stat', '-f', '-c', '%T', values.dir)}; disks of ${span / MIB} MiB, all of it written; load average at the end ${os.loadavg()[0].toFixed(1)}`,
    `medians of ${rounds} interleaved round(s) of ${seconds} s${values.quick ? '; quick: these figures say little' : ''}; ${minutes.toFixed(0)} minutes`,
  ];
}

/** The first line a command prints, or nothing. */
function lineOf(command, ...args) {
  return (spawnSync(command, args, { encoding: 'utf8' }).stdout ?? '').split('\n')[0].trim();
}

/** On a terminal, progress overwrites itself; elsewhere, only left-out peers get a line. */
function note(text) {
  if (process.stderr.isTTY) process.stderr.write(`\r\x1b[K${text}`);
  else if (text.startsWith('left out')) process.stderr.write(text);
}
