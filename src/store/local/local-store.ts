/**
 * The embedded store: a directory with LMDB metadata and one sparse file per data object (FORMAT.md). Owns the
 * directory's lock, the reference counts and the open VDIs, and implements the catalog on one LMDB transaction per
 * operation. Objects are removed only after the transaction that made them unreachable.
 */
import fs from 'node:fs';
import path from 'node:path';
import {
  inOrder,
  StoreError,
  type Awaitable,
  type Catalog,
  type CheckReport,
  type ObjectStore,
  type OpenVdi,
  type Owner,
  type StoreState,
  type Switch,
  type Unfinished,
  type Usage,
  type VdiRecord,
  type ZeroOptions,
} from '../object-store.js';
import { isSystemError, systemMessage, whatFailed } from '../system-error.js';
import { makeNamesDurable } from './durable-names.js';
import * as libc from './libc.js';
import { makeDirectory } from './make-directory.js';
import { LocalVdi, type LocalVdiHost } from './local-vdi.js';
import { removeLeftScratch } from './before-images.js';
import { logsSetAside, makeLogFolder, MapLogs } from './map-log.js';
import { Metadata, PAGE_ENTRIES, type KeptObjects, pageOf, pagesOf } from './metadata.js';
import { ObjectFiles } from './object-files.js';
import { Owners } from './owners.js';
import { idxOf, objectKey, ReferenceCounts, vidOf } from './reference-counts.js';
import { directoryState, removeCreation } from './store-directory.js';
import { StoreLock, type HolderRole } from './store-lock.js';
import { TemporaryVdi } from './temporary-vdi.js';
import { TimeSlice } from './time-slice.js';

const MAX_VID = 2 ** 24 - 1;
/** Findings a check spells out; it counts the rest. */
const MAX_PROBLEMS = 1000;
const NOTHING_USED: Usage = { allocated: 0, exclusive: 0 };

export interface LocalStoreOptions {
  /** Told what an operator should know and no caller waits for. */
  readonly log?: (line: string, details?: object) => void;
  /** What this process is, for those who find the store taken; 'command' if not given. */
  readonly role?: HolderRole;
  /** Whether a store is made in a directory that is missing or empty; true if not given. */
  readonly mayCreate?: boolean;
  /** Open files to keep at most; by default what the process's limit allows. */
  readonly maxDescriptors?: number;
}

export class LocalStore implements ObjectStore, LocalVdiHost {
  readonly location: string;
  readonly identity: string;
  readonly readOnlyBecause: string | undefined;
  /** Whatever is being read keeps its file, and no one else has the store. */
  readonly objectsMove = false;
  readonly metadata: Metadata;
  readonly files: ObjectFiles;
  readonly references = new ReferenceCounts();
  readonly logs: MapLogs;
  readonly catalog: LocalCatalog;
  readonly state: StoreState;
  readonly #lock: StoreLock;
  readonly #log: (line: string, details?: object) => void;
  readonly open = new Map<number, LocalVdi>();
  /** Vids in the names of object files that nobody refers to and that are kept: nothing new may bear them. */
  keptVids: ReadonlySet<number> = new Set();
  /** What this opening has kept or set aside, no check has told of yet: so none may remove it. */
  keepsUntold = false;
  /** Made by this opening; and whether its directory was, too. */
  readonly #made: { readonly hasMadeDirectory: boolean } | undefined;
  /** What this opening has made goes when it is closed, if nothing is in it. */
  #isUnwanted = false;
  /** Why it is not known any more what refers to what, so that the next open has to find out. */
  #lost: unknown;
  /** References that are being given up in the background. */
  readonly #releasing = new Set<Promise<void>>();

  private constructor(
    location: string,
    lock: StoreLock,
    metadata: Metadata,
    files: ObjectFiles,
    options: LocalStoreOptions & Pick<LocalStore, 'readOnlyBecause'> & Pick<Found, 'isNew' | 'hasMadeDirectory'>,
  ) {
    this.location = location;
    this.#made = options.isNew ? options : undefined;
    this.readOnlyBecause = options.readOnlyBecause;
    this.identity = fs.realpathSync(location);
    this.#lock = lock;
    this.metadata = metadata;
    this.files = files;
    this.#log = options.log ?? (() => undefined);
    files.onDiskError = () => metadata.suspectDisk();
    const logFailed = (error: unknown): void => {
      if (libc.isDiskError(error)) metadata.suspectDisk();
      this.#log('what is written until the next flush would be lost if this process were killed', { err: error });
    };
    this.logs = new MapLogs(location, logFailed, files.throttle);
    this.catalog = new LocalCatalog(this);
    this.state = {
      isShared: false,
      entries: () => metadata.state(),
      // Where nothing changes, nothing can be taken away from anybody, and every moment is the same.
      commit: (changes) => (this.readOnlyBecause === undefined ? metadata.storeState(changes) : Promise.resolve()),
    };
  }

  /**
   * Open the store in `directory`. One is made where there is none if `mayCreate`, in a directory that is missing or empty
   * (or has what a creation has left that did not come to its end). On a read-only filesystem it can only be read.
   * Errors (StoreError): NO_STORE, LOCKED if another process has it, FORMAT if a newer sheepgate wrote it, DAMAGED,
   * PERMISSION, NO_SPACE, IO. What a creation that failed has made is removed.
   */
  static async open(directory: string, options: LocalStoreOptions = {}): Promise<LocalStore> {
    const location = path.resolve(directory);
    let found: Found;
    try {
      found = lockDirectory(location, options);
    } catch (error) {
      throw openingError(location, error);
    }
    const { lock, isNew, hasMadeDirectory, isReadOnly } = found;
    const readOnlyBecause = isReadOnly
      ? `store ${location} is on a read-only filesystem: nothing in it can be changed`
      : undefined;
    let metadata: Metadata | undefined;
    try {
      const files = openFiles(location, options, isReadOnly);
      if (!isReadOnly) openLogFolder(location, isNew);
      const opened = isNew ? await Metadata.create(location) : await Metadata.open(location, { readOnly: isReadOnly });
      metadata = opened.metadata;
      const store = new LocalStore(location, lock, metadata, files, { ...options, ...found, readOnlyBecause });
      if (readOnlyBecause === undefined) await store.#recover(opened.clean);
      else store.#takeAsItIs(readOnlyBecause, opened.clean);
      return store;
    } catch (error) {
      await metadata?.close({ clean: false }).catch(() => undefined);
      if (isNew) removeCreation(location, hasMadeDirectory);
      lock.release();
      throw openingError(location, error);
    }
  }

  /** This process will let go of the store as soon as it has finished what is under way. */
  announceStop(): void {
    this.#lock.say('stopping daemon');
  }

  readObject(vid: number, idx: number, offset: number, into: Buffer): Awaitable<void> {
    return this.files.read(vid, idx, offset, into);
  }

  writeObject(vdi: OpenVdi, idx: number, offset: number, data: Buffer): Awaitable<void> {
    const local = vdi as LocalVdi;
    const owner = local.map[idx] as number;
    const keeping =
      local.temporaries.length > 0 ? keepFor(local.temporaries, owner, idx, offset, data.length) : undefined;
    if (keeping !== undefined) return keeping.then(() => this.#writeOwned(local, owner, idx, offset, data));
    return this.#writeOwned(local, owner, idx, offset, data);
  }

  #writeOwned(local: LocalVdi, owner: number, idx: number, offset: number, data: Buffer): Awaitable<void> {
    let later: Awaitable<void>;
    try {
      later = this.files.write(owner, idx, offset, data, local);
    } catch (error) {
      later = Promise.reject(error as Error);
    }
    if (later === undefined) {
      local.noteWritten(owner, idx);
      return;
    }
    return later
      .catch((error: unknown) =>
        this.#afterFreeing(local, error, async () => this.files.write(owner, idx, offset, data, local)),
      )
      .then(() => local.noteWritten(owner, idx));
  }

  /** The reference is taken first: a flush that gives up an older one of this name must not remove the new file. */
  async createObject(vdi: OpenVdi, idx: number, offset: number, data: Buffer, copyOf?: Owner): Promise<void> {
    const { blockSizeShift } = vdi.record;
    const { nameVid: vid } = vdi as LocalVdi;
    const key = objectKey(vid, idx);
    const from = copyOf && objectKey(copyOf.vid, copyOf.idx);
    const create = (): Promise<void> => this.files.create(key, 2 ** blockSizeShift, offset, data, from, vdi);
    this.references.add(vid, idx);
    (vdi as LocalVdi).creating(key);
    try {
      await create().catch((error: unknown) => this.#afterFreeing(vdi as LocalVdi, error, create));
    } catch (error) {
      (vdi as LocalVdi).notCreated(key);
      this.release([key]);
      throw error;
    }
  }

  /** When the disk is full: trimmed space may not be given back yet. Do that, and try once more. */
  async #afterFreeing(vdi: LocalVdi, error: unknown, retry: () => Promise<void>): Promise<void> {
    if ((error as StoreError).code !== 'NO_SPACE') throw error;
    this.catalog.makeRoom();
    await vdi.flush();
    await this.reclaimed();
    await retry();
  }

  async zeroObject(vdi: OpenVdi, idx: number, offset: number, length: number, options: ZeroOptions): Promise<void> {
    const local = vdi as LocalVdi;
    const owner = local.map[idx] as number;
    const keeping = keepFor(local.temporaries, owner, idx, offset, length);
    if (keeping !== undefined) await keeping;
    const zero = (): Promise<void> => this.files.zero(owner, idx, offset, length, options.noHole, local);
    await zero().catch((error: unknown) => this.#afterFreeing(local, error, zero));
    local.noteWritten(owner, idx);
  }

  canZeroFast({ noHole }: ZeroOptions): boolean {
    return this.files.canZeroFast(noHole);
  }

  cacheObject(vid: number, idx: number, offset: number, length: number): Awaitable<void> {
    return this.files.willNeed(vid, idx, offset, length);
  }

  objectExtents(
    vid: number,
    idx: number,
    offset: number,
    length: number,
    sink: (offset: number, length: number, hole: boolean) => boolean,
  ): Awaitable<void> {
    return this.files.extents(vid, idx, offset, length, sink);
  }

  release(keys: readonly number[]): void {
    this.#inBackground(this.#releaseKeys(keys));
  }

  async #releaseKeys(keys: readonly number[]): Promise<void> {
    const slice = new TimeSlice();
    for (const [step, key] of keys.entries()) {
      const room = this.files.roomToRemove();
      if (room) await room;
      else if (slice.isOver(step)) await slice.next();
      this.#releaseOne(key);
    }
  }

  /**
   * The same for all references of a map, or those marked in `only`, in the background; the map is used up. What others
   * refer to as well comes first: it may be theirs alone from then on, and they need not wait until the rest is removed.
   */
  releaseMap(map: Uint32Array, only?: Uint8Array): void {
    this.#inBackground(this.#releaseAll(map, only));
  }

  #inBackground(work: Promise<void>): void {
    const releasing = work
      .catch((error: unknown) => this.backgroundError(error))
      .finally(() => this.#releasing.delete(releasing));
    this.#releasing.add(releasing);
  }

  async #releaseAll(map: Uint32Array, only: Uint8Array | undefined): Promise<void> {
    const slice = new TimeSlice();
    const end = map.length;
    const next = (idx: number): number => {
      if (only === undefined) return idx;
      const found = only.indexOf(1, idx);
      return found < 0 ? end : found;
    };
    let step = 0;
    for (let idx = next(0); idx < end; idx = next(idx + 1)) {
      if (slice.isOver(++step)) await slice.next();
      const owner = map[idx] as number;
      if (owner === 0 || this.references.of(owner, idx) === 1) continue;
      map[idx] = 0;
      this.#releaseOne(objectKey(owner, idx));
    }
    for (let idx = next(0); idx < end; idx = next(idx + 1)) {
      if (slice.isOver(++step)) await slice.next();
      const owner = map[idx] as number;
      if (owner === 0) continue;
      const room = this.files.roomToRemove();
      if (room) await room;
      this.#releaseOne(objectKey(owner, idx));
    }
  }

  #releaseOne(key: number): void {
    // While a read of it is under way it still counts: nobody else may start to write it in place.
    const idle = this.files.idle(key);
    if (idle) {
      this.#inBackground(idle.then(() => this.#releaseOne(key)));
      return;
    }
    if (this.references.drop(vidOf(key), idxOf(key)) > 0) return;
    this.files.remove(key, (error) => this.backgroundError(error));
  }

  /** Resolves when the space of all that was given up is back. */
  async reclaimed(): Promise<void> {
    while (this.#releasing.size > 0) await Promise.all(this.#releasing);
    await this.files.removed();
  }

  discard(vdi: LocalVdi): void {
    const stored = [vdi.record.vid, ...vdi.outgrown].map((vid) => this.metadata.record(vid)).find(Boolean);
    for (const temporary of vdi.temporaries) temporary.leaveAllNow();
    try {
      if (stored) this.references.addAll(this.metadata.map(stored));
    } catch (error) {
      // The disk is gone. Nothing is released then: who refers to what is counted again by the next open.
      this.#lost ??= error;
      this.backgroundError(error);
      vdi.abandon();
      return;
    }
    vdi.abandon();
    this.release(vdi.releases);
    this.releaseMap(vdi.map);
  }

  backgroundError(error: unknown): void {
    if (libc.isDiskError(error)) this.metadata.suspectDisk();
    this.#log((error as Error).message, { err: error });
  }

  /** Whoever opened the store has failed: if that made it, and nothing is in it when it is closed, it is removed again. */
  takeBackCreation(): void {
    this.#isUnwanted = true;
  }

  /** Flush and close everything; the next open then needs no recovery. */
  async close(): Promise<void> {
    let clean = true;
    let failure: unknown;
    await this.catalog.dropTemporaries().catch((error: unknown) => (failure = error));
    for (const vdi of this.open.values()) {
      try {
        await vdi.close();
      } catch (error) {
        clean = false;
        failure ??= error;
      }
    }
    this.open.clear();
    await this.reclaimed();
    await this.files.close();
    failure ??= this.#lost;
    await this.metadata
      .close({ clean: clean && this.#lost === undefined })
      .catch((error: unknown) => (failure ??= error));
    const isEmpty = failure === undefined && this.metadata.records().length === 0;
    if (this.#isUnwanted && this.#made && isEmpty) removeCreation(this.location, this.#made.hasMadeDirectory);
    this.#lock.release();
    if (failure !== undefined) throw failure;
  }

  namesLost(keys: Iterable<number>, error: unknown): void {
    const folders = new Set(Array.from(keys, (key) => path.dirname(this.files.path(key))));
    for (const vdi of this.open.values())
      vdi.loseNames((key) => folders.has(path.dirname(this.files.path(key))), error);
  }

  /**
   * On a read-only filesystem nothing can be recovered, and need not be: the maps show what was last flushed, and whatever
   * those refer to is there.
   */
  #takeAsItIs(because: string, clean: boolean): void {
    for (const record of this.metadata.records()) this.#count(record);
    const unclean = '; it was not closed cleanly: what was written after the last flush is not shown';
    this.#log(clean ? because : because + unclean);
  }

  /** Count the references; after a crash also take in what was answered, and remove what nothing refers to. */
  async #recover(clean: boolean): Promise<void> {
    removeLeftScratch(this.location);
    // Made now, or by a process that did not come this far.
    if (this.metadata.session === undefined) await makeNamesDurable(this.files.root, this.#lock.fd);
    const stored = this.metadata.kept;
    let doubt = clean ? undefined : await this.#restoreRecent();
    // A start before this one did not come to remember what it kept.
    if (stored === undefined && logsSetAside(this.location).length > 0) {
      doubt ??= { why: 'logs were set aside by a start that did not come to its end', logs: [] };
    }
    const strays = this.metadata.strayVids();
    if (strays.length > 0) await this.metadata.commit({ removed: strays });
    for (const record of this.metadata.records()) this.#count(record);
    const vids = new Set(stored?.vids);
    const orphans: number[] = [];
    if (!clean || doubt !== undefined) {
      for await (const { key } of this.files.scan()) {
        if (key < 0 || this.references.of(vidOf(key), idxOf(key)) > 0) continue;
        if (doubt !== undefined) vids.add(vidOf(key));
        else if (!vids.has(vidOf(key))) orphans.push(key);
      }
    }
    this.keptVids = vids;
    this.keepsUntold = doubt !== undefined;
    const kept = doubt === undefined ? stored : { since: Date.now(), why: doubt.why, vids: [...vids] };
    const aside = doubt === undefined ? undefined : await this.#setAside(doubt, kept);
    if (aside?.failure === undefined) {
      const failure = this.logs.clear();
      if (failure !== undefined) this.backgroundError(libc.asStoreError(failure, 'removing logs'));
    }
    if (this.metadata.session !== this.logs.session) await this.#begin(kept);
    for (const key of orphans) this.files.remove(key, (error) => this.backgroundError(error));
    await this.files.removed();
    if (doubt !== undefined) {
      this.#log(
        `store ${this.location} was not shut down cleanly, and what had been answered since the last flush was not taken ` +
          `over: ${doubt.why}; it starts with what was flushed; the logs are set aside in ${this.location}/set-aside, ` +
          "objects that no VDI refers to are kept; look with 'sheepgate check', which tells of both; if nothing is missing, " +
          "'sheepgate check --repair' after that removes them",
        { files: aside?.moved, err: aside?.failure },
      );
    } else if (!clean) {
      this.#log(`store ${this.location} was not shut down cleanly; removed ${orphans.length} unreferenced objects`);
    }
  }

  /**
   * Before the first log goes, what is kept is remembered, and the logs become those of an earlier opening: whoever is
   * interrupted in between must not find some of them, and believe what they say without the others. Errors: NO_SPACE if
   * neither that nor moving them can be done.
   */
  async #setAside(doubt: Doubt, kept: KeptObjects | undefined): Promise<ReturnType<MapLogs['setAside']>> {
    let unremembered: unknown;
    try {
      await this.metadata.begin(this.logs.session, kept);
    } catch (error) {
      if ((error as StoreError).code !== 'NO_SPACE') throw error;
      unremembered = error;
    }
    const aside = this.logs.setAside(doubt.logs);
    if (unremembered !== undefined && aside.failure !== undefined) throw unremembered;
    return aside;
  }

  /** On a full disk the logs stay those of the last opening, of which there are none any more: a disk must open to be emptied. */
  async #begin(kept: KeptObjects | undefined): Promise<void> {
    try {
      await this.metadata.begin(this.logs.session, kept);
    } catch (error) {
      const { session } = this.metadata;
      if ((error as StoreError).code !== 'NO_SPACE' || session === undefined) throw error;
      this.logs.session = session;
      this.backgroundError(error);
    }
  }

  /** The references of its map; and how long the objects are that it refers to. */
  #count(record: VdiRecord): void {
    const map = this.metadata.map(record);
    const length = 2 ** record.blockSizeShift;
    let last = 0;
    for (let idx = 0; idx < map.length; idx++) {
      const owner = map[idx] as number;
      if (owner === 0) continue;
      this.references.add(owner, idx);
      if (owner !== last) this.files.expectLength((last = owner), length);
    }
  }

  /**
   * What a killed process had answered and not flushed. Nobody knows any more which files it had written, and the next
   * flush has to vouch for them: everything is synced. Returns why not all of it could be taken over, if so: then nothing
   * was, except of VDIs whose logs can all be believed.
   */
  async #restoreRecent(): Promise<Doubt | undefined> {
    const { changes, files, doubtful } = this.logs.read(this.metadata.session, this.metadata);
    const restored = new Map<number, { map: Uint32Array; changed: Map<number, number>; generation: number }>();
    for (const { vid, idx, owner, generation } of changes) {
      let of = restored.get(vid);
      if (!of) {
        const map = this.metadata.map(this.metadata.record(vid) as VdiRecord);
        restored.set(vid, (of = { map, changed: new Map(), generation: 0 }));
      }
      of.generation = Math.max(of.generation, generation);
      if (idx < of.map.length) of.changed.set(idx, owner); // else it was made smaller since
    }
    const problem = await this.#whyNotThere(restored);
    const logs = doubtful.map(({ file }) => file);
    if (problem !== undefined) return { why: problem, logs: [...files, ...logs] };
    for (const [vid, { map, changed, generation }] of restored) {
      for (const [idx, owner] of changed) map[idx] = owner;
      const pages = new Set(Array.from(changed.keys(), (idx) => Math.floor(idx / PAGE_ENTRIES)));
      await this.metadata.commit({
        pages: [...pages].map((page) => ({ vid, page, entries: pageOf(map, page) })),
        flushed: [{ vid, generation }],
      });
    }
    if (doubtful.length === 0) return undefined;
    const [{ why } = { why: '' }] = doubtful;
    return { why: `${logs[0]}${logs.length > 1 ? ` and ${logs.length - 1} more` : ''}: ${why}`, logs };
  }

  /** Why what the logs say of the objects cannot be so; undefined if all of it is there, and on disk. */
  async #whyNotThere(
    restored: ReadonlyMap<number, { readonly changed: ReadonlyMap<number, number> }>,
  ): Promise<string | undefined> {
    try {
      await libc.syncFilesystem(this.#lock.fd);
    } catch (error) {
      return `what was written could not be stored: ${(error as Error).message}`;
    }
    for (const [vid, { changed }] of restored) {
      const { blockSizeShift } = this.metadata.record(vid) as VdiRecord;
      for (const [idx, owner] of changed) {
        if (owner === 0) continue;
        const name = this.files.path(objectKey(owner, idx));
        const stat = fs.lstatSync(name, { throwIfNoEntry: false });
        if (!stat) return `the object ${name} is missing`;
        if (stat.size !== 2 ** blockSizeShift) return `the object ${name} is ${stat.size} bytes long`;
      }
    }
    return undefined;
  }
}

/** Answered writes that were not taken over when the store was opened. */
interface Doubt {
  readonly why: string;
  /** The logs that tell of them. */
  readonly logs: readonly string[];
}

function openingError(location: string, error: unknown): StoreError {
  const doing = `opening store ${location}`;
  const failure = libc.asStoreError(error, doing);
  const { code } = failure;
  if (code === 'PERMISSION') {
    let problem: string | undefined;
    try {
      const owners = new Owners(location);
      owners.noteParts();
      ({ problem } = owners);
    } catch {
      // The directory itself may be closed to us.
    }
    if (problem !== undefined) {
      const what = isSystemError(error) ? `${doing}: ${whatFailed(error)}` : failure.message;
      return new StoreError(code, `${what}; ${problem}`, { cause: error });
    }
  }
  if (!isSystemError(error)) return failure;
  return new StoreError(code, `${doing}: ${systemMessage(error)}`, { cause: error });
}

/** A directory that this process has locked, to open a store in it or to make one. */
interface Found {
  readonly lock: StoreLock;
  readonly isNew: boolean;
  readonly hasMadeDirectory: boolean;
  readonly isReadOnly: boolean;
}

function lockDirectory(location: string, { role = 'command', mayCreate = true }: LocalStoreOptions): Found {
  if (directoryState(location) !== 'store') {
    if (!mayCreate) throw noStore(location, role);
    const hasMadeDirectory = makeDirectory(location, 0o700);
    const lock = StoreLock.take(location, role);
    try {
      // Another process may have made one meanwhile.
      return { lock, isNew: directoryState(location) !== 'store', hasMadeDirectory, isReadOnly: false };
    } catch (error) {
      lock.release();
      throw error;
    }
  }
  try {
    return { lock: StoreLock.take(location, role), isNew: false, hasMadeDirectory: false, isReadOnly: false };
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EROFS') throw error;
    const lock = StoreLock.take(location, role, { isReadOnly: true });
    return { lock, isNew: false, hasMadeDirectory: false, isReadOnly: true };
  }
}

/** NO_STORE, or LOCKED if somebody is making one at this moment. */
function noStore(location: string, role: HolderRole): StoreError {
  try {
    if (directoryState(location) === 'unfinished') StoreLock.take(location, role, { isReadOnly: true }).release();
  } catch (error) {
    if (error instanceof StoreError && error.code === 'LOCKED') return error;
  }
  return new StoreError(
    'NO_STORE',
    `no store in ${location}: 'sheepgate vdi create' or 'sheepgate serve' makes one, --store DIR names another`,
  );
}

/** On a full disk a store that lacks the folder is opened all the same, to delete something; nothing is logged then. */
function openLogFolder(location: string, isNew: boolean): void {
  try {
    makeLogFolder(location);
  } catch (error) {
    if (isNew || libc.asStoreError(error, '').code !== 'NO_SPACE') throw error;
  }
}

function openFiles(location: string, { maxDescriptors }: LocalStoreOptions, isReadOnly: boolean): ObjectFiles {
  return ObjectFiles.open(path.join(location, 'objects'), { maxDescriptors, isReadOnly });
}

/** The catalog half of the local store. Calls about one name come one at a time (src/vdi sees to that). */
export class LocalCatalog implements Catalog {
  readonly temporariesStoreNothing = true;
  readonly #store: LocalStore;
  readonly #temporaries = new Map<number, { readonly temporary: TemporaryVdi; readonly source: LocalVdi }>();
  #lastVid = 0;

  constructor(store: LocalStore) {
    this.#store = store;
  }

  list(): readonly VdiRecord[] {
    return this.#withUnstored(this.#store.metadata.records());
  }

  named(name: string): readonly VdiRecord[] {
    return this.#withUnstored(this.#store.metadata.recordsNamed(name), name);
  }

  record(vid: number): VdiRecord | undefined {
    const temporary = this.#temporaries.get(vid)?.temporary.record;
    if (temporary) return temporary;
    for (const vdi of this.#store.open.values()) {
      if (vdi.record.vid === vid && vdi.outgrown.length > 0) return vdi.record;
      if (vdi.outgrown.includes(vid)) return undefined;
    }
    return this.#store.metadata.record(vid);
  }

  /** With what is in memory only, of all names or of one: temporary snapshots, and what an open VDI has become since. */
  #withUnstored(stored: readonly VdiRecord[], name?: string): readonly VdiRecord[] {
    const isMeant = (record: VdiRecord): boolean => name === undefined || record.name === name;
    const gone = new Set<number>();
    const added: VdiRecord[] = [];
    for (const { temporary } of this.#temporaries.values()) if (isMeant(temporary.record)) added.push(temporary.record);
    for (const vdi of this.#store.open.values()) {
      if (vdi.outgrown.length === 0 || !isMeant(vdi.record)) continue;
      for (const vid of [...vdi.outgrown, vdi.record.vid]) gone.add(vid);
      added.push(vdi.record);
    }
    if (added.length === 0) return stored;
    const left = gone.size === 0 ? stored : stored.filter(({ vid }) => !gone.has(vid));
    // Sorting keeps the order of what is alike: temporary snapshots before what they are of, in the order they were taken.
    return [...added, ...left].sort(inOrder);
  }

  touchedBy(vid: number): readonly string[] {
    return this.#store.metadata.childrenOf(vid).map(({ name }) => name);
  }

  async create(name: string, size: number, blockSizeShift: number, unfinished?: Unfinished): Promise<VdiRecord> {
    this.#store.metadata.mustHaveRoom();
    const record = { ...this.#working(this.#nextVid(), name, size, blockSizeShift, 0, 1), unfinished };
    // With whatever an operation that failed may have left under this vid.
    await this.#store.metadata.commit({ removed: [record.vid], records: [record] });
    return record;
  }

  async open(vid: number): Promise<OpenVdi> {
    const temporary = this.#temporaries.get(vid);
    if (temporary) {
      temporary.temporary.resume();
      return temporary.temporary;
    }
    const opened = this.#store.open.get(vid);
    if (opened) {
      opened.resume();
      return opened;
    }
    const record = this.#recordOf(vid);
    const { metadata, logs } = this.#store;
    await metadata.settled();
    const generation = metadata.flushedGeneration(vid) + 1;
    const map = await metadata.loadMap(record);
    const vdi = new LocalVdi(this.#store, record, map, generation, logs.logOf(vid, generation), () =>
      this.#store.open.delete(vdi.record.vid),
    );
    // One that had to be given up and is opened again: the temporary snapshots of it know its objects by name.
    if (this.#temporaries.size > 0 || this.#store.keptVids.has(vid)) vdi.nameAnew(this.#nextVid());
    this.#store.open.set(vid, vdi);
    return vdi;
  }

  /** By copy-before-write (temporary-vdi.ts). Nothing of it is stored, so nothing needs to be durable before it. */
  async prepareTemporary(vdi: OpenVdi, tag: string): Promise<Switch> {
    const source = vdi as LocalVdi;
    const vid = this.#nextVid();
    const nameVid = this.#nextVid();
    let temporary: TemporaryVdi | undefined;
    return {
      holdsNobody: true,
      now: () => {
        const record: VdiRecord = {
          ...source.record,
          vid,
          tag,
          isSnapshot: true,
          isTemporary: true,
          snapshotAt: Date.now(),
        };
        temporary = new TemporaryVdi(this.#store, record, source.map);
        source.takeTemporary(temporary, nameVid);
        this.#temporaries.set(vid, { temporary, source });
      },
      finish: async () => {
        if (!temporary) throw new Error('invariant: a snapshot is finished that was not taken');
        await temporary.frozen();
        return temporary.record;
      },
    };
  }

  /** The disk is full: temporary snapshots that nobody reads give their space back. */
  makeRoom(): void {
    for (const { temporary } of this.#temporaries.values()) temporary.makeRoom();
  }

  async dropTemporaries(): Promise<void> {
    for (const vid of this.#temporaries.keys()) await this.#dropTemporary(vid);
  }

  async #dropTemporary(vid: number): Promise<void> {
    const found = this.#temporaries.get(vid);
    if (!found) return;
    this.#temporaries.delete(vid);
    await found.source.dropTemporary(found.temporary);
  }

  prepareSwitch(vdi: OpenVdi, tag: string, takenAt?: number): Switch {
    const local = vdi as LocalVdi;
    this.#store.metadata.mustHaveRoom(local.map);
    const vid = this.#nextVid();
    let finish: (() => Promise<void>) | undefined;
    let snapshot: VdiRecord | undefined;
    return {
      now: () => {
        const before = local.record;
        const now = Date.now();
        const taken: VdiRecord = {
          ...before,
          tag,
          isSnapshot: true,
          snapshotAt: takenAt ?? now,
          unfinished: undefined,
        };
        const record: VdiRecord = {
          ...before,
          vid,
          snapId: before.snapId + 1,
          parentVid: before.vid,
          createdAt: now,
        };
        finish = local.moveTo(record, taken);
        snapshot = taken;
        this.#store.open.delete(before.vid);
        this.#store.open.set(vid, local);
      },
      finish: async () => {
        if (!finish || !snapshot) throw new Error('invariant: a snapshot is finished that was not taken');
        await finish();
        return snapshot;
      },
    };
  }

  async clone(vid: number, name: string): Promise<VdiRecord> {
    this.#mustStay(vid, 'cloned');
    const base = this.#recordOf(vid);
    const record = this.#working(this.#nextVid(), name, base.size, base.blockSizeShift, base.vid, 1);
    await this.#storeCopy(base, record, []);
    return record;
  }

  async mark(vdi: OpenVdi, unfinished: Unfinished | undefined): Promise<VdiRecord> {
    const local = vdi as LocalVdi;
    await local.restate({ ...local.record, unfinished });
    return local.record;
  }

  async rollback(vid: number, snapshotVid: number, unfinished?: Unfinished): Promise<VdiRecord> {
    this.#mustStay(snapshotVid, 'rolled back to');
    const { map, releases, vids, record: working } = await this.#held(vid);
    const base = this.#recordOf(snapshotVid);
    const record = {
      ...this.#working(this.#nextVid(), working.name, base.size, base.blockSizeShift, base.vid, working.snapId),
      unfinished,
    };
    await this.#storeCopy(base, record, vids);
    this.#store.open.get(vid)?.abandon();
    this.#store.release(releases);
    this.#store.releaseMap(map);
    return record;
  }

  async resize(vdi: OpenVdi, size: number): Promise<VdiRecord> {
    const local = vdi as LocalVdi;
    await local.resize({ ...local.record, size });
    return local.record;
  }

  async remove(vid: number): Promise<void> {
    if (this.#temporaries.has(vid)) return this.#dropTemporary(vid);
    const { map, releases, vids, record } = await this.#held(vid);
    const relinked = this.#childrenOf(vid).map((child) => adopted(child, record));
    await this.#store.metadata.commit({ records: relinked, removed: vids });
    for (const child of relinked) {
      const open = this.#store.open.get(child.vid);
      if (open) open.record = child;
    }
    this.#store.open.get(vid)?.abandon();
    this.#store.release(releases);
    this.#store.releaseMap(map);
  }

  /** What is stored of them, or what they have become since if that is not stored yet. */
  #childrenOf(vid: number): VdiRecord[] {
    const children = new Map(this.#store.metadata.childrenOf(vid).map((child) => [child.vid, child]));
    for (const vdi of this.#store.open.values()) {
      if (vdi.outgrown.length === 0) continue;
      for (const outgrown of vdi.outgrown) children.delete(outgrown);
      if (vdi.record.parentVid === vid) children.set(vdi.record.vid, vdi.record);
    }
    return [...children.values()];
  }

  reclaimed(): Promise<void> {
    return this.#store.reclaimed();
  }

  #mustStay(vid: number, what: string): void {
    if (!this.#temporaries.has(vid)) return;
    throw new StoreError(
      'UNSUPPORTED',
      `a temporary snapshot cannot be ${what}; take one that stays with "vdi snapshot"`,
    );
  }

  /** What goes when a VDI goes that nobody uses. One that could not be flushed when it was closed is open still. */
  async #held(
    vid: number,
  ): Promise<{ map: Uint32Array; releases: readonly number[]; vids: number[]; record: VdiRecord }> {
    const open = this.#store.open.get(vid);
    if (open) {
      for (const temporary of open.temporaries) await temporary.leaveAll();
      return { map: open.map, releases: open.releases, vids: [vid, ...open.outgrown], record: open.record };
    }
    const record = this.#recordOf(vid);
    return { map: await this.#store.metadata.loadMap(record), releases: [], vids: [vid], record };
  }

  async usage(vid: number): Promise<Usage> {
    const opened = this.#temporaries.get(vid)?.temporary ?? this.#store.open.get(vid);
    return this.#usageOf(opened?.map ?? (await this.#store.metadata.loadMap(this.#recordOf(vid))));
  }

  async usages(): Promise<ReadonlyMap<number, Usage>> {
    const { metadata, references, open } = this.#store;
    const usages = await metadata.countEntries((owner, idx) => references.of(owner, idx) === 1);
    for (const record of metadata.records()) if (!usages.has(record.vid)) usages.set(record.vid, NOTHING_USED);
    // Of what is open the map in memory is the truth.
    const maps = Array.from(this.#temporaries.values(), ({ temporary }): OpenVdi => temporary);
    for (const { record, map } of [...maps, ...open.values()]) usages.set(record.vid, await this.#usageOf(map));
    return usages;
  }

  async #usageOf(map: Uint32Array): Promise<Usage> {
    const slice = new TimeSlice();
    let allocated = 0;
    let exclusive = 0;
    for (let idx = 0; idx < map.length; idx++) {
      if (slice.isOver(idx)) await slice.next();
      const owner = map[idx] as number;
      if (owner === 0) continue;
      allocated++;
      if (this.#store.references.of(owner, idx) === 1) exclusive++;
    }
    return { allocated, exclusive };
  }

  /** Compare maps and object files. Nothing may be open: a check of moving parts would report phantoms. */
  async check(options: { readonly repair: boolean }): Promise<CheckReport> {
    const { metadata, files, references, open } = this.#store;
    for (const vdi of open.values()) await vdi.close();
    if (open.size > 0) throw new StoreError('LOCKED', 'a check needs all VDIs closed; disconnect their clients first');
    await this.#store.reclaimed();
    const problems: string[] = [];
    let hidden = 0;
    const report = (line: string): void => {
      if (problems.length < MAX_PROBLEMS) problems.push(line);
      else hidden++;
    };
    const missing = new Set(references.keys());
    /** Objects whose file is not as long as it has to be, with its length. */
    const misshapen = new Map<number, number>();
    const orphans: { key: number; name: string }[] = [];
    let orphanBytes = 0;
    let objects = 0;
    const owners = new Owners(this.#store.location);
    owners.noteParts();
    for await (const { key, bytes, length, name, uid } of files.scan()) {
      objects++;
      owners.note(name, uid);
      if (missing.delete(key)) {
        if (length !== files.lengthOf(key)) misshapen.set(key, length);
        continue;
      }
      orphanBytes += bytes;
      orphans.push({ key, name });
    }
    const records = metadata.records();
    if (missing.size + misshapen.size > 0) this.#reportDamage(records, missing, misshapen, report);
    if (owners.problem !== undefined) report(owners.problem);
    const aside = logsSetAside(this.#store.location);
    await metadata.settled();
    const { kept } = metadata;
    const isUntold = this.#store.keepsUntold;
    this.#store.keepsUntold = false;
    if (kept) {
      const since = new Date(kept.since).toISOString();
      report(
        `kept since ${since}: objects that no VDI refers to, because answered writes were not taken over (${kept.why}); ` +
          (isUntold ? 'kept by this very start: look first, then say check --repair again' : '--repair removes them'),
      );
    }
    for (const name of aside) report(`set aside: ${name}, a log of answered writes that was not taken over`);
    for (const vid of metadata.strayVids()) report(`map pages of vid ${vid.toString(16)} belong to no VDI`);
    for (const { name } of orphans) report(`orphan: ${name} is referred to by no VDI`);
    if (hidden > 0) problems.push(`... and ${hidden} more`);
    let repaired = 0;
    if (options.repair) {
      const strays = metadata.strayVids();
      if (strays.length > 0) await metadata.commit({ removed: strays });
      const { keptVids } = this.#store;
      // The operator must have been told of what a start has kept, and had time to look, before it goes.
      const removable = orphans.filter(({ key }) => !isUntold || !keptVids.has(vidOf(key)));
      for (const { name } of removable) await fs.promises.unlink(name);
      repaired = removable.length + strays.length;
      if (!isUntold) {
        for (const name of aside) await fs.promises.unlink(name);
        if (kept) await metadata.keep(undefined);
        this.#store.keptVids = new Set();
        repaired += aside.length;
      }
    }
    return { objects, vdis: records.length, problems, orphans: orphans.length, orphanBytes, repaired };
  }

  #reportDamage(
    records: readonly VdiRecord[],
    missing: ReadonlySet<number>,
    misshapen: ReadonlyMap<number, number>,
    report: (line: string) => void,
  ): void {
    for (const record of records) {
      const map = this.#store.metadata.map(record);
      const label = record.tag === '' ? record.name : `${record.name}@${record.tag}`;
      const objectSize = 2 ** record.blockSizeShift;
      for (let idx = 0; idx < map.length; idx++) {
        const owner = map[idx] as number;
        if (owner === 0) continue;
        const key = objectKey(owner, idx);
        const length = misshapen.get(key);
        if (length === undefined && !missing.has(key)) continue;
        const from = idx * objectSize;
        const end = Math.min(from + objectSize, record.size);
        const why = length === undefined ? 'object file is missing' : `object file is ${length} bytes long`;
        report(`lost: ${label} bytes ${from} to ${end - 1} (${why})`);
      }
    }
  }

  #working(
    vid: number,
    name: string,
    size: number,
    blockSizeShift: number,
    parentVid: number,
    snapId: number,
  ): VdiRecord {
    const createdAt = Date.now();
    return { vid, name, tag: '', isSnapshot: false, snapId, size, blockSizeShift, parentVid, createdAt, snapshotAt: 0 };
  }

  #recordOf(vid: number): VdiRecord {
    const record = this.#store.metadata.record(vid);
    if (!record) throw new StoreError('DAMAGED', `no record of vid ${vid.toString(16)} in ${this.#store.location}`);
    return record;
  }

  /** Store `record` with the map of `base`; references count before the transaction, so that nothing is freed under it. */
  async #storeCopy(base: VdiRecord, record: VdiRecord, removed: readonly number[]): Promise<void> {
    const { metadata, references } = this.#store;
    const map = await metadata.loadMap(base);
    metadata.mustHaveRoom(map);
    const slice = new TimeSlice();
    for (let idx = 0; idx < map.length; idx++) {
      if (slice.isOver(idx)) await slice.next();
      const owner = map[idx] as number;
      if (owner !== 0) references.add(owner, idx);
    }
    try {
      await metadata.preparePages(pagesOf(record.vid, map));
      await metadata.commit({ records: [record], removed });
    } catch (error) {
      this.#store.releaseMap(map);
      // Best effort: pages without a record are removed by the next open at the latest, or with the vid's next use.
      await metadata.commit({ removed: [record.vid] }).catch(() => undefined);
      throw error;
    }
  }

  #nextVid(): number {
    const { metadata, references } = this.#store;
    if (this.#lastVid === 0) {
      this.#lastVid = references.highestVid;
      for (const { vid } of metadata.records()) this.#lastVid = Math.max(this.#lastVid, vid);
    }
    for (let tries = 0; tries < MAX_VID; tries++) {
      this.#lastVid = (this.#lastVid % MAX_VID) + 1;
      const vid = this.#lastVid;
      if (metadata.record(vid) || references.uses(vid) || this.#temporaries.has(vid)) continue;
      if (this.#store.keptVids.has(vid)) continue;
      if (this.#store.open.has(vid) || this.#namesNow(vid)) continue;
      return vid;
    }
    throw new StoreError('LIMIT', `all ${MAX_VID} VDI ids of ${this.#store.location} are in use`);
  }

  /** Some open VDI makes objects of that name, though there may be none yet. */
  #namesNow(vid: number): boolean {
    for (const open of this.#store.open.values()) if (open.nameVid === vid) return true;
    return false;
  }
}

/** Have every temporary snapshot keep what it knows of the range that is about to change. */
function keepFor(
  temporaries: readonly TemporaryVdi[],
  owner: number,
  idx: number,
  offset: number,
  length: number,
): Promise<void> | undefined {
  let later: Promise<void>[] | undefined;
  for (const temporary of temporaries) {
    const keeping = temporary.keep(owner, idx, offset, length);
    if (keeping !== undefined) (later ??= []).push(keeping);
  }
  return later && Promise.all(later).then(() => undefined);
}

/**
 * What becomes of `child` when its parent goes: it descends from whoever that descended from. The VDI that went on from
 * a snapshot is again as old as it was before that was taken.
 */
function adopted(child: VdiRecord, parent: VdiRecord): VdiRecord {
  const { parentVid } = parent;
  if (!parent.isSnapshot || child.isSnapshot || child.name !== parent.name) return { ...child, parentVid };
  return { ...child, parentVid, createdAt: parent.createdAt };
}
