/**
 * `check` of a local store: compares maps with objects, and finds leftovers and wrong owners. Repairs only without loss: it
 * removes unreferenced objects and pages.
 */
import path from 'node:path';
import type { HostDisk } from '../../system/disk.js';
import { syncDirectory } from '../../system/durable-names.js';
import type { CheckReport } from '../object-store.js';
import { StoreError } from '../store-error.js';
import type { DataObjects, FoundObject } from './data-objects.js';
import type { LocalVdi } from './local-vdi.js';
import { logsSetAside } from './map-logs.js';
import type { Metadata } from './metadata.js';
import { Owners } from './file-owners.js';
import type { Overlays } from './overlays.js';
import { idxOf, localObjectKey, vidOf, type ReferenceCounts } from './reference-counts.js';
import { segmentOf } from './segment-space.js';

/** Findings that a check lists; it counts the others. */
const MAX_PROBLEMS = 1000;

export interface CheckedStore {
  readonly disk: HostDisk;
  readonly location: string;
  readonly metadata: Metadata;
  readonly objects: DataObjects;
  readonly references: ReferenceCounts;
  readonly overlays: Overlays;
  readonly open: ReadonlyMap<number, LocalVdi>;
  /** Of the metadata: what is wrong with them. */
  readonly copies: { problems(): Promise<string[]> };
  keptVids: ReadonlySet<number>;
  keepsUntold: boolean;
  backgroundError(error: unknown): void;
  /** Resolves when the space of all removed objects is free. */
  reclaimed(): Promise<void>;
}

/** Compare maps and object files. Errors: LOCKED (VDIs are open: a check during changes would report false problems). */
export async function checkStore(store: CheckedStore, options: { readonly repair: boolean }): Promise<CheckReport> {
  const { metadata, objects, references, open } = store;
  for (const vdi of open.values()) await vdi.close();
  if (open.size > 0) throw new StoreError('LOCKED', 'a check needs all VDIs closed; disconnect their clients first');
  await store.reclaimed();
  const problems: string[] = [];
  let hidden = 0;
  const report = (line: string): void => {
    if (problems.length < MAX_PROBLEMS) problems.push(line);
    else hidden++;
  };
  const missing = new Set<number>();
  const overlays = new Map<number, number[]>();
  for (const key of references.keys()) {
    if (store.overlays.baseOf(vidOf(key), idxOf(key)) === 0) missing.add(key);
    else overlays.set(segmentOf(key), [...(overlays.get(segmentOf(key)) ?? []), key]);
  }
  /** Keys of objects that cannot be read, with the reason. */
  const damaged = new Map<number, string>();
  const orphans: FoundObject[] = [];
  let orphanBytes = 0;
  let count = 0;
  const owners = new Owners(store.disk, store.location);
  owners.noteParts();
  for await (const found of objects.scan()) {
    count++;
    owners.note(found.name, found.uid);
    if (missing.delete(found.key)) {
      if (found.damage !== undefined) damaged.set(found.key, found.damage);
      continue;
    }
    orphanBytes += found.bytes;
    orphans.push(found);
  }
  /** Keys of objects with data in a segment file that is not theirs, with that file. */
  const leftovers = new Map<number, string>();
  for await (const found of objects.scanSegments()) {
    owners.note(found.name, found.uid);
    if (!found.isUsed) {
      orphanBytes += found.bytes;
      orphans.push(found);
      continue;
    }
    const keys = overlays.get(found.key) ?? [];
    overlays.delete(found.key);
    if (found.damage !== undefined) for (const key of keys) damaged.set(key, found.damage);
    for (const key of found.leftovers) leftovers.set(key, found.name);
    count += keys.length;
  }
  for (const keys of overlays.values()) for (const key of keys) missing.add(key);
  const records = metadata.records();
  if (missing.size + damaged.size > 0) reportDamage(store, missing, damaged, report);
  if (owners.problem !== undefined) report(owners.problem);
  const aside = logsSetAside(store.disk, store.location);
  await metadata.settled();
  const { kept } = metadata;
  const isUntold = store.keepsUntold;
  store.keepsUntold = false;
  if (kept) {
    const since = new Date(kept.since).toISOString();
    report(
      `kept since ${since}: unreferenced objects, because answered writes were not applied (${kept.why}); ` +
        (isUntold ? 'kept by this start: look first, then run check --repair again' : '--repair removes them'),
    );
  }
  for (const problem of await store.copies.problems()) report(problem);
  for (const name of aside) report(`set aside: ${name}, a log of answered writes that were not applied`);
  for (const vid of metadata.strayVids()) report(`map pages of vid ${vid.toString(16)} belong to no VDI`);
  for (const { name } of orphans) report(`orphan: ${name}: no VDI refers to it`);
  for (const [key, name] of leftovers) report(`orphan: data of object ${idxOf(key)} in ${name}: no VDI refers to it`);
  if (hidden > 0) problems.push(`... and ${hidden} more`);
  let repaired = 0;
  if (options.repair) {
    const strays = metadata.strayVids();
    if (strays.length > 0) await metadata.commit({ removed: strays });
    const { keptVids } = store;
    // Objects that a start has kept are removed only after a report of them, so that the operator can look first.
    const removable = orphans.filter(({ key }) => !isUntold || !keptVids.has(vidOf(key)));
    for (const found of removable) await objects.removeFound(found);
    const removableData = [...leftovers.keys()].filter((key) => !isUntold || !keptVids.has(vidOf(key)));
    objects.freeLeftovers(removableData, store.backgroundError.bind(store));
    await store.reclaimed();
    repaired = removable.length + removableData.length + strays.length;
    if (!isUntold) {
      for (const name of aside) await store.disk.unlink(name);
      // A log that is back after a power loss would make the next start keep unreferenced objects again.
      for (const directory of new Set(aside.map((name) => path.dirname(name)))) syncDirectory(store.disk, directory);
      if (kept) await metadata.keep(undefined);
      store.keptVids = new Set();
      repaired += aside.length;
    }
  }
  return {
    objects: count,
    vdis: records.length,
    problems,
    orphans: orphans.length + leftovers.size,
    orphanBytes,
    repaired,
  };
}

function reportDamage(
  { metadata, overlays }: CheckedStore,
  missing: ReadonlySet<number>,
  damaged: ReadonlyMap<number, string>,
  report: (line: string) => void,
): void {
  for (const record of metadata.records()) {
    const map = metadata.map(record);
    const label = record.tag === '' ? record.name : `${record.name}@${record.tag}`;
    const objectSize = 2 ** record.blockSizeShift;
    for (let idx = 0; idx < map.length; idx++) {
      const owner = map[idx] as number;
      if (owner === 0) continue;
      // What is below an overlay may be lost for the blocks that it lacks.
      for (let at = owner, base = overlays.baseOf(at, idx); at !== 0; at = base === at ? 0 : base) {
        base = overlays.baseOf(at, idx);
        const key = localObjectKey(at, idx);
        const why = missing.has(key) ? 'object file is missing' : damaged.get(key);
        if (why === undefined) continue;
        const from = idx * objectSize;
        const end = Math.min(from + objectSize, record.size);
        const part = base === 0 && at === owner ? '' : 'parts of ';
        report(`lost: ${part}${label} bytes ${from} to ${end - 1} (${why})`);
      }
    }
  }
}
