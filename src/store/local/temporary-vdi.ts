/**
 * A temporary snapshot of a working VDI, by copy-before-write: the working VDI writes in place, and the before-image of a block is
 * kept when it is first overwritten. A snapshot costs a copy of the map; a later write costs the blocks it touches; dropping the
 * snapshot costs closing a file. It is never stored, and ends with the process.
 *
 * It relies on the working VDI: it calls `keep` before it changes an object in place, and waits for it; it calls `leave` before it
 * gives up the reference to an object; and it makes new objects under a vid that is not in this map (LocalVdi.takeTemporary).
 */
import { allDone } from '../../system/all-done.js';
import type { HostDisk } from '../../system/disk.js';
import { isZeros } from '../../system/zeros.js';
import type { ObjectVdi, ExtentSink } from '../open-vdi.js';
import { ReadOnlyObjects } from '../read-only-objects.js';
import { StoreError } from '../store-error.js';
import type { Awaitable, VdiRecord } from '../vdi-record.js';
import { BeforeImages, KEPT_BLOCK } from './before-images.js';
import type { CachedReads } from './cached-reads.js';
import type { DataObjects } from './data-objects.js';
import { localObjectKey, type ReferenceCounts } from './reference-counts.js';
import { asStoreError } from './store-errors.js';
import { TimeSlice } from './time-slice.js';
import type { WriteThrottle } from './write-throttle.js';

/** Up to this many bytes are kept at once, on the event loop, if the page cache has them; more on the thread pool. */
const MAX_LOOP_KEEP = 128 * 1024;
/** ... in pieces of this size. */
const KEEP_PIECE = 1024 * 1024;
/** The map is copied in pieces of this many entries, 256 KiB, while writers go on. */
const FREEZE_ENTRIES = 2 ** 16;

export interface TemporaryVdiHost {
  readonly disk: HostDisk;
  readonly location: string;
  readonly objects: DataObjects;
  readonly reads: CachedReads;
  readonly throttle: WriteThrottle;
  readonly references: ReferenceCounts;
  /** Give up the references of `map` that are marked in `only`, in the background. */
  releaseMap(map: Uint32Array, only: Uint8Array): void;
  backgroundError(error: unknown): void;
}

export class TemporaryVdi extends ReadOnlyObjects implements ObjectVdi {
  readonly record: VdiRecord;
  /** The working VDI's map at the time of the snapshot. Complete when `frozen` resolves; entries that change are copied earlier. */
  readonly map: Uint32Array;
  /** An object that is being read keeps its file, and no other process changes the store. */
  readonly objectsMove = false;
  readonly #host: TemporaryVdiHost;
  readonly #objectSize: number;
  readonly #images: BeforeImages;
  /** The working VDI's map until all of it is copied. */
  #source: Uint32Array | undefined;
  readonly #isFrozen: boolean[] = [];
  /** idx -> 1: the working VDI has another object now, and the reference to the old one is this snapshot's. */
  readonly #adopted: Uint8Array;
  /**
   * idx -> blocks of the object are being kept on the thread pool. One at a time for each object: a second one could take what is
   * written after the first for a before-image.
   */
  readonly #keeping = new Map<number, Promise<void>>();
  #failure: Error | undefined;
  #isDropped = false;
  #isIdle = false;

  /** `source` is the map of the working VDI as it is now. */
  constructor(host: TemporaryVdiHost, record: VdiRecord, source: Uint32Array) {
    super();
    this.#host = host;
    this.record = record;
    this.#source = source;
    this.map = new Uint32Array(source.length);
    this.#adopted = new Uint8Array(source.length);
    this.#objectSize = 2 ** record.blockSizeShift;
    this.#images = new BeforeImages(host.disk, host.location, host.reads, host.throttle);
  }

  get failure(): Error | undefined {
    return this.#failure;
  }

  /** Copies the rest of the map. The snapshot must not be read before. */
  async frozen(): Promise<void> {
    for (let idx = 0; idx < this.map.length; idx += FREEZE_ENTRIES) {
      this.#freeze(idx);
      await new Promise((resolve) => setImmediate(resolve));
    }
    this.#source = undefined;
  }

  /** The working VDI is about to have another object at idx than `before`. */
  leave(idx: number, before: number): void {
    if (idx >= this.map.length || this.#adopted[idx] === 1) return;
    this.#freeze(idx);
    this.#adopted[idx] = 1;
    if (before !== 0) this.#host.references.add(before, idx);
  }

  /** The working VDI is removed: adopts all objects that both maps have. */
  async leaveAll(): Promise<void> {
    const slice = new TimeSlice();
    for (let idx = 0; idx < this.map.length; idx++) {
      this.leave(idx, this.map[idx] as number);
      if (slice.isOver(idx)) await slice.next();
    }
  }

  /** The same, at once. */
  leaveAllNow(): void {
    for (let idx = 0; idx < this.map.length; idx++) this.leave(idx, this.map[idx] as number);
  }

  /** Whether the working VDI's object at idx, of the vid `owner`, is the same as when the snapshot was taken. */
  shares(owner: number, idx: number): boolean {
    if (idx >= this.map.length) return false;
    this.#freeze(idx);
    return this.map[idx] === owner;
  }

  /**
   * Called before a range of the working VDI's object is changed in place; the change may begin when this is done. Never fails:
   * without room for the before-image the snapshot is lost, and the write continues.
   */
  keep(owner: number, idx: number, offset: number, length: number): Awaitable<void> {
    // An object made since the snapshot, or another VDI's, is not in this map.
    if (!this.shares(owner, idx)) return;
    if (this.#source !== undefined) {
      // Writes from before the snapshot may be in flight. A block is kept when they have ended, not half-way.
      const idle = this.#host.objects.idle(localObjectKey(owner, idx));
      if (idle) return idle.then(() => this.keep(owner, idx, offset, length));
    }
    const base = idx * this.#objectSize;
    const from = base + offset - (offset % KEPT_BLOCK);
    return this.#keepRange(idx, from, base + Math.ceil((offset + length) / KEPT_BLOCK) * KEPT_BLOCK);
  }

  /** Fills `into` from the object as it was. Errors: IO (the snapshot was given up). */
  readObject(owner: number, idx: number, offset: number, into: Buffer): Awaitable<void> {
    if (this.#failure !== undefined) throw this.#failure;
    const [from, to] = this.#blocksOf(idx, offset, into.length);
    if (this.#images.next(from, to, false) === to) return this.#readKept(idx, offset, into);
    const later = this.#host.objects.read(owner, idx, offset, into, this);
    // Blocks that are kept now may have been overwritten before the read: kept data replaces them. All others were read in time.
    if (later === undefined) return this.#readKept(idx, offset, into);
    return later.then(() => this.#readKept(idx, offset, into));
  }

  cacheObject(owner: number, idx: number, offset: number, length: number): Awaitable<void> {
    return this.#host.objects.willNeed(owner, idx, offset, length, this);
  }

  /** Overwritten blocks count as data, even if they were holes. Errors: IO (the snapshot was given up). */
  objectExtents(owner: number, idx: number, offset: number, length: number, sink: ExtentSink): Awaitable<void> {
    if (this.#failure !== undefined) return Promise.reject(this.#failure);
    const base = idx * this.#objectSize;
    return this.#host.objects.extents(
      owner,
      idx,
      offset,
      length,
      (at, size, hole) => {
        if (!hole) return sink(at, size, false);
        // After a failed `keep` the working VDI may have made this hole out of data.
        if (this.#failure !== undefined) throw this.#failure;
        const end = at + size;
        const blocksEnd = base + Math.ceil(end / KEPT_BLOCK) * KEPT_BLOCK;
        for (let kept = false; at < end; kept = !kept) {
          const block = base + at - (at % KEPT_BLOCK);
          const next = Math.min(this.#images.next(block, blocksEnd, !kept) - base, end);
          if (next > at && !sink(at, next - at, !kept)) return false;
          at = Math.max(at, next);
        }
        return true;
      },
      this,
    );
  }

  /** With blocks that the working VDI has added to an overlay since. */
  changedBlocks(owner: number, before: number, idx: number, offset: number, length: number, sink: ExtentSink): boolean {
    if (this.#failure !== undefined) return false;
    return this.#host.objects.changes(owner, before, idx, offset, length, sink);
  }

  nextOverwritten(idx: number, end: number): number {
    if (this.#failure !== undefined) return idx;
    const kept = this.#images.next(idx * this.#objectSize, end * this.#objectSize, true);
    return Math.floor(kept / this.#objectSize);
  }

  /** It has no readers now, and stays until it is dropped. */
  close(): Promise<void> {
    this.#isIdle = true;
    return Promise.resolve();
  }

  /** It has readers again. */
  resume(): void {
    this.#isIdle = false;
  }

  /** The disk is full: a snapshot without readers is given up for those who write now. */
  makeRoom(): void {
    if (this.#isIdle) this.#giveUp(Object.assign(new Error('the disk is full'), { code: 'ENOSPC' }));
  }

  /** Ends the snapshot: no calls of `keep` or `leave` follow. Space is given back in the background. */
  drop(): void {
    if (this.#isDropped) return;
    this.#isDropped = true;
    this.#images.close();
    this.#host.releaseMap(this.map, this.#adopted);
  }

  #freeze(idx: number): void {
    if (this.#source === undefined) return;
    const piece = Math.floor(idx / FREEZE_ENTRIES);
    if (this.#isFrozen[piece]) return;
    this.#isFrozen[piece] = true;
    const from = piece * FREEZE_ENTRIES;
    this.map.set(this.#source.subarray(from, from + FREEZE_ENTRIES), from);
  }

  #blocksOf(idx: number, offset: number, length: number): [number, number] {
    const base = idx * this.#objectSize;
    return [base + offset - (offset % KEPT_BLOCK), base + Math.ceil((offset + length) / KEPT_BLOCK) * KEPT_BLOCK];
  }

  #keepRange(idx: number, from: number, to: number): Awaitable<void> {
    if (this.#failure !== undefined || this.#isDropped || this.#images.next(from, to, false) === to) return;
    const keeping = this.#keeping.get(idx);
    if (keeping) return keeping.then(() => this.#keepRange(idx, from, to));
    if (to - from <= MAX_LOOP_KEEP && this.#keepNow(idx, from, to)) return;
    const later = this.#keepLater(idx, from, to).finally(() => this.#keeping.delete(idx));
    this.#keeping.set(idx, later);
    return later;
  }

  #keepNow(idx: number, from: number, to: number): boolean {
    try {
      for (let at = this.#images.next(from, to, false); at < to; at = this.#images.next(at, to, false)) {
        const end = this.#images.next(at, to, true);
        const data = LOOP_BUFFER.subarray(0, end - at);
        const owner = this.map[idx] as number;
        if (!this.#host.objects.readCached(owner, idx, at - idx * this.#objectSize, data)) return false;
        if (!isZeros(data) && !this.#images.writeNow(at, data)) return false;
        this.#images.mark(at, end);
      }
    } catch (error) {
      this.#giveUp(error);
    }
    return true;
  }

  async #keepLater(idx: number, from: number, to: number): Promise<void> {
    const owner = this.map[idx] as number;
    try {
      const buffer = Buffer.allocUnsafe(Math.min(KEEP_PIECE, to - from));
      for (let at = this.#images.next(from, to, false); at < to; at = this.#images.next(at, to, false)) {
        const end = Math.min(this.#images.next(at, to, true), at + buffer.length);
        const data = buffer.subarray(0, end - at);
        const later = this.#host.objects.read(owner, idx, at - idx * this.#objectSize, data, this);
        if (later !== undefined) await later;
        if (!isZeros(data)) await this.#images.write(at, data);
        this.#images.mark(at, end);
      }
    } catch (error) {
      this.#giveUp(error);
    }
  }

  /** Replaces what was read by the before-images of the range. */
  #readKept(idx: number, offset: number, into: Buffer): Awaitable<void> {
    if (this.#failure !== undefined) throw this.#failure;
    const base = idx * this.#objectSize;
    const [from, to] = this.#blocksOf(idx, offset, into.length);
    const begin = base + offset;
    let pending: Promise<void>[] | undefined;
    for (let at = this.#images.next(from, to, true); at < to; at = this.#images.next(at, to, true)) {
      const end = this.#images.next(at, to, false);
      const first = Math.max(at, begin);
      const last = Math.min(end, begin + into.length);
      const later = this.#images.read(first, into.subarray(first - begin, last - begin));
      if (later !== undefined) (pending ??= []).push(later);
      at = end;
    }
    if (pending) return allDone(pending);
  }

  #giveUp(cause: unknown): void {
    if (this.#isDropped || this.#failure !== undefined) return;
    const { name, tag } = this.record;
    const forClients = `${name}@${tag} is lost: data that was overwritten in ${name} could not be kept; start again with another one`;
    const { code, message, cause: first } = asStoreError(cause, forClients);
    this.#failure = new StoreError(code, message, { cause: first, forClients });
    // An incomplete set of before-images is useless.
    this.#images.close();
    this.#host.backgroundError(this.#failure);
  }
}

/** Calls `keep` of every temporary snapshot, for a range that is about to change. Undefined if the change may begin at once. */
export function keepFor(
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

const LOOP_BUFFER = Buffer.alloc(MAX_LOOP_KEEP);
