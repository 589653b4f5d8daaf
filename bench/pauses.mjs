/**
 * The effect of snapshots on a writer, on a large, fully allocated disk: the latencies of 4 KiB writes, and the longest turn of
 * the event loop (in CPU time, which other load on the machine does not change), while NAME@now is opened and closed in a loop,
 * snapshots are taken, listed and deleted, and overlays are merged. The map is full, but most of its entries have no file: only
 * maps are measured. Owns everything that it makes.
 *
 *     npm run build && node bench/pauses.mjs [--objects 262144] [--depth 1] [--seconds 3] [--dist DIST] [--dir DIR]
 *
 * With --dist it runs another build, for a comparison; figures of different machines must not be compared.
 */
import { spawn } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import readline from 'node:readline';
import { fileURLToPath } from 'node:url';
import koffi from 'koffi';
import { readOptions } from './options.mjs';

process.env.UV_THREADPOOL_SIZE ??= '24';
const HERE = path.dirname(fileURLToPath(import.meta.url));
const USAGE = `usage: node bench/pauses.mjs [options]
  --objects N       entries of the disk's map (default 262144)
  --depth N         writes at the same time (default 1)
  --seconds S       length of each phase (default 3)
  --dist DIST       another build, for a comparison
  --dir DIR         where the store is put (default: the temporary directory)`;
const values = readOptions({
  program: 'pauses',
  usage: USAGE,
  numbers: ['objects', 'depth', 'seconds'],
  options: {
    objects: { type: 'string', default: '262144' },
    depth: { type: 'string', default: '1' },
    seconds: { type: 'string', default: '3' },
    dist: { type: 'string', default: path.join(HERE, '../dist') },
    dir: { type: 'string', default: os.tmpdir() },
  },
});
const OBJECTS = Number(values.objects);
const DEPTH = Number(values.depth);
const SECONDS = Number(values.seconds);
const OBJECT = 2 ** 22;
/** Objects that have a file, which are written. */
const REAL = 64;
const OWNERS = 4000;
/** Neighbours have the same owner, as after sequential writes: counts are kept in pages. */
const OWNER_RUN_SHIFT = 5;
const FIRST_OWNER = 100_000;
/** Snapshots that exist at a time, of those taken in a loop. */
const KEPT = 4;

const dist = path.resolve(values.dist);
const load = (file) => import(path.join(dist, file));
const { LocalStore } = await load('store/local/local-store.js');
const { pagesOf } = await load('store/local/map-pages.js');
const { VdiCatalog } = await load('vdi/catalog.js');
const { VdiExports } = await load('export/vdi-exports.js');
const { NbdServer, NbdClient } = await import('nbd-server-ts');

const directory = fs.mkdtempSync(path.join(path.resolve(values.dir), 'sheepgate-pauses-'));
process.on('exit', () => fs.rmSync(directory, { recursive: true, force: true }));

async function prepare() {
  const store = await LocalStore.open(directory);
  const catalog = new VdiCatalog(store);
  await catalog.create('disk', OBJECTS * OBJECT);
  const vdi = await catalog.openVdi('disk');
  const data = Buffer.alloc(OBJECT, 7);
  for (let idx = 0; idx < REAL; idx++) await vdi.write(idx * OBJECT, data, false);
  await vdi.flush();
  const map = vdi.opened.map.slice();
  for (let idx = REAL; idx < map.length; idx++) map[idx] = FIRST_OWNER + ((idx >>> OWNER_RUN_SHIFT) % OWNERS);
  const { vid } = vdi.record;
  await catalog.release(vdi);
  await store.metadata.preparePages(pagesOf(vid, map));
  await catalog.close();
}

await prepare();
const store = await LocalStore.open(directory);
const catalog = new VdiCatalog(store);
const server = new NbdServer({ provider: new VdiExports(catalog) });
const socket = path.join(directory, 'nbd.sock');
await server.listen({ path: socket, mode: 0o600 });
const writer = spawn(
  '/usr/bin/python3',
  [path.join(HERE, 'pauses-writer.py'), `nbd+unix:///disk?socket=${socket}`, String(DEPTH), String(REAL * OBJECT)],
  { stdio: ['pipe', 'pipe', 'inherit'] },
);
const lines = readline.createInterface({ input: writer.stdout })[Symbol.asyncIterator]();
await lines.next();

// In CPU time of the thread: the wall clock would include other work on the machine.
const CLOCK_THREAD_CPUTIME_ID = 3; // linux/time.h
const clockGettime = koffi.load('libc.so.6').func('int clock_gettime(int clock, void *time)');
const timespec = Buffer.alloc(16);
function cpuMs() {
  clockGettime(CLOCK_THREAD_CPUTIME_ID, timespec);
  return Number(timespec.readBigInt64LE(0)) * 1000 + Number(timespec.readBigInt64LE(8)) / 1e6;
}

/** Measures every turn of the loop; the returned function ends it and returns the longest turn. */
function longestTurn() {
  let longest = 0;
  let last = cpuMs();
  let isOver = false;
  const look = () => {
    const now = cpuMs();
    longest = Math.max(longest, now - last);
    last = now;
    if (!isOver) setImmediate(look);
  };
  setImmediate(look);
  return () => {
    isOver = true;
    return longest;
  };
}

const held = {};
const took = {};
async function phase(name, work) {
  writer.stdin.write(`${name}\n`);
  const end = longestTurn();
  const start = performance.now();
  await work();
  took[name] = performance.now() - start;
  // Background work after the phase is part of it.
  const rest = SECONDS * 1000 - took[name];
  if (rest > 0) await new Promise((resolve) => setTimeout(resolve, rest));
  held[name] = end();
}

const opens = [];
let snapshots = 0;
let toMerge = 0;
await phase('nothing', async () => undefined);
await phase('NAME@now in a loop', async () => {
  for (const end = performance.now() + SECONDS * 1000; performance.now() < end;) {
    const client = await NbdClient.connect({ path: socket });
    const start = performance.now();
    await client.go('disk@now');
    opens.push(performance.now() - start);
    await client.readInto(0, Buffer.alloc(4096));
    await new Promise((resolve) => setTimeout(resolve, 20));
    await client.disconnect();
  }
});
await phase('NAME@now held', async () => {
  const client = await NbdClient.connect({ path: socket });
  await client.go('disk@now');
  await new Promise((resolve) => setTimeout(resolve, SECONDS * 1000));
  await client.disconnect();
});
await phase('vdi snapshot', () => catalog.snapshot('disk', 's'));
await phase('vdi list, show', async () => {
  await catalog.list();
  await catalog.show('disk@s');
  await catalog.show('disk');
});
await phase('open, close snapshot', async () => catalog.release(await catalog.openVdi('disk@s')));
await phase('vdi clone', () => catalog.clone('disk@s', 'clone'));
await phase('vdi delete clone', () => catalog.remove('clone'));
await phase('vdi delete snapshot', () => catalog.remove('disk@s'));
await phase('snapshots in a loop', async () => {
  let count = 0;
  for (const end = performance.now() + SECONDS * 1000; performance.now() < end; count++) {
    await catalog.snapshot('disk', `loop${count}`);
    if (count >= KEPT) await catalog.remove(`disk@loop${count - KEPT}`);
  }
  for (let n = Math.max(0, count - KEPT); n < count; n++) await catalog.remove(`disk@loop${n}`);
  snapshots = count;
});
if (store.merging !== undefined) {
  await store.merger.settled();
  store.merging.pause(true);
  await catalog.snapshot('disk', 'merged');
  await new Promise((resolve) => setTimeout(resolve, SECONDS * 1000));
  await catalog.remove('disk@merged');
  toMerge = (await store.merging.state()).bytes;
  await phase('merging', async () => {
    store.merging.pause(false);
    await store.merger.settled();
  });
}
writer.stdin.end();
console.log(`${OBJECTS} objects of 4 MiB, ${DEPTH} writes of 4 KiB at a time; milliseconds`);
console.log('phase                     took   loop held   writes  p50     p99     p99.9   max     p99 / nothing');
let usual;
for await (const line of lines) {
  const { phase: name, writes, p50, p99, p999, max } = JSON.parse(line);
  const ms = (us) => (us / 1000).toFixed(2).padEnd(8);
  console.log(
    `${name.padEnd(24)} ${took[name].toFixed(0).padStart(6)}   ${held[name].toFixed(1).padStart(6)}   ` +
      `${String(writes).padStart(8)}  ${ms(p50)}${ms(p99)}${ms(p999)}${ms(max)}${(p99 / (usual ??= p99)).toFixed(2)}`,
  );
}
opens.sort((a, b) => a - b);
console.log(
  `NAME@now opened ${opens.length} times: median ${opens[opens.length >> 1].toFixed(1)} ms, longest ${opens.at(-1).toFixed(1)} ms`,
);
console.log(`${snapshots} snapshots taken and deleted in a loop; ${(toMerge / 2 ** 20).toFixed(1)} MiB to merge`);
await server.close({ graceMs: 1000 });
process.exit(0);
