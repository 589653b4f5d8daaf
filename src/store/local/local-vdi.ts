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
import { PAGE_ENTRIES, pageOf, pagesOf, type PageWrite } from './map-pages.js';
import { ObjectSyncs, type SyncHost } from './object-syncs.js';
import { isPlanted } from './planted-faults.js';
import { localObjectKey } from './reference-counts.js';
import { keepFor, type TemporaryVdi } from './temporary-vdi.js';
import { TimeSlice } from './time-slice.js';
import { UnflushedChanges, type Batch } from './unflushed-changes.js';

/** Trimmed space is given back after this time at the latest, also if the client never flushes. */
const RELEASE_DELAY_MS = 1000;
/** ... or at once when this many objects wait. */
const RELEASE_BATCH = 256;

/** What a LocalVdi needs of its store. */
export interface LocalVdiHost extends SyncHost {
  readonly metadata: Metadata;
  /** A durable map no longer refers to these: drop the references, and remove unreferenced objects in the background. */
  release(keys: readonly number[]): void;
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
    this.#onClosed = onClosed;
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

  writeObject(idx: number, offset: number, data: Buffer): Awaitable<void> {
    const owner = this.map[idx] as number;
    const keeping =
      this.temporaries.length > 0 ? keepFor(this.temporaries, owner, idx, offset, data.length) : undefined;
    if (keeping !== undefined) return keeping.then(() => this.#writeOwned(owner, idx, offset, data));
    return this.#writeOwned(owner, idx, offset, data);
  }

  #writeOwned(owner: number, idx: number, offset: number, data: Buffer): Awaitable<void> {
    let later: Awaitable<void>;
    try {
      later = this.#host.objects.write(owner, idx, offset, data, this);
    } catch (error) {
      const failure = error as Error;
      later = Promise.reject(failure);
    }
    if (later === undefined) {
      this.#noteWritten(owner, idx);
      return;
    }
    return later
      .catch((error: unknown) =>
        this.#afterFreeing(error, async () => this.#host.objects.write(owner, idx, offset, data, this)),
      )
      .then(() => this.#noteWritten(owner, idx));
  }

  /** The reference is counted first: a flush that gives up an older reference to this name must not remove the new file. */
  async createObject(idx: number, offset: number, data: Buffer, copyOf: number): Promise<void> {
    const { objects, references } = this.#host;
    const vid = this.#creationVid;
    const key = localObjectKey(vid, idx);
    const from = copyOf === 0 ? undefined : localObjectKey(copyOf, idx);
    const create = (): Promise<void> => objects.create(key, 2 ** this.record.blockSizeShift, offset, data, from, this);
    references.add(vid, idx);
    this.#changes.creating.add(key);
    try {
      await create().catch((error: unknown) => this.#afterFreeing(error, create));
    } catch (error) {
      this.#changes.creating.delete(key);
      this.#host.release([key]);
      throw error;
    }
  }

  async zeroObject(idx: number, offset: number, length: number, { noHole }: ZeroOptions): Promise<void> {
    const owner = this.map[idx] as number;
    const keeping = keepFor(this.temporaries, owner, idx, offset, length);
    if (keeping !== undefined) await keeping;
    const zero = (): Promise<void> => this.#host.objects.zero(owner, idx, offset, length, noHole, this);
    await zero().catch((error: unknown) => this.#afterFreeing(error, zero));
    this.#noteWritten(owner, idx);
  }

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
    if (owner !== 0) {
      // Marked here and not in createObject, which has counted the reference: a sync skips objects without references.
      const skips = isPlanted('flush skips new objects') && this.#changes.inFlight !== undefined;
      if (!skips) this.#changes.objects.add(localObjectKey(owner, idx));
      this.#changes.created.add(localObjectKey(owner, idx));
      this.#changes.creating.delete(localObjectKey(owner, idx));
    }
    this.map[idx] = owner;
    const logged = this.#log.changed(idx, owner);
    this.#changes.pages.add(Math.floor(idx / PAGE_ENTRIES));
    if (before !== 0) {
      this.#changes.releases.push(localObjectKey(before, idx));
      this.#releaseSoon();
    }
    return logged;
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
    const key = localObjectKey(this.map[idx] as number, idx);
    const plain =
      this.#pendingMove === undefined &&
      !this.#changes.pages.has(page) &&
      !this.#changes.inFlight?.pages.has(page) &&
      !this.#changes.recordChanged &&
      !this.#changes.created.has(key);
    if (!plain) return this.flush();
    if (!this.#changes.objects.has(key)) return this.flush(); // the flush in flight may be syncing it: wait for that
    this.#syncs.assertIntact();
    // The object stays marked: writes during the sync need another sync.
    await this.#syncs.sync([key]);
  }

  /**
   * Flush and close. After a failure the caller may try again, except after a failed sync: the content in memory cannot be
   * trusted then, and the next open begins with the durable content.
   */
  async close(): Promise<void> {
    try {
      await this.flush();
    } catch (error) {
      if (this.#syncs.hasFailed) this.#host.discard(this);
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
    toStore: { objects: Iterable<number>; created: Iterable<number>; pages: readonly PageWrite[] },
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
      await this.#host.metadata.commit({
        records: [snapshot, record],
        flushed: [{ vid: record.vid, generation: batch.generation }],
        removed: batch.obsolete,
        pages: toStore.pages,
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
      this.flush().catch((error: unknown) => this.#host.backgroundError(error));
      return;
    }
    this.#releaseTimer ??= setTimeout(() => {
      this.#releaseTimer = undefined;
      if (this.#changes.releases.length > 0) this.flush().catch((error: unknown) => this.#host.backgroundError(error));
    }, RELEASE_DELAY_MS).unref();
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
      await this.#syncs.sync(batch.objects);
      await this.#syncs.syncNames(batch.created);
      if (batch.recordChanged) {
        await this.#host.metadata.preparePages(pages);
        await this.#host.metadata.commit({ records: [record], removed: batch.obsolete, flushed });
      } else if (pages.length > 0) {
        await this.#host.metadata.commit({ pages, flushed });
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

  /** Names could not be made durable. If unflushed objects of this VDI are among them, no later flush can succeed. */
  loseNames(isLost: (key: number) => boolean, error: unknown): void {
    if (this.#changes.hasUnsyncedName(isLost)) this.#syncs.fail(error);
  }
}

/** Can be iterated more than once. */
function both(first: Iterable<number>, second: Iterable<number>): Iterable<number> {
  return {
    *[Symbol.iterator]() {
      yield* first;
      yield* second;
    },
  };
}
