/**
 * The embedded store: a directory with LMDB metadata and one sparse file per data object (FORMAT.md). Owns the
 * directory's lock, the reference counts and the open VDIs, and implements the catalog on one LMDB transaction per
 * operation. Objects are removed only after the transaction that made them unreachable.
 */
import fs from 'node:fs';
import path from 'node:path';
import {
  StoreError,
  type Awaitable,
  type Catalog,
  type CheckReport,
  type ObjectStore,
  type OpenVdi,
  type Owner,
  type Switch,
  type Unfinished,
  type VdiRecord,
  type ZeroOptions,
} from '../object-store.js';
import * as libc from './libc.js';
import { makeDirectory } from './make-directory.js';
import { LocalVdi, type LocalVdiHost } from './local-vdi.js';
import { removeLeftScratch } from './before-images.js';
import { MapLogs } from './map-log.js';
import { Metadata, PAGE_ENTRIES, pageOf, pagesOf } from './metadata.js';
import { ObjectFiles } from './object-files.js';
import { idxOf, objectKey, ReferenceCounts, vidOf } from './reference-counts.js';
import { StoreLock, type HolderRole } from './store-lock.js';
import { TemporaryVdi } from './temporary-vdi.js';
import { TimeSlice } from './time-slice.js';

const MAX_VID = 2 ** 24 - 1;
/** Findings a check spells out; it counts the rest. */
const MAX_PROBLEMS = 1000;

export interface LocalStoreOptions {
  /** Told what an operator should know and no caller waits for. */
  readonly log?: (line: string, details?: object) => void;
  /** What this process is, for those who find the store taken; 'command' if not given. */
  readonly role?: HolderRole;
  /** Open files to keep at most; by default what the process's limit allows. */
  readonly maxDescriptors?: number;
}

export class LocalStore implements ObjectStore, LocalVdiHost {
  readonly location: string;
  readonly identity: string;
  readonly readOnlyBecause = undefined;
  /** Whatever is being read keeps its file, and no one else has the store. */
  readonly objectsMove = false;
  readonly metadata: Metadata;
  readonly files: ObjectFiles;
  readonly references = new ReferenceCounts();
  readonly logs: MapLogs;
  readonly catalog: LocalCatalog;
  readonly #lock: StoreLock;
  readonly #log: (line: string, details?: object) => void;
  readonly open = new Map<number, LocalVdi>();
  /** References that are being given up in the background. */
  readonly #releasing = new Set<Promise<void>>();

  private constructor(
    location: string,
    lock: StoreLock,
    metadata: Metadata,
    files: ObjectFiles,
    options: LocalStoreOptions,
  ) {
    this.location = location;
    this.identity = fs.realpathSync(location);
    this.#lock = lock;
    this.metadata = metadata;
    this.files = files;
    this.#log = options.log ?? (() => undefined);
    this.logs = new MapLogs(location, (error) =>
      this.#log('what is written until the next flush would be lost if this process were killed', { err: error }),
    );
    this.catalog = new LocalCatalog(this);
  }

  /**
   * Open the store in `directory`, made if missing. Errors (StoreError): LOCKED if another process has it, FORMAT if a
   * newer sheepgate wrote it, PERMISSION, NO_SPACE, IO.
   */
  static async open(directory: string, options: LocalStoreOptions = {}): Promise<LocalStore> {
    const location = path.resolve(directory);
    let lock: StoreLock;
    try {
      makeDirectory(location, 0o700);
      lock = StoreLock.take(location, options.role ?? 'command');
    } catch (error) {
      throw libc.asStoreError(error, `opening store ${location}`);
    }
    let metadata: Metadata | undefined;
    try {
      const opened = await Metadata.open(location);
      metadata = opened.metadata;
      const store = new LocalStore(location, lock, metadata, openFiles(location, options), options);
      await store.#recover(opened.clean);
      return store;
    } catch (error) {
      await metadata?.close({ clean: false }).catch(() => undefined);
      lock.release();
      throw libc.asStoreError(error, `opening store ${location}`);
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
      later = this.files.write(owner, idx, offset, data);
    } catch (error) {
      later = Promise.reject(error as Error);
    }
    if (later === undefined) {
      local.noteWritten(owner, idx);
      return;
    }
    return later
      .catch((error: unknown) =>
        this.#afterFreeing(local, error, async () => this.files.write(owner, idx, offset, data)),
      )
      .then(() => local.noteWritten(owner, idx));
  }

  /** The reference is taken first: a flush that gives up an older one of this name must not remove the new file. */
  async createObject(vdi: OpenVdi, idx: number, offset: number, data: Buffer, copyOf?: Owner): Promise<void> {
    const { blockSizeShift } = vdi.record;
    const { nameVid: vid } = vdi as LocalVdi;
    const key = objectKey(vid, idx);
    const from = copyOf && objectKey(copyOf.vid, copyOf.idx);
    const create = (): Promise<void> => this.files.create(key, 2 ** blockSizeShift, offset, data, from);
    this.references.add(vid, idx);
    try {
      await create().catch((error: unknown) => this.#afterFreeing(vdi as LocalVdi, error, create));
    } catch (error) {
      this.release([key]);
      throw error;
    }
  }

  /** When the disk is full: trimmed space may not be given back yet. Do that, and try once more. */
  async #afterFreeing(vdi: LocalVdi, error: unknown, retry: () => Promise<void>): Promise<void> {
    if ((error as StoreError).code !== 'NO_SPACE') throw error;
    await vdi.flush();
    await this.reclaimed();
    await retry();
  }

  async zeroObject(vdi: OpenVdi, idx: number, offset: number, length: number, options: ZeroOptions): Promise<void> {
    const local = vdi as LocalVdi;
    const owner = local.map[idx] as number;
    const keeping = keepFor(local.temporaries, owner, idx, offset, length);
    if (keeping !== undefined) await keeping;
    const zero = (): Promise<void> => this.files.zero(owner, idx, offset, length, options.noHole);
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
    if (stored) this.references.addAll(this.metadata.map(stored));
    vdi.abandon();
    this.release(vdi.releases);
    this.releaseMap(vdi.map);
  }

  backgroundError(error: unknown): void {
    this.#log((error as Error).message, { err: error });
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
    await this.metadata.close({ clean });
    this.#lock.release();
    if (failure !== undefined) throw failure;
  }

  /** Count the references; after a crash also take in what was answered, and remove what nothing refers to. */
  async #recover(clean: boolean): Promise<void> {
    removeLeftScratch(this.location);
    if (!clean) await this.#restoreRecent();
    this.logs.clear();
    const strays = this.metadata.strayVids();
    if (strays.length > 0) await this.metadata.commit({ removed: strays });
    for (const record of this.metadata.records()) this.references.addAll(this.metadata.map(record));
    if (clean) return;
    const orphans: number[] = [];
    for await (const { key } of this.files.scan()) {
      if (key >= 0 && this.references.of(vidOf(key), idxOf(key)) === 0) orphans.push(key);
    }
    for (const key of orphans) this.files.remove(key, (error) => this.backgroundError(error));
    await this.files.removed();
    this.#log(`store ${this.location} was not shut down cleanly; removed ${orphans.length} unreferenced objects`);
  }

  /**
   * What a killed process had answered and not flushed. Nobody knows any more which files it had written, and the next
   * flush has to vouch for them: everything is synced.
   */
  async #restoreRecent(): Promise<void> {
    await libc.syncFilesystem(this.#lock.fd);
    const restored = new Map<number, { map: Uint32Array; pages: Set<number> }>();
    for (const { vid, idx, owner } of this.logs.read((each) => this.metadata.record(each))) {
      let of = restored.get(vid);
      if (!of) {
        of = { map: this.metadata.map(this.metadata.record(vid) as VdiRecord), pages: new Set() };
        restored.set(vid, of);
      }
      if (idx >= of.map.length) continue; // it was made smaller since
      of.map[idx] = owner;
      of.pages.add(Math.floor(idx / PAGE_ENTRIES));
    }
    for (const [vid, { map, pages }] of restored) {
      await this.metadata.commit({ pages: [...pages].map((page) => ({ vid, page, entries: pageOf(map, page) })) });
    }
  }
}

function openFiles(location: string, options: LocalStoreOptions): ObjectFiles {
  return ObjectFiles.open(path.join(location, 'objects'), { maxDescriptors: options.maxDescriptors });
}

/** The catalog half of the local store. Calls come one at a time (src/vdi sees to that). */
export class LocalCatalog implements Catalog {
  readonly #store: LocalStore;
  readonly #temporaries = new Map<number, { readonly temporary: TemporaryVdi; readonly source: LocalVdi }>();
  #lastVid = 0;

  constructor(store: LocalStore) {
    this.#store = store;
  }

  list(): VdiRecord[] {
    const records = new Map(this.#store.metadata.records().map((record) => [record.vid, record]));
    for (const vdi of this.#store.open.values()) {
      if (vdi.outgrown.length === 0) continue;
      for (const vid of vdi.outgrown) records.delete(vid);
      records.set(vdi.record.vid, vdi.record);
    }
    return [...Array.from(this.#temporaries.values(), ({ temporary }) => temporary.record), ...records.values()];
  }

  async create(name: string, size: number, blockSizeShift: number, unfinished?: Unfinished): Promise<VdiRecord> {
    const record = { ...this.#working(this.#nextVid(), name, size, blockSizeShift, 0, 1), unfinished };
    // With whatever an operation that failed may have left under this vid.
    await this.#store.metadata.commit({ removed: [record.vid], records: [record] });
    return record;
  }

  async open(vid: number): Promise<OpenVdi> {
    const temporary = this.#temporaries.get(vid);
    if (temporary) return temporary.temporary;
    const opened = this.#store.open.get(vid);
    if (opened) {
      opened.resume();
      return opened;
    }
    const record = this.#recordOf(vid);
    const { metadata, logs } = this.#store;
    const vdi = new LocalVdi(this.#store, record, await metadata.loadMap(record), logs.logOf(vid), () =>
      this.#store.open.delete(vdi.record.vid),
    );
    // One that had to be given up and is opened again: the temporary snapshots of it know its objects by name.
    if (this.#temporaries.size > 0) vdi.nameAnew(this.#nextVid());
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
        const record: VdiRecord = { ...source.record, vid, tag, isSnapshot: true, snapshotAt: Date.now() };
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
    const relinked = this.list()
      .filter((other) => other.parentVid === vid && !this.#temporaries.has(other.vid))
      .map((child) => adopted(child, record));
    await this.#store.metadata.commit({ records: relinked, removed: vids });
    for (const child of relinked) {
      const open = this.#store.open.get(child.vid);
      if (open) open.record = child;
    }
    this.#store.open.get(vid)?.abandon();
    this.#store.release(releases);
    this.#store.releaseMap(map);
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

  async usage(vid: number): Promise<{ allocated: number; exclusive: number }> {
    const opened = this.#temporaries.get(vid)?.temporary ?? this.#store.open.get(vid);
    const map = opened?.map ?? (await this.#store.metadata.loadMap(this.#recordOf(vid)));
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
    const orphans: { key: number; name: string }[] = [];
    let orphanBytes = 0;
    let objects = 0;
    for await (const { key, bytes, name } of files.scan()) {
      objects++;
      if (missing.delete(key)) continue;
      orphanBytes += bytes;
      orphans.push({ key, name });
    }
    const records = metadata.records();
    if (missing.size > 0) this.#reportMissing(records, missing, report);
    for (const vid of metadata.strayVids()) report(`map pages of vid ${vid.toString(16)} belong to no VDI`);
    for (const { name } of orphans) report(`orphan: ${name} is referred to by no VDI`);
    if (hidden > 0) problems.push(`... and ${hidden} more`);
    let repaired = 0;
    if (options.repair) {
      const strays = metadata.strayVids();
      if (strays.length > 0) await metadata.commit({ removed: strays });
      for (const { name } of orphans) await fs.promises.unlink(name);
      repaired = orphans.length + strays.length;
    }
    return { objects, vdis: records.length, problems, orphans: orphans.length, orphanBytes, repaired };
  }

  #reportMissing(records: readonly VdiRecord[], missing: ReadonlySet<number>, report: (line: string) => void): void {
    for (const record of records) {
      const map = this.#store.metadata.map(record);
      const label = record.tag === '' ? record.name : `${record.name}@${record.tag}`;
      for (let idx = 0; idx < map.length; idx++) {
        const owner = map[idx] as number;
        if (owner === 0 || !missing.has(objectKey(owner, idx))) continue;
        const from = idx * 2 ** record.blockSizeShift;
        report(`lost: ${label} bytes ${from} to ${from + 2 ** record.blockSizeShift - 1} (object file is missing)`);
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
