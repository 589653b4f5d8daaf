/**
 * What the start of a local store does before anybody uses it: references are counted, and after a process that was killed
 * what it had answered is taken over from the logs, or set aside where it cannot be believed (FORMAT.md, recent/). Objects
 * that nothing refers to are removed, unless something was doubtful.
 */
import path from 'node:path';
import type { HostDisk } from '../../system/disk.js';
import { StoreError, type VdiRecord } from '../object-store.js';
import { removeLeftScratch } from './before-images.js';
import { OBJECTS, type DataObjects } from './data-objects.js';
import { makeNamesDurable } from '../../system/durable-names.js';
import { logsSetAside, type MapLogs } from './map-logs.js';
import { PAGE_ENTRIES, pageOf } from './map-pages.js';
import type { KeptObjects, Metadata } from './metadata.js';
import { idxOf, objectKey, vidOf, type ReferenceCounts } from './reference-counts.js';
import { asStoreError } from './store-errors.js';

/** A store that is being opened. */
export interface StoreInRecovery {
  readonly disk: HostDisk;
  readonly location: string;
  /** A file of its filesystem. */
  readonly fd: number;
  readonly metadata: Metadata;
  readonly objects: DataObjects;
  readonly references: ReferenceCounts;
  readonly logs: MapLogs;
  keptVids: ReadonlySet<number>;
  keepsUntold: boolean;
  log(line: string, details?: object): void;
  backgroundError(error: unknown): void;
}

/** Answered writes that were not taken over when the store was opened. */
interface Doubt {
  readonly why: string;
  /** The logs that tell of them. */
  readonly logs: readonly string[];
}

/**
 * On a read-only filesystem nothing can be recovered, and need not be: the maps show what was last flushed, and whatever
 * those refer to is there.
 */
export function takeAsItIs(store: StoreInRecovery, because: string, clean: boolean): void {
  for (const record of store.metadata.records()) count(store, record);
  const unclean = '; it was not closed cleanly: what was written after the last flush is not shown';
  store.log(clean ? because : because + unclean);
}

/** Count the references; after a crash also take in what was answered, and remove what nothing refers to. */
export async function recover(store: StoreInRecovery, clean: boolean): Promise<void> {
  removeLeftScratch(store.disk, store.location);
  // Made now, or by a process that did not come this far.
  if (store.metadata.session === undefined)
    await makeNamesDurable(store.disk, path.join(store.location, OBJECTS), store.fd);
  const stored = store.metadata.kept;
  let doubt = clean ? undefined : await restoreRecent(store);
  // A start before this one did not come to remember what it kept.
  if (stored === undefined && logsSetAside(store.disk, store.location).length > 0) {
    doubt ??= { why: 'logs were set aside by a start that did not come to its end', logs: [] };
  }
  const strays = store.metadata.strayVids();
  if (strays.length > 0) await store.metadata.commit({ removed: strays });
  for (const record of store.metadata.records()) count(store, record);
  const vids = new Set(stored?.vids);
  const orphans: number[] = [];
  if (!clean || doubt !== undefined) {
    for await (const { key } of store.objects.scan()) {
      if (key < 0 || store.references.of(vidOf(key), idxOf(key)) > 0) continue;
      if (doubt !== undefined) vids.add(vidOf(key));
      else if (!vids.has(vidOf(key))) orphans.push(key);
    }
  }
  store.keptVids = vids;
  store.keepsUntold = doubt !== undefined;
  const kept = doubt === undefined ? stored : { since: Date.now(), why: doubt.why, vids: [...vids] };
  const aside = doubt === undefined ? undefined : await setAside(store, doubt, kept);
  if (aside?.failure === undefined) {
    const failure = store.logs.clear();
    if (failure !== undefined) store.backgroundError(asStoreError(failure, 'removing logs'));
  }
  if (store.metadata.session !== store.logs.session) await begin(store, kept);
  for (const key of orphans) store.objects.remove(key, (error) => store.backgroundError(error));
  await store.objects.removed();
  if (doubt !== undefined) {
    store.log(
      `store ${store.location} was not shut down cleanly, and what had been answered since the last flush was not taken ` +
        `over: ${doubt.why}; it starts with what was flushed; the logs are set aside in ${store.location}/set-aside, ` +
        "objects that no VDI refers to are kept; look with 'sheepgate check', which tells of both; if nothing is missing, " +
        "'sheepgate check --repair' after that removes them",
      { files: aside?.moved, err: aside?.failure },
    );
  } else if (!clean) {
    store.log(`store ${store.location} was not shut down cleanly; removed ${orphans.length} unreferenced objects`);
  }
}

/**
 * Before the first log goes, what is kept is remembered, and the logs become those of an earlier opening: whoever is
 * interrupted in between must not find some of them, and believe what they say without the others. Errors: NO_SPACE if
 * neither that nor moving them can be done.
 */
async function setAside(
  store: StoreInRecovery,
  doubt: Doubt,
  kept: KeptObjects | undefined,
): Promise<ReturnType<MapLogs['setAside']>> {
  let unremembered: StoreError | undefined;
  try {
    await store.metadata.begin(store.logs.session, kept);
  } catch (error) {
    if (!isFull(error)) throw error;
    unremembered = error;
  }
  const aside = store.logs.setAside(doubt.logs);
  if (unremembered !== undefined && aside.failure !== undefined) throw unremembered;
  return aside;
}

function isFull(error: unknown): error is StoreError {
  return error instanceof StoreError && error.code === 'NO_SPACE';
}

/** On a full disk the logs stay those of the last opening, of which there are none any more: a disk must open to be emptied. */
async function begin(store: StoreInRecovery, kept: KeptObjects | undefined): Promise<void> {
  try {
    await store.metadata.begin(store.logs.session, kept);
  } catch (error) {
    const { session } = store.metadata;
    if (!isFull(error) || session === undefined) throw error;
    store.logs.session = session;
    store.backgroundError(error);
  }
}

/** The references of its map; and how long the objects are that it refers to. */
function count(store: StoreInRecovery, record: VdiRecord): void {
  const map = store.metadata.map(record);
  const length = 2 ** record.blockSizeShift;
  let last = 0;
  for (let idx = 0; idx < map.length; idx++) {
    const owner = map[idx] as number;
    if (owner === 0) continue;
    store.references.add(owner, idx);
    if (owner !== last) store.objects.expectLength((last = owner), length);
  }
}

/**
 * What a killed process had answered and not flushed. Nobody knows any more which files it had written, and the next
 * flush has to vouch for them: everything is synced. Returns why not all of it could be taken over, if so: then nothing
 * was, except of VDIs whose logs can all be believed.
 */
async function restoreRecent(store: StoreInRecovery): Promise<Doubt | undefined> {
  const { changes, files, doubtful } = store.logs.read(store.metadata.session, store.metadata);
  const restored = new Map<number, { map: Uint32Array; changed: Map<number, number>; generation: number }>();
  for (const { vid, idx, owner, generation } of changes) {
    let of = restored.get(vid);
    if (!of) {
      const map = store.metadata.map(store.metadata.record(vid) as VdiRecord);
      restored.set(vid, (of = { map, changed: new Map(), generation: 0 }));
    }
    of.generation = Math.max(of.generation, generation);
    if (idx < of.map.length) of.changed.set(idx, owner); // else it was made smaller since
  }
  const problem = await whyNotThere(store, restored);
  const logs = doubtful.map(({ file }) => file);
  if (problem !== undefined) return { why: problem, logs: [...files, ...logs] };
  for (const [vid, { map, changed, generation }] of restored) {
    for (const [idx, owner] of changed) map[idx] = owner;
    const pages = new Set(Array.from(changed.keys(), (idx) => Math.floor(idx / PAGE_ENTRIES)));
    await store.metadata.commit({
      pages: [...pages].map((page) => ({ vid, page, entries: pageOf(map, page) })),
      flushed: [{ vid, generation }],
    });
  }
  if (doubtful.length === 0) return undefined;
  const [{ why } = { why: '' }] = doubtful;
  return { why: `${logs[0]}${logs.length > 1 ? ` and ${logs.length - 1} more` : ''}: ${why}`, logs };
}

/** Why what the logs say of the objects cannot be so; undefined if all of it is there, and on disk. */
async function whyNotThere(
  store: StoreInRecovery,
  restored: ReadonlyMap<number, { readonly changed: ReadonlyMap<number, number> }>,
): Promise<string | undefined> {
  try {
    await store.disk.syncfs(store.fd);
  } catch (error) {
    return `what was written could not be stored: ${(error as Error).message}`;
  }
  for (const [vid, { changed }] of restored) {
    const { blockSizeShift } = store.metadata.record(vid) as VdiRecord;
    for (const [idx, owner] of changed) {
      if (owner === 0) continue;
      const problem = store.objects.problemOf(objectKey(owner, idx), 2 ** blockSizeShift);
      if (problem !== undefined) return problem;
    }
  }
  return undefined;
}
