/**
 * What large stores cost: opening one with millions of mapped objects, and listing, opening and deleting with many VDIs and with
 * many snapshots of one VDI. Each figure is of a process of its own. Maps are full, but their objects have no files. Owns
 * everything that it makes.
 *
 *     npm run build && node bench/scale.mjs [--objects 4194304] [--overlays 65536] [--vdis 20000] [--snapshots 1000] [--dir DIR]
 */
import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { readOptions } from './options.mjs';

const HERE = path.dirname(fileURLToPath(import.meta.url));
const USAGE = `usage: node bench/scale.mjs [options]
  --objects N       mapped objects of the large store (default 4194304)
  --overlays N      of them, overlays (default 65536)
  --vdis N          VDIs of the store with many (default 20000)
  --snapshots N     snapshots of one VDI (default 1000)
  --dist DIST       another build, for a comparison
  --dir DIR         where the stores are put (default: the temporary directory)`;
const values = readOptions({
  program: 'scale',
  usage: USAGE,
  numbers: ['objects', 'vdis', 'snapshots'],
  options: {
    objects: { type: 'string', default: String(4 * 2 ** 20) },
    overlays: { type: 'string', default: '65536' },
    vdis: { type: 'string', default: '20000' },
    snapshots: { type: 'string', default: '1000' },
    dist: { type: 'string', default: path.join(HERE, '../dist') },
    dir: { type: 'string', default: os.tmpdir() },
    work: { type: 'string' },
  },
});
const dist = path.resolve(values.dist);
const load = (file) => import(path.join(dist, file));
const { LocalStore } = await load('store/local/local-store.js');
const { pagesOf } = await load('store/local/map-pages.js');
const { VdiCatalog } = await load('vdi/catalog.js');
const OBJECT = 2 ** 22;
/** Objects of one VDI: 4 TiB. */
const OF_VDI = 2 ** 20;
const FIRST_OWNER = 100_000;

const now = () => performance.now();
const median = (list) => [...list].sort((a, b) => a - b)[list.length >> 1];
const ms = (value) => `${value.toFixed(value < 10 ? 2 : 0)} ms`;

/** VDIs with full maps; some of their objects are overlays over the others. */
async function makeLarge(directory) {
  const store = await LocalStore.open(directory);
  const catalog = new VdiCatalog(store);
  const names = [];
  for (let left = Number(values.objects), n = 0; left > 0; left -= OF_VDI, n++) {
    const name = `disk${n}`;
    await catalog.create(name, Math.min(left, OF_VDI) * OBJECT);
    const vdi = await catalog.openVdi(name);
    const map = vdi.opened.map.slice();
    const { vid } = vdi.record;
    for (let idx = 0; idx < map.length; idx++) map[idx] = FIRST_OWNER + ((idx >>> 5) % 4000);
    await catalog.release(vdi);
    await store.metadata.preparePages(pagesOf(vid, map));
    names.push({ name, vid });
  }
  await catalog.close();
  const again = await LocalStore.open(directory, { mergeDelayMs: 2 ** 30 });
  const [{ name }] = names;
  const overlays = new VdiCatalog(again);
  await overlays.snapshot(name, 's');
  const vdi = await overlays.openVdi(name);
  const block = Buffer.alloc(4096, 1);
  for (let n = 0; n < Number(values.overlays); n++) {
    await vdi.write(n * OBJECT, block, false);
    if (n % 4096 === 4095) await vdi.flush();
  }
  await overlays.release(vdi);
  await overlays.close();
}

async function makeMany(directory) {
  const store = await LocalStore.open(directory);
  const catalog = new VdiCatalog(store);
  for (let n = 0; n < Number(values.vdis); n++) await catalog.create(`disk${n}`, 2 ** 30);
  await catalog.close();
}

async function makeSnapshots(directory) {
  const store = await LocalStore.open(directory, { mergeDelayMs: 2 ** 30 });
  const catalog = new VdiCatalog(store);
  await catalog.create('disk', 2 ** 30);
  const vdi = await catalog.openVdi('disk');
  const took = [];
  for (let n = 0; n < Number(values.snapshots); n++) {
    await vdi.write((n % 256) * OBJECT + 4096 * (n % 1000), Buffer.alloc(4096, n), false);
    const start = now();
    await catalog.snapshot('disk', `s${n}`);
    took.push(now() - start);
  }
  await catalog.release(vdi);
  await catalog.close();
  const tenth = Math.ceil(took.length / 10);
  return `taking one: ${ms(median(took.slice(0, tenth)))} of the first tenth, ${ms(median(took.slice(-tenth)))} of the last`;
}

/** Open, list, open one, delete some; and the memory of the process. */
async function measure(directory, kind) {
  const before = process.memoryUsage.rss();
  const start = now();
  const store = await LocalStore.open(directory, { mergeDelayMs: 2 ** 30 });
  const opened = now() - start;
  const grown = (process.memoryUsage.rss() - before) / 2 ** 20;
  const catalog = new VdiCatalog(store);
  const lines = [`opening the store: ${ms(opened)}, ${grown.toFixed(0)} MiB`];
  const timed = async (name, work) => {
    const from = now();
    await work();
    lines.push(`${name}: ${ms(now() - from)}`);
  };
  await timed('listing', () => catalog.list());
  const first = kind === 'snapshots' ? 'disk' : 'disk0';
  await timed('opening a disk', async () => catalog.release(await catalog.openVdi(first)));
  if (kind === 'large') {
    await timed('snapshot', () => catalog.snapshot(first, 'again'));
    await timed('deleting it', () => catalog.remove(`${first}@again`));
  } else {
    const count = Number(kind === 'many' ? values.vdis : values.snapshots);
    const name = (n) => (kind === 'many' ? `disk${n}` : `disk@s${n}`);
    for (const [part, share] of [
      ['first half', count >> 1],
      ['second half', count - (count >> 1)],
    ]) {
      const from = now();
      const at = part === 'first half' ? 0 : count >> 1;
      for (let n = at; n < at + share; n++) await catalog.remove(name(n));
      lines.push(`deleting one, ${part}: ${ms((now() - from) / share)}`);
    }
  }
  await catalog.close();
  lines.push(`memory at the end: ${(process.memoryUsage.rss() / 2 ** 20).toFixed(0)} MiB`);
  return lines.join('\n  ');
}

const KINDS = { large: makeLarge, many: makeMany, snapshots: makeSnapshots };
if (values.work !== undefined) {
  const [kind, what, directory] = values.work.split(':');
  const told = what === 'make' ? await KINDS[kind](directory) : await measure(directory, kind);
  if (told) console.log(`  ${told}`);
  process.exit(0);
}
const place = fs.mkdtempSync(path.join(path.resolve(values.dir), 'sheepgate-scale-'));
process.on('exit', () => fs.rmSync(place, { recursive: true, force: true }));
for (const kind of Object.keys(KINDS)) {
  console.log(kind);
  for (const what of ['make', 'measure']) {
    const args = [fileURLToPath(import.meta.url), ...process.argv.slice(2)];
    const directory = path.join(place, kind);
    const { status } = spawnSync(process.execPath, [...args, '--work', `${kind}:${what}:${directory}`], {
      stdio: 'inherit',
    });
    if (status !== 0) process.exit(1);
  }
}
