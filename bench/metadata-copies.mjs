/**
 * What the copies of the metadata cost: 4 KiB writes, each with a flush, right after a snapshot, in this build and in another one
 * (`--also DIST`), in turns; and how long a copy of large maps takes, and holds the event loop. Uses the store directly, without a
 * server. Owns everything that it makes.
 *
 *     npm run build && node bench/metadata-copies.mjs [--also DIST] [--rounds 5] [--seconds 5] [--snapshots 200] [--dir DIR]
 */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { monitorEventLoopDelay, performance } from 'node:perf_hooks';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { readOptions } from './options.mjs';

const HERE = path.dirname(fileURLToPath(import.meta.url));
const USAGE = `usage: node bench/metadata-copies.mjs [options]
  --also DIST     a second build, measured in turns with this one
  --rounds N      rounds (default 5)
  --seconds S     length of a measurement (default 5)
  --snapshots N   snapshots that the disk has (default 200)
  --every MS      time between copies (default 60000, as usual)
  --maps N        maps of 1 TiB, fully mapped, that are copied (default 1,100)
  --dir DIR       where the data is put (default: the temporary directory)`;
const values = readOptions({
  program: 'metadata-copies',
  usage: USAGE,
  numbers: ['rounds', 'seconds', 'snapshots'],
  options: {
    also: { type: 'string' },
    rounds: { type: 'string', default: '5' },
    seconds: { type: 'string', default: '5' },
    snapshots: { type: 'string', default: '200' },
    every: { type: 'string', default: '60000' },
    maps: { type: 'string', default: '1,100' },
    dir: { type: 'string', default: os.tmpdir() },
    child: { type: 'string' },
    dist: { type: 'string', default: path.join(HERE, '../dist') },
  },
});
const OBJECT = 4 * 2 ** 20;
const SIZE = 2 ** 30;
const TIB = 2 ** 40;
const PAGE_ENTRIES = 1024;
const BLOCK = 4096;
const round = (number, digits = 2) => Number(number.toFixed(digits));
const at = (sorted, part) => sorted[Math.min(sorted.length - 1, Math.floor(part * sorted.length))];
const median = (list) =>
  at(
    [...list].sort((a, b) => a - b),
    0.5,
  );
const load = async (file) => import(pathToFileURL(path.join(path.resolve(values.dist), file)).href);

async function flushes(directory) {
  const { LocalStore } = await load('store/local/local-store.js');
  const { VdiCatalog } = await load('vdi/catalog.js');
  const everyMs = Number(values.every);
  const store = await LocalStore.open(directory, { copies: { delayMs: Math.min(everyMs, 5000), everyMs } });
  const catalog = new VdiCatalog(store);
  await catalog.create('vm', SIZE, { blockSizeShift: 22 });
  const vdi = await catalog.openVdi('vm');
  const data = Buffer.alloc(BLOCK, 7);
  for (let offset = 0; offset < SIZE; offset += OBJECT) await vdi.write(offset, data, false);
  await vdi.flush();
  for (let n = 0; n < values.snapshots; n++) {
    await catalog.snapshot('vm', `s${n}`);
    await vdi.write((n % 256) * OBJECT, data, false);
  }
  await vdi.flush();
  const delay = monitorEventLoopDelay({ resolution: 1 });
  delay.enable();
  const times = [];
  const begun = performance.now();
  while (performance.now() - begun < values.seconds * 1000) {
    const start = performance.now();
    await vdi.write(Math.floor(Math.random() * (SIZE / BLOCK)) * BLOCK, data, false);
    await vdi.flush();
    times.push(performance.now() - start);
  }
  delay.disable();
  times.sort((a, b) => a - b);
  await catalog.release(vdi);
  await catalog.close();
  await store.close();
  const copies = path.join(directory, 'copies');
  const made = fs.existsSync(copies)
    ? Math.max(0, ...fs.readdirSync(copies).map((name) => Number(/^copy-(\d+)$/.exec(name)?.[1] ?? 0)))
    : 0;
  return {
    rate: times.length / values.seconds,
    p50: at(times, 0.5),
    p99: at(times, 0.99),
    turn: delay.max / 1e6,
    made,
  };
}

/** Maps without objects: only the metadata is measured. */
async function copyOf(directory, maps) {
  const { LocalStore } = await load('store/local/local-store.js');
  const store = await LocalStore.open(directory, { copies: { delayMs: 2 ** 30, everyMs: 2 ** 30 } });
  for (let vid = 1; vid <= maps; vid++) {
    const pages = Array.from({ length: TIB / OBJECT / PAGE_ENTRIES }, (_, page) => {
      const entries = Buffer.alloc(4 * PAGE_ENTRIES);
      // As after years: owners in runs.
      for (let n = 0; n < PAGE_ENTRIES; n++)
        entries.writeUInt32LE(1 + (Math.floor((page * PAGE_ENTRIES + n) / 37) % vid), 4 * n);
      return { vid, page, entries };
    });
    await store.metadata.preparePages(pages);
    const record = { vid, name: `vm${vid}`, tag: '', isSnapshot: false, snapId: 1, parentVid: 0, snapshotAt: 0 };
    await store.metadata.commit({ records: [{ ...record, size: TIB, blockSizeShift: 22, createdAt: Date.now() }] });
  }
  const result = {};
  for (const isUrgent of [false, true]) {
    const delay = monitorEventLoopDelay({ resolution: 1 });
    delay.enable();
    const cpu = process.cpuUsage();
    const start = performance.now();
    await store.copies.copy(isUrgent);
    const took = performance.now() - start;
    const { user, system } = process.cpuUsage(cpu);
    delay.disable();
    result[isUrgent ? 'at the close' : 'in the background'] = {
      ms: round(took, 0),
      cpuMs: round((user + system) / 1000, 0),
      longestTurnMs: round(delay.max / 1e6, 1),
    };
  }
  const copy = path.join(directory, 'copies');
  const bytes = fs.readdirSync(copy).map((name) => fs.statSync(path.join(copy, name)).size);
  return { ...result, metadataBytes: store.metadata.bytes, copyBytes: Math.max(...bytes) };
}

function child(what, dist) {
  const directory = fs.mkdtempSync(path.join(path.resolve(values.dir), 'sheepgate-copies-'));
  const args = [fileURLToPath(import.meta.url), '--child', `${what} ${directory}`, '--dist', dist];
  for (const name of ['seconds', 'snapshots', 'every']) args.push(`--${name}`, String(values[name]));
  try {
    return JSON.parse(execFileSync(process.execPath, args, { encoding: 'utf8' }));
  } finally {
    fs.rmSync(directory, { recursive: true, force: true });
  }
}

if (values.child !== undefined) {
  const [what, directory] = values.child.split(' ');
  const result = what === 'flushes' ? await flushes(directory) : await copyOf(directory, Number(what));
  process.stdout.write(JSON.stringify(result));
  process.exit(0);
}

const builds = [values.dist, ...(values.also === undefined ? [] : [values.also])];
const found = builds.map(() => []);
for (let n = 0; n < values.rounds; n++) {
  const order = builds.map((_, index) => (index + n) % builds.length);
  for (const index of order) found[index].push(child('flushes', builds[index]));
}
for (const [index, dist] of builds.entries()) {
  const of = (name) => round(median(found[index].map((each) => each[name])), 3);
  console.log(
    `${dist}: write and flush, ${values.snapshots} snapshots: ${of('rate')} a second, p50 ${of('p50')} ms, p99 ${of('p99')} ms, ` +
      `longest turn ${of('turn')} ms, ${of('made')} copies`,
  );
}
if (builds.length > 1) {
  const ratio = (name) => round(median(found[0].map((each, n) => each[name] / found[1][n][name])));
  console.log(
    `this build by the other, medians of the ratios of each round: rate ${ratio('rate')}, p50 ${ratio('p50')}, p99 ${ratio('p99')}`,
  );
}
for (const maps of values.maps.split(',').map(Number)) {
  console.log(`${maps} maps of 1 TiB, fully mapped: ${JSON.stringify(child(String(maps), values.dist))}`);
}
