/** `store rescue` after a power loss that has also destroyed meta.mdb: of what was not synced, any part may be there. */
import fs from 'node:fs';
import path from 'node:path';
import { expect, test } from 'vitest';
import type { LocalStoreOptions } from '../../src/store/local/local-store.js';
import { labelOfVdi } from '../../src/store/vdi-record.js';
import { byLength } from '../harness/length.js';
import { RecordingDisk } from '../harness/recording-disk.js';
import { rescued, type Plan } from './rescued.js';
import { contentsOf, scratchDirectory, Workload } from './workload.js';

const KINDS: readonly [string, LocalStoreOptions][] = [
  ['overlays where a snapshot is', {}],
  ['every object an overlay', { makesOnlyOverlays: true }],
  ['merges in between', { mergeDelayMs: 0 }],
];
const SEEDS = Array.from({ length: byLength({ quick: 1, full: 1, long: 60 }) }, (_, n) => n + 1);
const CASES = KINDS.flatMap(([kind, options]) => SEEDS.map((seed) => [kind, seed, options] as const));
/** How much of what was not synced has reached the disk, in percent. */
const KEPT = [0, 60];
const WRITES = 6;

/** By NAME or NAME@TAG: what it was when it was flushed last, and after each write since. */
type Versions = ReadonlyMap<string, readonly Buffer[]>;

async function writeUnflushed(workload: Workload): Promise<Versions> {
  const versions = new Map(Array.from(workload.contents, ([name, content]) => [name, [Buffer.from(content)]]));
  const working = [...workload.contents.keys()].filter((name) => !name.includes('@'));
  for (let n = 0; n < WRITES; n++) {
    const name = working[workload.below(working.length)];
    if (name === undefined) break;
    if (workload.below(4) === 0) await workload.trim(name);
    else await workload.write(name);
    versions.get(name)?.push(Buffer.from(workload.content(name)));
  }
  return versions;
}

function expectLegal(plan: Plan, found: ReadonlyMap<string, Buffer | undefined>, versions: Versions): void {
  expect([...found.keys()].filter((name) => !name.startsWith('lost-')).sort()).toEqual([...versions.keys()].sort());
  for (const { record, isCertain, merged } of plan.vdis) {
    const name = labelOfVdi(record);
    const bytes = found.get(name);
    const legal = versions.get(name) ?? [];
    if (bytes === undefined) expect.fail(`${name} cannot be read`);
    for (let at = 0; at < bytes.length; at++) {
      const byte: number | undefined = bytes[at];
      if (legal.some((version) => version[at] === byte)) continue;
      // What was trimmed since the copy may have its old content.
      if (!isCertain && legal.some((version) => version[at] === 0)) continue;
      if (merged.some(({ from, to }) => from <= at && at < to)) continue;
      expect.fail(
        `${isCertain ? 'certain' : 'likely'} ${name} at ${at}: ${byte}, legal ${legal.map((each) => each[at]).join()}`,
      );
    }
  }
}

test.each(CASES)('%s, seed %i: every byte is what was flushed last, or written since', async (_, seed, options) => {
  const workload = new Workload(seed);
  const recording = new RecordingDisk(workload.directory);
  await workload.start({ ...options, disk: recording.disk });
  for (let n = 0; n < 12; n++) await workload.step();
  await workload.flushAll();
  await workload.store.copies.copy(true);
  for (let n = 0; n < 8; n++) await workload.step();
  await workload.flushAll();
  if (seed % 2 === 0) await workload.store.copies.copy(true);
  const versions = await writeUnflushed(workload);
  const at = recording.now;
  const events = new Set(recording.events);
  for (const kept of KEPT) {
    const crashed = path.join(scratchDirectory(), 'crashed');
    recording.build(crashed, (event) => {
      if (!events.has(event)) return false;
      return recording.isDurable(event, at) || workload.below(100) < kept;
    });
    fs.rmSync(path.join(crashed, 'meta.mdb'));
    // Another boot: no log counts.
    fs.rmSync(path.join(crashed, 'recent'), { recursive: true, force: true });
    const { plan, to } = await rescued(crashed);
    expectLegal(plan, await contentsOf(to), versions);
    fs.rmSync(path.dirname(crashed), { recursive: true });
    fs.rmSync(path.dirname(to), { recursive: true });
  }
  await workload.stop();
});
