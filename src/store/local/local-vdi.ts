/**
 * An open VDI of the local store: its data and its map. Owns the order "data, then map, then releases" in which changes become
 * durable (unflushed-changes.ts has them until then). Never overwrites or removes an object that another map may name after a
 * crash.
 */
import type { ExtentSink, ObjectVdi, Switch, ZeroOptions } from '../open-vdi.js';
import type { StoreError } from '../store-error.js';
import type { Awaitable, Unfinished, VdiRecord } from '../vdi-record.js';
import type { MapLog } from './map-log.js';
import type { Metadata } from './metadata.js';
import { OverlayNotes } from './overlay-notes.js';
import type { OverlayWrite } from './overlay-records.js';
import type { Overlays } from './overlays.js';
import { PAGE_ENTRIES, pageOf, pagesOf, type PageWrite } from './map-pages.js';
import { ObjectSyncs, type SyncHost } from './object-syncs.js';
import { isPlanted, type PlantedFault } from './planted-faults.js';
import { idxOf, localObjectKey } from './reference-counts.js';
import { keepFor, type TemporaryVdi } from './temporary-vdi.js';
import { TimeSlice } from './time-slice.js';
import { both, UnflushedChanges, type Batch } from './unflushed-changes.js';

/** Trimmed space is given back after this time at the latest, also if the client never flushes. */
const RELEASE_DELAY_MS = 1000;
/** ... or at once when this many objects wait. */
const RELEASE_BATCH = 256;

/** What a LocalVdi needs of its store. */
export interface LocalVdiHost extends SyncHost {
  readonly metadata: Metadata;
  readonly overlays: Overlays;
  /** For tests: objects that lie over nothing are overlays, too. */
  readonly makesOnlyOverlays: boolean;
  /** A durable map no longer refers to these: drop the references, and remove unreferenced objects in the background. */
  release(keys: readonly number[]): void;
  /** Whether an overlay of this name that is gone may still be stored. */
  hasRecordOf(key: number): boolean;
  /** Resolves when no merge works on this VDI. */
  merged(vdi: LocalVdi): Promise<void>;
  /** The changes of this VDI that are not durable are lost: go back to the durable state. */
  discard(vdi: LocalVdi): void;
  /** A flush that no caller waits for has failed. */
  backgroundError(error: unknown): void;
  /** The disk is full: give back trimmed space, and the space of temporary snapshots without readers. */
  freeSpace(vdi: LocalVdi): Promise<void>;
  readonly catalog: {
    prepareSwitch(vdi: LocalVdi, tag: string, takenAt?: number): Switch;
    prepareTemporary(vdi: LocalVdi, tag: string): Switch;
  };
}

export class LocalVdi implements ObjectVdi {
  readonly kind = 'objects';
  /** An object that is being read keeps its file, and no other process changes the store. */
  readonly objectsMove = false;
  record: VdiRecord;
  map: Uint32Array;
  /** Its temporary snapshots that are alive. */
  temporaries: readonly TemporaryVdi[] = [];
  readonly #host: LocalVdiHost;
  /** The vid of new objects: the record's, or one that is in no snapshot's map. */
  #creationVid: number;
  /** Closed by all users; still open because temporary snapshots depend on its objects. */
  #isIdle = false;
  readonly #changes: UnflushedChanges;
  readonly #syncs: ObjectSyncs;
  /** The second, durable half of a snapshot until it is done. Every later flush waits for it, and starts it if necessary. */
  #pendingMove: (() => Promise<void>) | undefined;
  /** The references of a new snapshot are not counted yet: no object that it may share is exclusive. */
  #isCounting = false;
  #queue: Promise<void> = Promise.resolve();
  #nextFlush: Promise<void> | undefined;
  #releaseTimer: NodeJS.Timeout | undefined;
  readonly #log: MapLog;
  readonly notes: OverlayNotes;
  /** It is being closed: no merge may begin. */
  #isClosing = false;
  /** Objects that were made as whole files where an overlay of the same name was. */
  readonly #replacing = new Set<number>();
  readonly #onClosed: () => void;

  /**
   * `generation`: of the first flush, also in `log`; one more than the stored map has. `onClosed` is called once, when the VDI is
   * no longer open.
   */
  constructor(
    host: LocalVdiHost,
    record: VdiRecord,
    map: Uint32Array,
    generation: number,
    log: MapLog,
    onClosed: () => void,
  ) {
    this.#host = host;
    this.#changes = new UnflushedChanges(generation);
    this.#syncs = new ObjectSyncs(host, this);
    this.record = record;
    this.map = map;
    this.#creationVid = record.vid;
    this.#log = log;
    log.onLong = () => this.#flushUnasked();
    this.#onClosed = onClosed;
    this.notes = new OverlayNotes(
      this.#changes,
      log,
      host.overlays,
      (idx) => this.map[idx] as number,
      (key) => this.#giveUp(key, 'merge drops its base early'),
    );
  }

  get creationVid(): number {
    return this.#creationVid;
  }

  /** New objects get this vid from here on: no map has it. Maps of snapshots may have objects of the older vid. */
  nameAnew(vid: number): void {
    this.#creationVid = vid;
  }

  /** `temporary` gets before-images from here on. New objects get the unused `vid`, so none replaces an object in its map. */
  takeTemporary(temporary: TemporaryVdi, vid: number): void {
    this.temporaries = [...this.temporaries, temporary];
    this.#creationVid = vid;
  }

  async dropTemporary(temporary: TemporaryVdi): Promise<void> {
    this.temporaries = this.temporaries.filter((other) => other !== temporary);
    temporary.drop();
    if (this.#isIdle && this.temporaries.length === 0) await this.close();
  }

  /** The VDI has users again. */
  resume(): void {
    this.#isIdle = false;
    this.#isClosing = false;
  }

  mayMerge(vid: number, idx: number): boolean {
    return !this.#isClosing && this.map[idx] === vid && this.exclusive(idx);
  }

  /** Temporary snapshots refer to the overlay by this map: it waits for their end. */
  collapse(idx: number): boolean {
    const { overlays } = this.#host;
    const owner = this.map[idx] as number;
    if (!this.mayMerge(owner, idx) || this.isKeptAside(idx)) return false;
    const base = overlays.baseOf(owner, idx);
    // The overlay's reference to what is below is the map's from here on.
    overlays.detach(localObjectKey(owner, idx));
    this.map[idx] = base;
    this.#changes.pages.add(Math.floor(idx / PAGE_ENTRIES));
    void this.#log.changed(idx, base);
    this.#giveUp(localObjectKey(owner, idx), 'merge drops its base early');
    return true;
  }

  // `this` is passed on for the share of threads: clones of one image share objects, but each has a share of its own.

  readObject(vid: number, idx: number, offset: number, into: Buffer): Awaitable<void> {
    return this.#host.objects.read(vid, idx, offset, into, this);
  }

  cacheObject(vid: number, idx: number, offset: number, length: number): Awaitable<void> {
    return this.#host.objects.willNeed(vid, idx, offset, length, this);
  }

  objectExtents(vid: number, idx: number, offset: number, length: number, sink: ExtentSink): Awaitable<void> {
    return this.#host.objects.extents(vid, idx, offset, length, sink, this);
  }

  isAllData(vid: number, idx: number): boolean {
    return this.#host.objects.isDense(vid, idx);
  }

  changedBlocks(owner: number, before: number, idx: number, offset: number, length: number, sink: ExtentSink): boolean {
    return this.#host.objects.changes(owner, before, idx, offset, length, sink);
  }

  writeObject(idx: number, offset: number, data: Buffer): Awaitable<void> {
    const owner = this.map[idx] as number;
    const keeping =
      this.temporaries.length > 0 ? keepFor(this.temporaries, owner, idx, offset, data.length) : undefined;
    if (keeping !== undefined) return keeping.then(() => this.#writeOwned(idx, offset, data));
    return this.#writeOwned(idx, offset, data);
  }

  /** Asks the map at each attempt: an overlay may have been merged away while something was waited for. */
  #writeOwned(idx: number, offset: number, data: Buffer): Awaitable<void> {
    const write = (): Awaitable<void> => this.#writeOnce(idx, offset, data);
    return begun(write)?.catch((error: unknown) => this.#afterFreeing(error, async () => write()));
  }

  #writeOnce(idx: number, offset: number, data: Buffer): Awaitable<void> {
    const { objects } = this.#host;
    const owner = this.map[idx] as number;
    if (objects.isOverlay(owner, idx)) return objects.writeOver(owner, idx, offset, data, this.notes, this);
    const later = objects.write(owner, idx, offset, data, this);
    if (later === undefined) this.#noteWritten(owner, idx);
    else return later.then(() => this.#noteWritten(owner, idx));
  }

  /** The reference is counted first: a flush that gives up an older reference to this name must not remove the new object. */
  createObject(idx: number, offset: number, data: Buffer, copyOf: number): Awaitable<void> {
    const vid = this.#creationVid;
    this.#host.references.add(vid, idx);
    if (copyOf === 0 && !this.#host.makesOnlyOverlays) return this.#createWhole(vid, idx, offset, data);
    const { objects } = this.#host;
    if (copyOf === 0 && objects.isOverlay(vid, idx)) this.#replaceOverlay(localObjectKey(vid, idx));
    // Over nothing, all of it is its own.
    const over = copyOf === 0 ? vid : copyOf;
    const size = 2 ** this.record.blockSizeShift;
    const create = (): Awaitable<void> => objects.createOver(vid, idx, over, size, offset, data, this.notes, this);
    return begun(create)
      ?.catch((error: unknown) => this.#afterFreeing(error, async () => create()))
      .catch((error: unknown) => {
        this.#host.release([localObjectKey(vid, idx)]);
        throw error;
      });
  }

  async #createWhole(vid: number, idx: number, offset: number, data: Buffer): Promise<void> {
    const { objects } = this.#host;
    const key = localObjectKey(vid, idx);
    const create = (): Promise<void> =>
      objects.create(key, 2 ** this.record.blockSizeShift, offset, data, undefined, this);
    if (objects.isOverlay(vid, idx)) this.#replaceOverlay(key);
    else if (this.#host.hasRecordOf(key)) this.#replaceRecord(key);
    this.#changes.creating.add(key);
    try {
      await create().catch((error: unknown) => this.#afterFreeing(error, create));
    } catch (error) {
      this.#changes.creating.delete(key);
      this.#host.release([key]);
      throw error;
    }
  }

  /**
   * An object is made whole under the name of an overlay that was trimmed, and that the stored map may refer to still. What the
   * overlay had is not needed, also after a crash; what is below it is, until the next flush.
   */
  #replaceOverlay(key: number): void {
    this.#replaceRecord(key);
    const below = this.#host.objects.remove(key, (error) => this.#host.backgroundError(error));
    if (below !== undefined) this.#giveUp(below);
  }

  /** The record of an overlay of this name goes with the flush that stores the map, and is void in the log. */
  #replaceRecord(key: number): void {
    this.notes.forgets(key);
    this.#replacing.add(idxOf(key));
  }

  async zeroObject(idx: number, offset: number, length: number, { noHole }: ZeroOptions): Promise<void> {
    const { objects } = this.#host;
    const owner = this.map[idx] as number;
    const keeping = keepFor(this.temporaries, owner, idx, offset, length);
    if (keeping !== undefined) await keeping;
    const zero = async (): Promise<void> => {
      const now = this.map[idx] as number;
      if (objects.isOverlay(now, idx)) return objects.zeroOver(now, idx, offset, length, noHole, this.notes, this);
      await objects.zero(now, idx, offset, length, noHole, this);
      this.#noteWritten(now, idx);
    };
    await zero().catch((error: unknown) => this.#afterFreeing(error, zero));
  }

  /** An overlay has only the blocks that are written. */
  readonly copiesBlocks = true;

  canZeroFast({ noHole }: ZeroOptions): boolean {
    return this.#host.objects.canZeroFast(noHole);
  }

  /** On a full disk, trimmed space may not be given back yet: give it back, and try once more. */
  async #afterFreeing(error: unknown, retry: () => Promise<void>): Promise<void> {
    if ((error as StoreError).code !== 'NO_SPACE') throw error;
    await this.#host.freeSpace(this);
    await retry();
  }

  exclusive(idx: number): boolean {
    const owner = this.map[idx] as number;
    // Objects made since the last snapshot are in no other map: with every snapshot the VDI gets a new vid for new objects.
    return owner === this.#creationVid || (!this.#isCounting && this.#host.references.of(owner, idx) === 1);
  }

  isKeptAside(idx: number): boolean {
    const owner = this.map[idx] as number;
    return this.temporaries.some((temporary) => temporary.shares(owner, idx));
  }

  /** In the map log when this returns, or on a slow disk when it resolves. */
  setOwner(idx: number, owner: number): Awaitable<void> {
    const before = this.map[idx] as number;
    for (const temporary of this.temporaries) temporary.leave(idx, before);
    const isOverlay = owner !== 0 && this.#host.objects.isOverlay(owner, idx);
    if (owner !== 0 && !isOverlay) {
      // Marked here and not in createObject, which has counted the reference: a sync skips objects without references.
      const skips = isPlanted('flush skips new objects') && this.#changes.inFlight !== undefined;
      if (!skips) this.#changes.objects.add(localObjectKey(owner, idx));
      this.#changes.created.add(localObjectKey(owner, idx));
      this.#changes.creating.delete(localObjectKey(owner, idx));
    }
    this.map[idx] = owner;
    this.#changes.pages.add(Math.floor(idx / PAGE_ENTRIES));
    if (before !== 0) this.#giveUp(localObjectKey(before, idx));
    if (isOverlay) return this.notes.entered(idx, owner, before);
    if (this.#replacing.delete(idx) && owner !== 0) return this.#log.madeWhole(idx, owner);
    return this.#log.changed(idx, owner);
  }

  /** A reference that a stored map or overlay has: it counts until the next flush is durable. */
  #giveUp(key: number, fault?: PlantedFault): void {
    if (fault !== undefined && isPlanted(fault)) return this.#host.release([key]);
    this.#changes.releases.push(key);
    this.#releaseSoon();
  }

  /** Called when a write has reached the file, not before: a sync in between does not cover the write. */
  #noteWritten(owner: number, idx: number): void {
    this.#changes.objects.add(localObjectKey(owner, idx));
  }

  flush(): Promise<void> {
    // One flush runs, one waits. A call during a flush is served by the next flush, which starts after the call.
    this.#nextFlush ??= this.enqueue(() => {
      this.#nextFlush = undefined;
      return this.#commit();
    });
    return this.#nextFlush;
  }

  async flushObject(idx: number): Promise<void> {
    const page = Math.floor(idx / PAGE_ENTRIES);
    const { objects, overlays } = this.#host;
    const owner = this.map[idx] as number;
    const key = localObjectKey(owner, idx);
    const file = objects.fileOf(key);
    // What is below an overlay is written only where nobody else refers to it.
    const base = overlays.baseOf(owner, idx);
    const mayBeBelow = base !== 0 && base !== owner && this.#host.references.of(base, idx) === 1;
    const { inFlight } = this.#changes;
    const isStored = (of: UnflushedChanges | Batch): boolean =>
      !of.pages.has(page) && !of.overlays.has(key) && !of.created.has(file) && !of.recordChanged;
    const isPlain = isStored(this.#changes) && (inFlight === undefined || isStored(inFlight));
    if (!isPlain || mayBeBelow || this.#pendingMove !== undefined) return this.flush();
    if (!this.#changes.objects.has(file)) return this.flush(); // the flush in flight may be syncing it: wait for that
    this.#syncs.assertIntact();
    // The file stays marked: writes during the sync need another sync.
    await this.#syncs.sync([file]);
  }

  /**
   * Flush and close. After a failure the caller may try again, except after a failed sync: the content in memory cannot be
   * trusted then, and the next open begins with the durable content.
   */
  async close(): Promise<void> {
    this.#isClosing = true;
    await this.#host.merged(this);
    try {
      await this.flush();
    } catch (error) {
      if (this.#syncs.hasFailed) this.#host.discard(this);
      else this.#isClosing = false;
      throw error;
    }
    // The references of this VDI keep the objects alive that temporary snapshots have not adopted yet.
    if (this.temporaries.length > 0) this.#isIdle = true;
    else this.abandon();
  }

  /** Close at once; changes that are not durable are lost. */
  abandon(): void {
    clearTimeout(this.#releaseTimer);
    this.#isIdle = false;
    this.#log.remove();
    this.#onClosed();
  }

  /** References that this VDI holds beside those of its map, one entry each. */
  get releases(): readonly number[] {
    return this.#changes.releases;
  }

  /** Overlays that are not stored as they are in memory. */
  get unstoredOverlays(): Iterable<number> {
    return this.#changes.unstoredOverlays;
  }

  /** Vids under which the metadata still has records that this VDI's `record` has superseded (after a snapshot that failed). */
  get supersededVids(): readonly number[] {
    return this.#changes.supersededVids;
  }

  /** Run `work` after all flushes and commits that were queued before it. */
  enqueue<T>(work: () => Promise<T>): Promise<T> {
    const result = this.#queue.then(work);
    this.#queue = result.then(
      () => undefined,
      () => undefined,
    );
    return result;
  }

  /**
   * The synchronous half of a snapshot: the VDI continues as `record`; its content and map until now are the snapshot's. Returns
   * the durable half, which runs once: when it is called, or before the next flush.
   */
  moveTo(record: VdiRecord, snapshot: VdiRecord): () => Promise<void> {
    if (this.#pendingMove !== undefined) throw new Error('invariant: a snapshot before the last one is durable');
    const frozen = this.map.slice();
    const batch = this.#changes.take(this.record.vid);
    // A flush in flight may fail and give back its changes: they belong to the snapshot, too.
    const flushing = this.#changes.inFlight;
    const pages = new Set([...batch.pages, ...(flushing?.pages ?? [])]);
    const recordWasDurable = !batch.recordChanged && !flushing?.recordChanged;
    this.record = record;
    this.#creationVid = record.vid;
    this.#log.moved(record.vid, this.#changes.generation);
    this.#isCounting = true;
    let run: Promise<void> | undefined;
    const finish = (): Promise<void> => {
      run ??= this.#finishMove(frozen, batch, snapshot, {
        objects: flushing && !flushing.isDurable ? both(flushing.objects, batch.objects) : batch.objects,
        created: flushing && !flushing.isDurable ? both(flushing.created, batch.created) : batch.created,
        overlays: flushing && !flushing.isDurable ? both(flushing.overlays, batch.overlays) : batch.overlays,
        pages: recordWasDurable
          ? [...pages].map((page) => ({ vid: snapshot.vid, page, entries: pageOf(frozen, page) }))
          : pagesOf(snapshot.vid, frozen),
      }).finally(() => {
        this.#pendingMove = undefined;
        this.#changes.moving = [];
      });
      return run;
    };
    this.#pendingMove = finish;
    this.#changes.moving = flushing ? [batch.created, flushing.created] : [batch.created];
    return () => this.enqueue(finish);
  }

  async #finishMove(
    frozen: Uint32Array,
    batch: Batch,
    snapshot: VdiRecord,
    toStore: {
      objects: Iterable<number>;
      created: Iterable<number>;
      overlays: Iterable<number>;
      pages: readonly PageWrite[];
    },
  ): Promise<void> {
    const { record } = this;
    // The snapshot's references are counted before any is released: the VDI gives up references only with a later flush.
    const slice = new TimeSlice();
    for (let idx = 0; idx < frozen.length; idx++) {
      const owner = frozen[idx] as number;
      if (owner !== 0) this.#host.references.add(owner, idx);
      if (slice.isOver(idx)) await slice.next();
    }
    this.#isCounting = false;
    try {
      this.#syncs.assertIntact();
      await this.#syncs.sync(toStore.objects);
      await this.#syncs.syncNames(toStore.created);
      await this.#host.metadata.preparePages(pagesOf(record.vid, frozen));
      // Nobody changes these overlays now: the snapshot has them.
      const overlays = await this.#storeOverlays(toStore.overlays);
      await this.#host.metadata.commit({
        records: [snapshot, record],
        flushed: [{ vid: record.vid, generation: batch.generation }],
        removed: batch.obsolete,
        pages: toStore.pages,
        overlays,
      });
    } catch (error) {
      this.#undoMove(batch, snapshot.vid, frozen);
      throw error;
    }
    this.#host.release(batch.releases);
  }

  /** As if the snapshot had been deleted at once: its references go, and the next flush stores the VDI under its new vid. */
  #undoMove(batch: Batch, snapshotVid: number, frozen: Uint32Array): void {
    this.#changes.giveBack(batch);
    this.#changes.recordChanged = true;
    this.#changes.obsolete.push(snapshotVid);
    for (let page = 0; page * PAGE_ENTRIES < this.map.length; page++) this.#changes.pages.add(page);
    // The stored map of the old vid refers to these until that flush, which then releases them.
    for (let idx = 0; idx < frozen.length; idx++) {
      const owner = frozen[idx] as number;
      if (owner !== 0) this.#changes.releases.push(localObjectKey(owner, idx));
    }
  }

  prepareSwitch(tag: string, takenAt?: number): Switch {
    return this.#host.catalog.prepareSwitch(this, tag, takenAt);
  }

  prepareTemporary(tag: string): Switch {
    return this.#host.catalog.prepareTemporary(this, tag);
  }

  /** Grow or cut the map; the record is stored with it in one transaction. */
  async resize(size: number): Promise<VdiRecord> {
    const record = { ...this.record, size };
    const length = Math.ceil(record.size / 2 ** record.blockSizeShift);
    // The flush makes durable what is logged.
    for (let idx = length; idx < this.map.length; idx++) if (this.map[idx] !== 0) void this.setOwner(idx, 0);
    await this.flush();
    await this.enqueue(() => this.#host.metadata.commit({ records: [record] }));
    const map = new Uint32Array(length);
    map.set(this.map.subarray(0, length));
    this.map = map;
    this.record = record;
    return record;
  }

  async mark(unfinished: Unfinished | undefined): Promise<VdiRecord> {
    const record = { ...this.record, unfinished };
    await this.flush();
    await this.enqueue(() => this.#host.metadata.commit({ records: [record] }));
    this.record = record;
    return record;
  }

  #releaseSoon(): void {
    if (this.#changes.releases.length >= RELEASE_BATCH) {
      clearTimeout(this.#releaseTimer);
      this.#releaseTimer = undefined;
      this.#flushUnasked();
      return;
    }
    this.#releaseTimer ??= setTimeout(() => {
      this.#releaseTimer = undefined;
      if (this.#changes.releases.length > 0) this.#flushUnasked();
    }, RELEASE_DELAY_MS).unref();
  }

  #flushUnasked(): void {
    this.flush().catch((error: unknown) => this.#host.backgroundError(error));
  }

  async #commit(): Promise<void> {
    // The caller of the snapshot gets its failure. The changes that it gave back are flushed here.
    if (this.#pendingMove) await this.#pendingMove().catch(() => undefined);
    this.#syncs.assertIntact();
    const batch = this.#changes.take(this.record.vid);
    const logged = this.#log.flushing(this.#changes.generation);
    const pages = Array.from(batch.pages, (page) => ({ vid: batch.vid, page, entries: pageOf(this.map, page) }));
    const record = this.record;
    if (isPlanted('release before commit')) this.#host.release(batch.releases);
    const flushed = [{ vid: batch.vid, generation: batch.generation }];
    this.#changes.inFlight = batch;
    try {
      if (isPlanted('bitmap before data'))
        await this.#host.metadata.commit({ overlays: await this.#storeOverlays(batch.overlays, batch.before) });
      await this.#syncs.sync(batch.objects);
      await this.#syncs.syncNames(batch.created);
      const overlays = await this.#storeOverlays(batch.overlays, batch.before);
      if (batch.recordChanged) {
        await this.#host.metadata.preparePages(pages);
        await this.#host.metadata.commit({ records: [record], removed: batch.obsolete, flushed, overlays });
      } else if (pages.length > 0 || batch.overlays.size > 0) {
        await this.#host.metadata.commit({ pages, flushed, overlays });
      }
      batch.isDurable = true;
      logged();
    } catch (error) {
      this.#changes.giveBack(batch);
      throw error;
    } finally {
      this.#changes.inFlight = undefined;
    }
    if (!isPlanted('release before commit')) this.#host.release(batch.releases);
  }

  /** `before`: what those were that have changed since. Returns those that are to be stored with the map. */
  #storeOverlays(keys: Iterable<number>, before?: Batch['before']): Promise<Map<number, OverlayWrite | undefined>> {
    const { metadata, overlays } = this.#host;
    return metadata.storeOverlaysAhead(overlays.fromBelow(keys), (key) =>
      before?.has(key) ? before.get(key) : overlays.stored(key),
    );
  }

  /** Names could not be made durable. If unflushed objects of this VDI are among them, no later flush can succeed. */
  loseNames(isLost: (key: number) => boolean, error: unknown): void {
    if (this.#changes.hasUnsyncedName(isLost)) this.#syncs.fail(error);
  }
}

/** A call that fails at once fails like one that fails later. */
function begun(call: () => Awaitable<void>): Awaitable<void> {
  try {
    return call();
  } catch (error) {
    const failure = error as Error;
    return Promise.reject(failure);
  }
}
