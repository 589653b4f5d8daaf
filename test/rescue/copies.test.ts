/** Copies of the metadata: when they are made, that they cost writers nothing, and that their failure is a warning and no more. */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { expect, test } from 'vitest';
import { LocalStore } from '../../src/store/local/local-store.js';
import { rescueStore } from '../../src/store/local/rescue.js';
import { FailingDisk } from '../harness/failing-disk.js';
import { waitUntil } from '../harness/daemon.js';
import { contentsOf, expectBytes, OBJECT, scratchDirectory, Workload } from './workload.js';

function copiesIn(directory: string): string[] {
  const copies = path.join(directory, 'copies');
  return fs.existsSync(copies) ? fs.readdirSync(copies).sort() : [];
}

async function withDisk(options: Parameters<Workload['start']>[0] = {}): Promise<{ workload: Workload; name: string }> {
  const workload = new Workload(1);
  await workload.start(options);
  return { workload, name: await workload.create() };
}

test('a command that changes nothing makes no copy', async () => {
  const { workload } = await withDisk();
  await workload.stop();
  const before = copiesIn(workload.directory);
  expect(before).toContain('copy-1');
  await (await LocalStore.open(workload.directory)).close();
  expect(copiesIn(workload.directory)).toEqual(before);
});

test('while the store is open, a copy is made after changes, and two are kept', async () => {
  const { workload, name } = await withDisk({ copies: { delayMs: 1, everyMs: 20, share: 1 } });
  for (let n = 1; n <= 4; n++) {
    await waitUntil(() => copiesIn(workload.directory).includes(`copy-${n}`), `copy ${n}`);
    await workload.catalog.snapshot(name, `tag${n}`);
  }
  await workload.stop();
  const copies = copiesIn(workload.directory).filter((each) => each.startsWith('copy-'));
  expect(copies).toHaveLength(2);
});

test('without a change there is no copy, however long the store is open, and clients in use are none', async () => {
  const { workload } = await withDisk({ copies: { delayMs: 1, everyMs: 1 } });
  await waitUntil(() => copiesIn(workload.directory).includes('copy-1'), 'the first copy');
  await workload.store.copies.copy(false);
  const before = copiesIn(workload.directory);
  await workload.store.metadata.storeState(new Map([['use/a//b', { client: 'b' }]]));
  await workload.stop();
  expect(copiesIn(workload.directory)).toEqual(before);
});

const CALLS = ['write', 'fdatasync', 'fsyncSync', 'open', 'openSync', 'rename', 'mkdirSync', 'reserveSync'] as const;

test.each(CALLS)('%s fails in copies/: one warning, and every operation works', async (call) => {
  const failing = new FailingDisk();
  const lines: string[] = [];
  const log = (line: string): void => void lines.push(line);
  failing.fail({ calls: [call], file: /\/copies/ }, 'ENOSPC');
  const { workload, name } = await withDisk({ disk: failing.disk, log });
  for (let n = 0; n < 30; n++) await workload.step();
  await workload.store.copies.copy(true);
  await workload.catalog.snapshot(name, 'last');
  workload.contents.set(`${name}@last`, Buffer.from(workload.content(name)));
  await workload.flushAll();
  await workload.stop();
  const about = lines.filter((line) => line.includes('not protected against the loss of meta.mdb'));
  expect(about.length).toBeLessThanOrEqual(1);
  expect(about.length, lines.join('\n')).toBe(1);
  const found = await contentsOf(workload.directory);
  for (const [label, expected] of workload.contents) expectBytes(found.get(label), expected, label);
  // The next opening has made a whole copy.
  fs.rmSync(path.join(workload.directory, 'meta.mdb'));
  const { plan } = await rescueStore(workload.directory, undefined, { isDry: true, force: false });
  expect(plan.isCertain, JSON.stringify(plan.notes)).toBe(true);
});

test('changes that could not be recorded make nothing certain that is not', async () => {
  const failing = new FailingDisk();
  const { workload, name } = await withDisk({ disk: failing.disk });
  await workload.write(name);
  await workload.flushAll();
  await workload.store.copies.copy(true);
  const rule = failing.fail({ calls: ['fdatasync'], file: /changes/ }, 'EIO');
  workload.contents.set(name, Buffer.from(workload.content(name)));
  const vdi = await workload.vdi(name);
  await vdi.trim(0, vdi.size, false);
  workload.content(name).fill(0);
  await workload.flushAll();
  expect(rule.count).toBe(1);
  const crashed = workload.crash({ isSameBoot: false });
  await workload.stop();
  fs.rmSync(path.join(crashed, 'meta.mdb'));
  const { plan } = await rescueStore(crashed, undefined, { isDry: true, force: false });
  expect(plan.isCertain).toBe(false);
  expect(plan.vdis[0]?.reasons.join()).toContain('not recorded');
});

test('check lists a damaged copy, and a store without a whole one', async () => {
  const { workload, name } = await withDisk();
  await workload.write(name);
  await workload.stop();
  const copy = path.join(workload.directory, 'copies', 'copy-1');
  fs.truncateSync(copy, 600);
  const failing = new FailingDisk();
  failing.fail({ calls: ['rename'], file: /copies/ }, 'EIO');
  await workload.start({ disk: failing.disk });
  const { problems } = await workload.catalog.check({ repair: false });
  expect(problems.join('\n')).toContain(`damaged: ${copy}`);
  expect(problems.join('\n')).toContain('there is no whole copy');
  await workload.stop();
  await workload.start();
  await workload.write(name);
  await workload.flushAll();
  await workload.stop();
  await workload.start();
  await workload.store.copies.copy(true);
  await workload.store.copies.copy(true);
  expect((await workload.catalog.check({ repair: false })).problems).toEqual([]);
  await workload.stop();
});

test('a store of an earlier version gets its first copy when it is opened for long enough', async () => {
  const { workload } = await withDisk();
  await workload.stop();
  fs.rmSync(path.join(workload.directory, 'copies'), { recursive: true });
  await workload.start({ copies: { delayMs: 1, everyMs: 1 } });
  await waitUntil(() => copiesIn(workload.directory).some((name) => name.startsWith('copy-')), 'a copy');
  await workload.stop();
});

test('a rescue that fails leaves nothing, and neither does one into a directory with content', async () => {
  const { workload, name } = await withDisk();
  await (await workload.vdi(name)).write(0, Buffer.alloc(OBJECT / 2, 7), true);
  await workload.stop();
  fs.rmSync(path.join(workload.directory, 'meta.mdb'));
  const to = path.join(scratchDirectory(), 'new');
  const failing = new FailingDisk();
  failing.fail({ calls: ['syncfs'] }, 'EIO');
  const options = { isDry: false, force: false };
  await expect(rescueStore(workload.directory, to, { ...options, disk: failing.disk })).rejects.toThrow('EIO');
  expect(fs.existsSync(to)).toBe(false);
  const full = scratchDirectory();
  fs.writeFileSync(path.join(full, 'mine'), 'x');
  await expect(rescueStore(workload.directory, full, options)).rejects.toMatchObject({ code: 'NO_STORE' });
  const inside = path.join(workload.directory, 'new');
  await expect(rescueStore(workload.directory, inside, options)).rejects.toMatchObject({ code: 'NO_STORE' });
  expect(fs.readdirSync(full)).toEqual(['mine']);
  expect(fs.existsSync(inside)).toBe(false);
});

test('a store in use is refused', async () => {
  const { workload } = await withDisk();
  const rescue = rescueStore(workload.directory, undefined, { isDry: true, force: false });
  await expect(rescue).rejects.toMatchObject({ code: 'LOCKED' });
  await workload.stop();
});

test('a copy that is no file keeps nothing from working, and goes with the next copies', async () => {
  const { workload, name } = await withDisk();
  await workload.write(name);
  await workload.stop();
  const copies = path.join(workload.directory, 'copies');
  for (const each of ['copy-7', 'changes-9000']) execFileSync('mkfifo', [path.join(copies, each)]);
  const lines: string[] = [];
  await workload.start({ log: (line) => void lines.push(line) });
  for (let n = 0; n < 3; n++) {
    await workload.catalog.snapshot(name, `tag${n}`);
    await workload.store.copies.copy(true);
  }
  await workload.stop();
  expect(lines.length).toBeLessThanOrEqual(1);
  await workload.start();
  expect((await workload.catalog.check({ repair: false })).problems).toEqual([]);
  await workload.stop();
  fs.rmSync(path.join(workload.directory, 'meta.mdb'));
  const { plan } = await rescueStore(workload.directory, undefined, { isDry: true, force: false });
  expect(plan.isCertain, JSON.stringify([plan.notes, plan.vdis.map(({ reasons }) => reasons)])).toBe(true);
});
