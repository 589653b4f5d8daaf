/**
 * The start of a local store, before it is used: counts references, and, if the last process was killed, applies its map logs
 * or sets doubtful ones aside (FORMAT.md, recent/). Removes unreferenced objects, unless a log was doubtful.
 */
import path from 'node:path';
import type { HostDisk } from '../../system/disk.js';
import { StoreError } from '../store-error.js';
import type { VdiRecord } from '../vdi-record.js';
import { removeLeftScratch } from './before-images.js';
import { OBJECTS, type DataObjects } from './data-objects.js';
import { makeNamesDurable } from '../../system/durable-names.js';
import { logsSetAside, type MapLogs } from './map-logs.js';
import { PAGE_ENTRIES, pageOf } from './map-pages.js';
import { countBases, loadBases } from './overlay-loading.js';
import type { Overlays } from './overlays.js';
import { RestoredVdi } from './restored-vdi.js';
import type { KeptObjects, Metadata } from './metadata.js';
import { idxOf, localObjectKey, vidOf, type ReferenceCounts } from './reference-counts.js';
import { asStoreError } from './store-errors.js';

/** A store that is being opened. */
export interface StoreInRecovery {
  readonly disk: HostDisk;
  readonly location: string;
  /** An open file on the store's filesystem. */
  readonly fd: number;
  readonly metadata: Metadata;
  readonly objects: DataObjects;
  readonly references: ReferenceCounts;
  readonly overlays: Overlays;
  readonly logs: MapLogs;
  keptVids: ReadonlySet<number>;
  keepsUntold: boolean;
  log(line: string, details?: object): void;
  backgroundError(error: unknown): void;
}

/** Answered writes that were not applied when the store was opened. */
interface Doubt {
  readonly why: string;
  /** The logs with these writes. */
  readonly logs: readonly string[];
}

/**
 * Open on a read-only filesystem: nothing can be recovered, and nothing need be. The maps show the last flush, and all
 * objects that they refer to exist.
 */
export function takeAsItIs(store: StoreInRecovery, because: string, clean: boolean): void {
  loadBases(store);
  for (const record of store.metadata.records()) count(store, record);
  countBases(store);
  const unclean = '; it was not closed cleanly: writes after the last flush are not shown';
  store.log(clean ? because : because + unclean);
}

/** Count the references; after a crash also apply the logs of answered writes, and remove unreferenced objects. */
export async function recover(store: StoreInRecovery, clean: boolean): Promise<void> {
  removeLeftScratch(store.disk, store.location);
  // The store is new, or the process that created it was interrupted before this.
  if (store.metadata.session === undefined)
    await makeNamesDurable(store.disk, path.join(store.location, OBJECTS), store.fd);
  const stored = store.metadata.kept;
  loadBases(store);
  let doubt = clean ? undefined : await restoreRecent(store);
  // An earlier start was interrupted before it stored which objects it kept.
  if (stored === undefined && logsSetAside(store.disk, store.location).length > 0) {
    doubt ??= { why: 'logs were set aside by a start that was interrupted', logs: [] };
  }
  const strays = store.metadata.strayVids();
  if (strays.length > 0) await store.metadata.commit({ removed: strays });
  for (const record of store.metadata.records()) count(store, record);
  await dropUnusedOverlays(store, countBases(store));
  const vids = new Set(stored?.vids);
  const orphans: number[] = [];
  if (!clean || doubt !== undefined) {
    for await (const { key } of store.objects.scan()) {
      if (key < 0 || store.references.of(vidOf(key), idxOf(key)) > 0) continue;
      if (doubt !== undefined) vids.add(vidOf(key));
      else if (!vids.has(vidOf(key))) orphans.push(key);
    }
    if (doubt === undefined) await freeLeftovers(store, vids);
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
      `store ${store.location} was not shut down cleanly, and answered writes since the last flush were not applied: ` +
        `${doubt.why}; it starts with the flushed data; the logs are set aside in ${store.location}/set-aside, and ` +
        "unreferenced objects are kept; 'sheepgate check' lists both; if nothing is missing, run " +
        "'sheepgate check --repair' after that to remove them",
      { files: aside?.moved, err: aside?.failure },
    );
  } else if (!clean) {
    store.log(`store ${store.location} was not shut down cleanly; removed ${orphans.length} unreferenced objects`);
  }
}

/**
 * Before the first log is moved, the kept objects and a new session are stored, so that the logs belong to an earlier session:
 * after an interruption the next start must not apply some logs without the others. Errors: NO_SPACE (neither storing that nor
 * moving the logs is possible).
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

/** On a full disk the last session continues, whose logs are gone: the store must open, so that something can be deleted. */
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

/** Records of overlays that no map needs: they were given up, or made, just before a crash. */
async function dropUnusedOverlays({ metadata, overlays }: StoreInRecovery, unused: readonly number[]): Promise<void> {
  if (unused.length === 0) return;
  for (const key of unused) overlays.remove(vidOf(key), idxOf(key));
  await metadata.storeOverlays(unused, () => undefined);
}

/** Space in segment files that no overlay has, and files without any. */
async function freeLeftovers(store: StoreInRecovery, keptVids: ReadonlySet<number>): Promise<void> {
  const onError = (error: unknown): void => store.backgroundError(error);
  for await (const found of store.objects.scanSegments()) {
    if (found.key < 0 || keptVids.has(vidOf(found.key))) continue;
    if (found.isUsed) store.objects.freeLeftovers(found.leftovers, onError);
    else await store.objects.removeFound(found).catch(onError);
  }
}

/** Count the references of a VDI's map, and note the length of the objects that it refers to. */
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
 * Apply writes that a killed process had answered and not flushed. It is unknown which files it had written, and the next
 * flush must cover them, so the whole filesystem is synced. Returns why not all writes were applied, if so: then none were,
 * except those of VDIs without a doubtful log.
 */
async function restoreRecent(store: StoreInRecovery): Promise<Doubt | undefined> {
  const { changes, files, doubtful } = store.logs.read(store.metadata.session, store.metadata);
  const restored = new Map<number, RestoredVdi>();
  for (const change of changes) {
    const { vid } = change;
    let of = restored.get(vid);
    if (!of) restored.set(vid, (of = new RestoredVdi(store, store.metadata.record(vid) as VdiRecord)));
    of.apply(change);
  }
  const problem = await whyNotThere(store, restored);
  const logs = doubtful.map(({ file }) => file);
  if (problem !== undefined) {
    store.overlays.clear();
    loadBases(store);
    return { why: problem, logs: [...files, ...logs] };
  }
  for (const [vid, { map, changed, overlays, generation }] of restored) {
    const pages = new Set(Array.from(changed, (idx) => Math.floor(idx / PAGE_ENTRIES)));
    const stored = Array.from(overlays, (key) => [key, store.overlays.stored(key)] as const);
    await store.metadata.storeOverlays(
      stored.flatMap(([key, overlay]) => (overlay ? [key] : [])),
      (key) => store.overlays.stored(key),
    );
    await store.metadata.commit({
      pages: [...pages].map((page) => ({ vid, page, entries: pageOf(map, page) })),
      flushed: [{ vid, generation }],
      overlays: new Map(stored.filter(([, overlay]) => overlay === undefined)),
    });
  }
  if (doubtful.length === 0) return undefined;
  const [{ why } = { why: '' }] = doubtful;
  return { why: `${logs[0]}${logs.length > 1 ? ` and ${logs.length - 1} more` : ''}: ${why}`, logs };
}

/** Why an object that a log names is missing or not durable; undefined if all are there and durable. */
async function whyNotThere(
  store: StoreInRecovery,
  restored: ReadonlyMap<number, RestoredVdi>,
): Promise<string | undefined> {
  try {
    await store.disk.syncfs(store.fd);
  } catch (error) {
    return `written data could not be made durable: ${(error as Error).message}`;
  }
  for (const [vid, { map, changed, overlays, problem }] of restored) {
    if (problem !== undefined) return problem;
    const { blockSizeShift } = store.metadata.record(vid) as VdiRecord;
    const keys = Array.from(changed, (idx) => localObjectKey(map[idx] as number, idx));
    for (const key of [...keys.filter((each) => vidOf(each) !== 0), ...overlays]) {
      const missing = store.objects.problemOf(key, 2 ** blockSizeShift);
      if (missing !== undefined) return missing;
    }
  }
  return undefined;
}
