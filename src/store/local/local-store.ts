/**
 * The embedded store: a directory with LMDB metadata and data objects (FORMAT.md). Owns the directory's lock, the reference
 * counts, the open VDIs (local-vdi.ts has their reads and writes), and how the store is closed. An object is removed when its
 * last reference is given up, and that only after a durable map no longer has it.
 */
import path from 'node:path';
import type { HostDisk } from '../../system/disk.js';
import { hostDisk } from '../../system/real-disk.js';
import type { Merging, ObjectStore, StoreState } from '../object-store.js';
import { CachedReads } from './cached-reads.js';
import { OBJECTS } from './data-objects.js';
import { isTmpfs } from './filesystem-abilities.js';
import { LocalCatalog, type CatalogHost } from './local-catalog.js';
import type { LocalVdi } from './local-vdi.js';
import { MapLogs } from './map-logs.js';
import { Metadata } from './metadata.js';
import { LayeredObjects } from './layered-objects.js';
import type { Layers } from './layers.js';
import { MetadataCopies, mustBeOfCopies, type CopyTimes } from './metadata-copies.js';
import type { SharedByFiles } from './object-files.js';
import { openLayers } from './open-layers.js';
import { OverlayMerger, type MergerHost } from './overlay-merger.js';
import { OverlayRemoval } from './overlay-removal.js';
import type { Overlays } from './overlays.js';
import { idxOf, localObjectKey, vidOf, type ReferenceCounts } from './reference-counts.js';
import { removeCreation } from './store-directory.js';
import { isDiskError } from './store-errors.js';
import type { HolderRole, StoreLock } from './store-lock.js';
import { lockDirectory, openingError, openLogFolder, type Found } from './store-opening.js';
import { recover, takeAsItIs, type StoreInRecovery } from './store-recovery.js';
import { TimeSlice } from './time-slice.js';
import { WriteThrottle } from './write-throttle.js';

export interface LocalStoreOptions {
  /** For the operator: events that no caller waits for. */
  readonly log?: (line: string, details?: object) => void;
  /** The same, where nothing is wrong. */
  readonly note?: (line: string, details?: object) => void;
  /** What this process is: shown to other processes that find the store locked. 'command' if not given. */
  readonly role?: HolderRole;
  /** Whether a store is created in a directory that is missing or empty; true if not given. */
  readonly mayCreate?: boolean;
  /** At most this many files are kept open; by default as many as the process's limit allows. */
  readonly maxDescriptors?: number;
  /** For tests: every new object is an overlay, also where nothing is below. */
  readonly makesOnlyOverlays?: boolean;
  /** For tests: when merging of overlays begins after something was given up, milliseconds. */
  readonly mergeDelayMs?: number;
  /** How often the metadata is copied in the background. */
  readonly copies?: CopyTimes;
  /** The disk that the store is on; this machine's if not given. */
  readonly disk?: HostDisk;
}

export class LocalStore implements ObjectStore, CatalogHost, StoreInRecovery, MergerHost {
  readonly location: string;
  readonly identity: string;
  readonly readOnlyBecause: string | undefined;
  readonly metadata: Metadata;
  readonly disk: HostDisk;
  readonly objects: LayeredObjects;
  readonly reads: CachedReads;
  readonly throttle: WriteThrottle;
  readonly references: ReferenceCounts;
  readonly overlays: Overlays;
  readonly makesOnlyOverlays: boolean;
  readonly mergeDelayMs: number | undefined;
  readonly logs: MapLogs;
  readonly catalog: LocalCatalog;
  readonly copies: MetadataCopies;
  readonly state: StoreState;
  readonly #lock: StoreLock;
  /** For the operator: events that no caller waits for. */
  readonly log: (line: string, details?: object) => void;
  /** The same, where nothing is wrong. */
  readonly note: (line: string, details?: object) => void;
  readonly layers: Layers;
  readonly merger: OverlayMerger;
  readonly open = new Map<number, LocalVdi>();
  /** Vids in the names of object files that are kept without any reference: no new VDI or object may have them. */
  keptVids: ReadonlySet<number> = new Set();
  /** This opening has kept or set aside files that no check has reported yet: until then no check removes them. */
  keepsUntold = false;
  /** This opening has created the store, and perhaps its directory; undefined if the store existed. */
  readonly #made: { readonly hasMadeDirectory: boolean } | undefined;
  /** `close` removes what this opening has created, if the store is empty. */
  #isUnwanted = false;
  /** Why the reference counts are wrong: the next open counts them again. */
  #lost: Error | undefined;
  readonly #records: OverlayRemoval;
  /** References that are being given up in the background. */
  readonly #releasing = new Set<Promise<void>>();

  private constructor(
    location: string,
    lock: StoreLock,
    metadata: Metadata,
    layers: Layers,
    shared: SharedByFiles,
    options: LocalStoreOptions & Pick<LocalStore, 'readOnlyBecause'> & Pick<Found, 'isNew' | 'hasMadeDirectory'>,
  ) {
    const { disk } = shared;
    this.disk = disk;
    this.reads = shared.reads;
    this.throttle = shared.throttle;
    this.location = location;
    this.#made = options.isNew ? options : undefined;
    this.readOnlyBecause = options.readOnlyBecause;
    this.identity = disk.realpathSync(location);
    this.#lock = lock;
    this.metadata = metadata;
    this.references = layers.references;
    this.overlays = layers.overlays;
    this.objects = new LayeredObjects(layers);
    this.mergeDelayMs = options.mergeDelayMs;
    this.makesOnlyOverlays = options.makesOnlyOverlays ?? false;
    this.#records = new OverlayRemoval(metadata, this.overlays, (error) => this.backgroundError(error));
    this.log = options.log ?? (() => undefined);
    this.note = options.note ?? (() => undefined);
    this.layers = layers;
    this.merger = new OverlayMerger(this);
    const logFailed = (error: unknown): void => {
      if (isDiskError(error)) metadata.suspectDisk();
      this.log('what is written until the next flush would be lost if this process were killed', { err: error });
    };
    this.logs = new MapLogs(disk, location, logFailed, shared.throttle);
    this.copies = new MetadataCopies(this, options.copies);
    this.catalog = new LocalCatalog(this);
    this.state = {
      isShared: false,
      entries: () => metadata.state(),
      // In a read-only store there is nothing to remember: no client can lose anything to another.
      commit: (changes) => (this.readOnlyBecause === undefined ? metadata.storeState(changes) : Promise.resolve()),
    };
  }

  /**
   * Opens the store in `directory`. With `mayCreate` a store is created where there is none: in a directory that is missing or
   * empty, or has only what an interrupted creation has left. On a read-only filesystem the store can only be read. A creation
   * that fails removes what it has made. Errors (StoreError): NO_STORE, LOCKED (another process has it), FORMAT (a newer
   * sheepgate wrote it), DAMAGED, PERMISSION, NO_SPACE, IO.
   */
  static async open(directory: string, options: LocalStoreOptions = {}): Promise<LocalStore> {
    const { disk = hostDisk } = options;
    const location = path.resolve(directory);
    let found: Found;
    try {
      found = lockDirectory(disk, location, options);
    } catch (error) {
      throw openingError(disk, location, error);
    }
    const { lock, isNew, hasMadeDirectory, isReadOnly } = found;
    const readOnlyBecause = isReadOnly
      ? `store ${location} is on a read-only filesystem: nothing in it can be changed`
      : undefined;
    let metadata: Metadata | undefined;
    try {
      const root = path.join(location, OBJECTS);
      const shared: SharedByFiles = {
        disk,
        reads: new CachedReads(disk, isTmpfs(disk, disk.existsSync(root) ? root : location)),
        throttle: new WriteThrottle(),
        onDiskError: () => metadata?.suspectDisk(),
      };
      const layers = openLayers(shared, location, { ...options, isReadOnly }, () => metadata);
      if (!isReadOnly) openLogFolder(disk, location, isNew);
      const opened = isNew
        ? await Metadata.create(disk, location)
        : await Metadata.open(disk, location, {
            readOnly: isReadOnly,
            mustFit: (found) => mustBeOfCopies(disk, location, found),
          });
      metadata = opened.metadata;
      if (metadata.hasOverlayFormat && !isReadOnly) layers.segments.makeFolder();
      const store = new LocalStore(location, lock, metadata, layers, shared, {
        ...options,
        ...found,
        readOnlyBecause,
      });
      if (readOnlyBecause === undefined) {
        store.copies.begin(metadata.wasRecorded);
        metadata.noter = store.copies;
        await recover(store, opened.clean);
        store.copies.started();
      } else takeAsItIs(store, readOnlyBecause, opened.clean);
      return store;
    } catch (error) {
      await metadata?.close({ clean: false }).catch(() => undefined);
      if (isNew) removeCreation(disk, location, hasMadeDirectory);
      lock.release();
      throw openingError(disk, location, error);
    }
  }

  /** Of the locked file. */
  get fd(): number {
    return this.#lock.fd;
  }

  /** Shown to other processes: this one gives up the store when its running work has ended. */
  announceStop(): void {
    this.#lock.say('stopping daemon');
  }

  get merging(): Merging {
    return this.merger;
  }

  async freeSpace(vdi: LocalVdi): Promise<void> {
    this.catalog.makeRoom();
    this.copies.makeRoom();
    await vdi.flush();
    await this.reclaimed();
  }

  release(keys: readonly number[]): void {
    this.#inBackground(this.#releaseKeys(keys));
  }

  async #releaseKeys(keys: readonly number[]): Promise<void> {
    const slice = new TimeSlice();
    for (const [step, key] of keys.entries()) {
      const room = this.objects.roomToRemove();
      if (room) await room;
      else if (slice.isOver(step)) await slice.next();
      this.#releaseOne(key);
    }
  }

  /**
   * Gives up all references of a map, or those marked in `only`, in the background, and clears entries of `map` on the way.
   * Shared objects come first: another VDI may then have them alone, without waiting until the rest is removed.
   */
  releaseMap(map: Uint32Array, only?: Uint8Array): void {
    this.#inBackground(this.#releaseAll(map, only));
  }

  #inBackground(work: Promise<void>): void {
    const releasing = work
      .catch((error: unknown) => this.backgroundError(error))
      .finally(() => {
        this.#releasing.delete(releasing);
        if (this.overlays.size > 0) this.merger.look();
      });
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
      this.#releaseOne(localObjectKey(owner, idx));
    }
    for (let idx = next(0); idx < end; idx = next(idx + 1)) {
      if (slice.isOver(++step)) await slice.next();
      const owner = map[idx] as number;
      if (owner === 0) continue;
      const room = this.objects.roomToRemove();
      if (room) await room;
      this.#releaseOne(localObjectKey(owner, idx));
    }
  }

  #releaseOne(key: number): void {
    // The reference counts while a read of the object is in flight: no other VDI may begin to write it in place.
    const idle = this.objects.idle(key);
    if (idle) {
      this.#inBackground(idle.then(() => this.#releaseOne(key)));
      return;
    }
    if (this.references.drop(vidOf(key), idxOf(key)) > 0) return;
    if (this.overlays.baseOf(vidOf(key), idxOf(key)) !== 0) this.#records.add(key);
    const below = this.objects.remove(key, (error) => this.backgroundError(error));
    if (below !== undefined) this.#releaseOne(below);
  }

  /** Resolves when the space of all objects given up so far is free. */
  async reclaimed(): Promise<void> {
    while (this.#releasing.size > 0) await Promise.all(this.#releasing);
    await this.objects.removed();
    await this.#records.stored();
  }

  merged(vdi: LocalVdi): Promise<void> {
    return this.merger.left(vdi);
  }

  hasRecordOf(key: number): boolean {
    return this.#records.isStored(key);
  }

  opened(): void {
    if (this.overlays.size > 0) this.merger.look();
  }

  discard(vdi: LocalVdi): void {
    const stored = [vdi.record.vid, ...vdi.supersededVids].map((vid) => this.metadata.record(vid)).find(Boolean);
    for (const temporary of vdi.temporaries) temporary.leaveAllNow();
    try {
      if (stored) this.references.addAll(this.metadata.map(stored));
      this.#goBackTo(vdi);
    } catch (error) {
      // The disk is gone. Nothing is released: the next open counts the references again.
      this.#lost ??= error as Error;
      this.backgroundError(error);
      vdi.abandon();
      return;
    }
    vdi.abandon();
    this.release(vdi.releases);
    this.releaseMap(vdi.map);
  }

  /** Its overlays become what is stored of them, with the references that they hold. */
  #goBackTo(vdi: LocalVdi): void {
    for (const key of vdi.releases) {
      if (!this.overlays.isDetached(key)) continue;
      // What lies over it now has its reference; that one goes back below.
      this.overlays.detach(key, false);
      this.references.add(this.overlays.baseOf(vidOf(key), idxOf(key)), idxOf(key));
    }
    for (const key of vdi.unstoredOverlays) {
      const vid = vidOf(key);
      const idx = idxOf(key);
      const before = this.overlays.reset(key);
      const base = this.overlays.baseOf(vid, idx);
      if (base === before) continue;
      if (base !== vid) this.references.add(base, idx);
      if (before !== vid) this.release([localObjectKey(before, idx)]);
    }
  }

  backgroundError(error: unknown): void {
    if (isDiskError(error)) this.metadata.suspectDisk();
    this.log((error as Error).message, { err: error });
  }

  /** The command that opened the store has failed: a store that this opening has created is removed by `close` if it is empty. */
  takeBackCreation(): void {
    this.#isUnwanted = true;
  }

  /** Flush and close everything; the next open then needs no recovery. */
  async close(): Promise<void> {
    let clean = true;
    let failure: Error | undefined;
    await this.merger.close();
    await this.catalog.dropTemporaries().catch((error: unknown) => (failure = error as Error));
    for (const vdi of this.open.values()) {
      try {
        await vdi.close();
      } catch (error) {
        clean = false;
        failure ??= error as Error;
      }
    }
    this.open.clear();
    await this.reclaimed();
    // A clean store is not searched for unreferenced objects at the next open: none may be back after a power loss.
    await this.objects.syncRemovals().catch((error: unknown) => {
      clean = false;
      failure ??= error as Error;
    });
    await this.objects.close();
    failure ??= this.#lost;
    const isEmpty = failure === undefined && this.metadata.records().length === 0;
    const unwanted = this.#isUnwanted && isEmpty ? this.#made : undefined;
    await this.copies.close({ isClean: clean && this.#lost === undefined && !unwanted });
    await this.metadata
      .close({ clean: clean && this.#lost === undefined })
      .catch((error: unknown) => (failure ??= error as Error));
    if (unwanted && failure === undefined) {
      this.copies.remove();
      removeCreation(this.disk, this.location, unwanted.hasMadeDirectory);
    }
    this.#lock.release();
    if (failure !== undefined) throw failure;
  }

  namesLost(keys: Iterable<number>, error: unknown): void {
    const isLost = this.objects.namesLostWith(keys);
    for (const vdi of this.open.values()) vdi.loseNames(isLost, error);
  }
}
