/** Rescues of workloads, and what each must show: shared by the tests of `store rescue`. */
import fs from 'node:fs';
import path from 'node:path';
import { expect } from 'vitest';
import type { LocalStoreOptions } from '../../src/store/local/local-store.js';
import { rescueStore, type Rescued } from '../../src/store/local/rescue.js';
import { labelOfVdi } from '../../src/store/vdi-record.js';
import { contentsOf, expectBytes, scratchDirectory, Workload } from './workload.js';

export type Plan = Rescued['plan'];
export const PAGE = 4096;

export async function rescued(from: string, force = false): Promise<{ plan: Plan; to: string }> {
  const to = path.join(scratchDirectory(), 'rescued');
  const { plan } = await rescueStore(from, to, { isDry: false, force });
  return { plan, to };
}

/** Every disk is there; the certain ones are exact, and of the others all that was not trimmed. Returns how many are certain. */
export async function compare(workload: Workload, plan: Plan, to: string, label: string): Promise<number> {
  const found = await contentsOf(to);
  const certain = new Set(plan.vdis.filter(({ isCertain }) => isCertain).map(({ record }) => labelOfVdi(record)));
  const names = [...found.keys()].filter((name) => !name.startsWith('lost-'));
  expect(names.sort(), label).toEqual([...workload.contents.keys()].sort());
  const merged = new Map(plan.vdis.map((vdi) => [labelOfVdi(vdi.record), vdi.merged]));
  for (const [name, expected] of workload.contents)
    expectBytes(found.get(name), expected, `${label}: ${name}`, !certain.has(name), merged.get(name));
  return certain.size;
}

/** A workload with a copy of the metadata after `before` steps, and `after` more. */
export async function busy(
  seed: number,
  before: number,
  after: number,
  options: LocalStoreOptions = {},
): Promise<Workload> {
  const workload = new Workload(seed);
  await workload.start(options);
  for (let n = 0; n < before; n++) await workload.step();
  await workload.flushAll();
  await workload.store.copies.copy(true);
  for (let n = 0; n < after; n++) await workload.step();
  return workload;
}

/** Everything in it, with sizes, times and inode numbers. */
export function listing(directory: string): string[] {
  return fs
    .readdirSync(directory, { recursive: true, encoding: 'utf8' })
    .map((name) => {
      const { size, mtimeMs, ino } = fs.lstatSync(path.join(directory, name));
      return `${name} ${size} ${mtimeMs} ${ino}`;
    })
    .sort();
}
