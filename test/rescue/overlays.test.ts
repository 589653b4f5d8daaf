/** `store rescue` of stores with overlays: what is certain is exact, and what is not is told with its ranges. */
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import { LocalStore, type LocalStoreOptions } from '../../src/store/local/local-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { byLength } from '../harness/length.js';
import { busy, compare, listing, rescued, type Plan } from './rescued.js';
import { contentsOf, OBJECT, Workload } from './workload.js';

const KINDS: readonly [string, LocalStoreOptions][] = [
  ['every object an overlay', { makesOnlyOverlays: true }],
  ['merges in between', { mergeDelayMs: 0 }],
  ['both', { makesOnlyOverlays: true, mergeDelayMs: 0 }],
];
const SEEDS = Array.from({ length: byLength({ quick: 2, full: 3, long: 200 }) }, (_, n) => n + 1);
const CASES = KINDS.flatMap(([kind, options]) => SEEDS.map((seed) => [kind, seed, options] as const));

/** `check` finds nothing in it, and it can be used. */
async function expectUsable(directory: string): Promise<void> {
  const store = await LocalStore.open(directory, { mayCreate: false });
  const catalog = new VdiCatalog(store);
  const { problems } = await catalog.check({ repair: false });
  expect(problems).toEqual([]);
  const [working] = (await catalog.list()).filter(({ isSnapshot }) => !isSnapshot);
  if (working) {
    await catalog.snapshot(working.name, 'after the rescue');
    const vdi = await catalog.openVdi(working.name);
    const data = Buffer.alloc(Math.min(5000, vdi.size), 0x5a);
    await vdi.write(0, data, true);
    const read = Buffer.alloc(data.length);
    await vdi.read(0, read);
    expect(read.equals(data)).toBe(true);
    await catalog.release(vdi);
  }
  await catalog.close();
  await store.close();
}

describe('meta.mdb of a store with overlays is deleted', () => {
  test.each(CASES)(
    '%s, seed %i: after a copy and a power loss everything is certain and exact',
    async (_, seed, options) => {
      const workload = await busy(seed, 30, 0, options);
      await workload.store.merger.settled();
      await workload.flushAll();
      await workload.store.copies.copy(true);
      const crashed = workload.crash({ isSameBoot: false });
      await workload.stop();
      fs.rmSync(path.join(crashed, 'meta.mdb'));
      const { plan, to } = await rescued(crashed);
      expect(plan.isCertain, JSON.stringify(plan.vdis.map(({ reasons }) => reasons))).toBe(true);
      expect(await compare(workload, plan, to, `seed ${seed}`)).toBe(workload.contents.size);
      await expectUsable(to);
    },
  );

  test.each(CASES)(
    '%s, seed %i: after flushed changes since the copy, what is certain is exact',
    async (_, seed, options) => {
      const workload = await busy(seed, 20, 20, options);
      await workload.flushAll();
      const crashed = workload.crash({ isSameBoot: false });
      await workload.stop();
      fs.rmSync(path.join(crashed, 'meta.mdb'));
      const { plan, to } = await rescued(crashed);
      await compare(workload, plan, to, `seed ${seed}`);
      await expectUsable(to);
    },
  );

  test.each(CASES)(
    '%s, seed %i: and the process was killed, answered writes are there, too',
    async (_, seed, options) => {
      const workload = await busy(seed, 20, 20, options);
      await workload.store.reclaimed();
      const crashed = workload.crash({ isSameBoot: true });
      await workload.stop();
      fs.rmSync(path.join(crashed, 'meta.mdb'));
      const { plan, to } = await rescued(crashed);
      await compare(workload, plan, to, `seed ${seed}`);
      await expectUsable(to);
    },
  );

  test('two rescues give the same, and the damaged store is not changed', async () => {
    const workload = await busy(300, 30, 10, { mergeDelayMs: 0 });
    await workload.flushAll();
    const crashed = workload.crash({ isSameBoot: false });
    await workload.stop();
    fs.rmSync(path.join(crashed, 'meta.mdb'));
    const before = listing(crashed);
    const [first, second] = [await rescued(crashed), await rescued(crashed)];
    const told = ({ vdis, lost, overlays, objects }: Plan): string =>
      JSON.stringify([vdis, lost, overlays, [...objects.keys()].sort()]);
    expect(told(first.plan)).toBe(told(second.plan));
    expect(await contentsOf(first.to)).toEqual(await contentsOf(second.to));
    expect(listing(crashed)).toEqual(before);
  });

  test('a lost segment file: the parts that were in it are listed, reads of them fail, and the others are there', async () => {
    const workload = new Workload(301);
    await workload.start();
    await workload.catalog.create('disk', OBJECT, { blockSizeShift: 20 });
    const vdi = await workload.vdi('disk');
    await vdi.write(0, Buffer.alloc(OBJECT, 1), false);
    await workload.catalog.snapshot('disk', 'monday');
    await vdi.write(8192, Buffer.alloc(4096, 2), false);
    await vdi.flush();
    await workload.stop();
    const { directory } = workload;
    fs.rmSync(path.join(directory, 'meta.mdb'));
    fs.rmSync(path.join(directory, 'overlays/0000000200000000'));
    const { plan, to } = await rescued(directory);
    const [working, snapshot] = [false, true].map((is) => plan.vdis.find(({ record }) => record.isSnapshot === is));
    expect(snapshot?.isCertain).toBe(true);
    expect(working).toMatchObject({ isCertain: false, lost: [{ from: 8192, to: 12288 }], newer: [], merged: [] });
    const store = await LocalStore.open(to, { mayCreate: false });
    const catalog = new VdiCatalog(store);
    const rescuedVdi = await catalog.openVdi('disk');
    const data = Buffer.alloc(8192);
    await rescuedVdi.read(0, data);
    expect(data.equals(Buffer.alloc(8192, 1))).toBe(true);
    await expect((async () => rescuedVdi.read(8192, Buffer.alloc(4096)))()).rejects.toThrow();
    await catalog.release(rescuedVdi);
    const { problems } = await catalog.check({ repair: false });
    expect(problems.join()).toContain('lost: parts of disk');
    await catalog.close();
    await store.close();
  });

  test('blocks that are newer than the copy are there, and listed with their ranges', async () => {
    const workload = new Workload(302);
    await workload.start();
    await workload.catalog.create('disk', OBJECT, { blockSizeShift: 20 });
    const vdi = await workload.vdi('disk');
    await vdi.write(0, Buffer.alloc(OBJECT, 1), false);
    await workload.catalog.snapshot('disk', 'monday');
    await vdi.write(0, Buffer.alloc(4096, 2), true);
    await workload.store.copies.copy(true);
    await vdi.write(40_960, Buffer.alloc(100, 3), true);
    const crashed = workload.crash({ isSameBoot: false });
    await workload.stop();
    fs.rmSync(path.join(crashed, 'meta.mdb'));
    const { plan, to } = await rescued(crashed);
    const working = plan.vdis.find(({ record }) => !record.isSnapshot);
    expect(working).toMatchObject({ isCertain: false, newer: [{ from: 40_960, to: 45_056 }], merged: [], lost: [] });
    expect(plan.vdis.find(({ record }) => record.isSnapshot)?.isCertain).toBe(true);
    const expected = Buffer.alloc(OBJECT, 1).fill(2, 0, 4096).fill(3, 40_960, 41_060);
    const found = await contentsOf(to);
    expect(found.get('disk')?.equals(expected)).toBe(true);
    expect(found.get('disk@monday')?.equals(Buffer.alloc(OBJECT, 1))).toBe(true);
  });
});
