/** `store rescue` of stores with overlays: what is certain is exact, and what is not is told with its ranges. */
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import { LocalStore, type LocalStoreOptions } from '../../src/store/local/local-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { byLength } from '../harness/length.js';
import { busy, compare, rescued } from './rescued.js';

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
});
