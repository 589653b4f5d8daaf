/** What `store rescue` calls certain is exact, and what was flushed before the last copy is there, however meta.mdb was lost. */
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import { LocalStore } from '../../src/store/local/local-store.js';
import { rescueStore } from '../../src/store/local/rescue.js';
import { byLength } from '../harness/length.js';
import { busy, compare, listing, PAGE, rescued, type Plan } from './rescued.js';
import { contentsOf, scratchDirectory, Workload } from './workload.js';

const SEEDS = Array.from({ length: byLength({ quick: 3, full: 4, long: 300 }) }, (_, n) => n + 1);

describe('meta.mdb is deleted', () => {
  test.each(SEEDS)('after a copy and a power loss, seed %i: everything is certain and exact', async (seed) => {
    const workload = await busy(seed, 30, 0);
    const crashed = workload.crash({ isSameBoot: false });
    await workload.stop();
    fs.rmSync(path.join(crashed, 'meta.mdb'));
    const { plan, to } = await rescued(crashed);
    expect(plan.isCertain, JSON.stringify(plan.vdis.map(({ reasons }) => reasons))).toBe(true);
    expect(await compare(workload, plan, to, `seed ${seed}`)).toBe(workload.contents.size);
  });

  test.each(SEEDS)('after flushed changes since the copy, seed %i: what is certain is exact', async (seed) => {
    const workload = await busy(seed, 20, 20);
    await workload.flushAll();
    const crashed = workload.crash({ isSameBoot: false });
    await workload.stop();
    fs.rmSync(path.join(crashed, 'meta.mdb'));
    const { plan, to } = await rescued(crashed);
    await compare(workload, plan, to, `seed ${seed}`);
  });

  test.each(SEEDS)('and the process was killed, seed %i: answered writes are there, too', async (seed) => {
    const workload = await busy(seed, 20, 20);
    await workload.store.reclaimed();
    const crashed = workload.crash({ isSameBoot: true });
    await workload.stop();
    fs.rmSync(path.join(crashed, 'meta.mdb'));
    const { plan, to } = await rescued(crashed);
    await compare(workload, plan, to, `seed ${seed}`);
  });

  test('after an orderly close, everything is certain and exact, and the old store is not changed', async () => {
    const workload = await busy(100, 20, 20);
    await workload.stop();
    fs.rmSync(path.join(workload.directory, 'meta.mdb'));
    const before = listing(workload.directory);
    const { plan, to } = await rescued(workload.directory);
    expect(plan.isCertain).toBe(true);
    await compare(workload, plan, to, 'closed');
    expect(listing(workload.directory)).toEqual(before);
  });

  test('and the newest copy is damaged: the older one and the changes since serve', async () => {
    const workload = await busy(101, 20, 10);
    await workload.flushAll();
    await workload.store.copies.copy(true);
    const crashed = workload.crash({ isSameBoot: false });
    await workload.stop();
    fs.rmSync(path.join(crashed, 'meta.mdb'));
    const copies = path.join(crashed, 'copies');
    const newest = path.join(copies, 'copy-2');
    const bytes = fs.readFileSync(newest);
    bytes.writeUInt8((bytes[600] ?? 0) ^ 1, 600);
    fs.writeFileSync(newest, bytes);
    const { plan, to } = await rescued(crashed);
    expect(plan.basedOn).toBe(path.join(copies, 'copy-1'));
    expect(plan.notes.join()).toContain('copy-2');
    await compare(workload, plan, to, 'older copy');
  });

  test('and the copies, too: the record of changes and the names of the objects serve', async () => {
    const workload = new Workload(102);
    await workload.start();
    for (let n = 0; n < 30; n++) await workload.step();
    await workload.flushAll();
    const crashed = workload.crash({ isSameBoot: false });
    await workload.stop();
    fs.rmSync(path.join(crashed, 'meta.mdb'));
    const { plan, to } = await rescued(crashed);
    expect(plan.base).toBe('changes');
    expect(plan.isCertain).toBe(false);
    await compare(workload, plan, to, 'no copy');
  });

  test('and everything in copies/, too: each vid becomes a disk of its own', async () => {
    const workload = await busy(103, 20, 0);
    const crashed = workload.crash({ isSameBoot: false });
    await workload.stop();
    fs.rmSync(path.join(crashed, 'meta.mdb'));
    fs.rmSync(path.join(crashed, 'copies'), { recursive: true });
    const { plan, to } = await rescued(crashed);
    expect(plan.base).toBe('nothing');
    expect(plan.isCertain).toBe(false);
    expect(plan.lost.length).toBeGreaterThan(0);
    const found = await contentsOf(to);
    expect([...found.keys()].every((name) => name.startsWith('lost-'))).toBe(true);
    expect(objectsIn(to)).toEqual(objectsIn(crashed));
  });
});

function objectsIn(directory: string): string[] {
  return fs
    .readdirSync(path.join(directory, 'objects'), { recursive: true, encoding: 'utf8' })
    .filter((name) => name.length > 2)
    .sort();
}

/** Files apart from the lock, which is written to by who has it. */
function filesIn(directory: string): string[] {
  return listing(directory).filter(
    (line) => fs.lstatSync(path.join(directory, line.split(' ')[0] ?? '')).isFile() && !/^lock /.test(line),
  );
}

describe('meta.mdb is damaged', () => {
  const damages: readonly [string, (bytes: Buffer, page: number) => Buffer][] = [
    ['overwritten by zeros', (bytes, page) => Buffer.from(bytes).fill(0, page * PAGE, (page + 1) * PAGE)],
    ['truncated', (bytes, page) => bytes.subarray(0, page * PAGE)],
  ];

  test.each(damages)(
    '%s at each page in turn: what is certain is exact, and opening it is one clear error',
    async (_, damage) => {
      const workload = await busy(200, 24, 6);
      await workload.flushAll();
      await workload.stop();
      const file = path.join(workload.directory, 'meta.mdb');
      const whole = fs.readFileSync(file);
      const pages = Math.ceil(whole.length / PAGE);
      let harmless = 0;
      for (let page = 0; page < pages; page++) {
        const bytes = damage(whole, page);
        if (bytes.equals(whole)) continue;
        fs.writeFileSync(file, bytes);
        const { plan, to } = await rescued(workload.directory, true);
        expect(plan.isCertain, `page ${page}`).toBe(true);
        expect(await compare(workload, plan, to, `page ${page}`)).toBe(workload.contents.size);
        fs.rmSync(path.dirname(to), { recursive: true });
        if (plan.base === 'metadata') harmless++;
        else await expectToldToRescue(workload.directory, plan);
        fs.writeFileSync(file, whole);
      }
      // Pages that nothing refers to.
      expect(harmless).toBeLessThan(pages / 2);
    },
  );

  test('it is of another store: opening says so, and the rescue ignores it', async () => {
    const [workload, other] = [await busy(201, 20, 0), await busy(202, 20, 0)];
    await workload.stop();
    await other.stop();
    fs.copyFileSync(path.join(other.directory, 'meta.mdb'), path.join(workload.directory, 'meta.mdb'));
    const { plan, to } = await rescued(workload.directory);
    expect(plan.problem).toContain('another store');
    expect(plan.isCertain).toBe(true);
    await compare(workload, plan, to, 'foreign');
    await expectToldToRescue(workload.directory, plan);
  });

  test('it is good: nothing is built without force', async () => {
    const workload = await busy(203, 20, 0);
    await workload.stop();
    const to = path.join(scratchDirectory(), 'rescued');
    const rescue = rescueStore(workload.directory, to, { isDry: false, force: false });
    await expect(rescue).rejects.toMatchObject({ code: 'UNSUPPORTED' });
    expect(fs.existsSync(to)).toBe(false);
    const { plan, to: forced } = await rescued(workload.directory, true);
    expect(plan).toMatchObject({ base: 'metadata', isCertain: true });
    await compare(workload, plan, forced, 'good');
  });
});

/** Values have no checksum in LMDB: damage there is found by the rescue, and by `check`, which compares with the objects. */
async function expectToldToRescue(directory: string, { problem }: Plan): Promise<void> {
  if (problem?.includes('differs from the copy')) return;
  const before = filesIn(directory);
  const opening = LocalStore.open(directory);
  await expect(opening).rejects.toMatchObject({ code: 'DAMAGED' });
  const message = await opening.catch((error: unknown) => (error as Error).message);
  expect(message).toContain(path.join(directory, 'meta.mdb'));
  expect(message).toContain(`sheepgate store rescue ${directory} NEW`);
  expect(filesIn(directory)).toEqual(before);
}
