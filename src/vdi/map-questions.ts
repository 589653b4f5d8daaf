/**
 * Questions about a VDI that its map answers, with the store's help where an object exists: where data is, what has changed since
 * a snapshot, what to read ahead. Owns the limit on how many objects the store is asked about at a time. Changes nothing.
 */
import type { ExtentSink, ObjectVdi } from '../store/open-vdi.js';
import type { Awaitable } from '../store/vdi-record.js';
import { Admission } from './admission.js';
import { ExtentJoiner, Walk } from './extent-walk.js';
import { LongWork, STEPS_PER_LOOK } from './loop-share.js';
import { endOfDifferent, endOfSame, endOfZeros } from './map-runs.js';
import { Several } from './several.js';
import type { ObjectCalls } from './store-calls.js';

/** Objects of a disk that the store is asked about at a time, by all requests together. */
const PARALLEL_LOOKUPS = 4;
/** A request about more objects than this takes its share of the loop only. */
const FEW_OBJECTS = 64;
/** Objects whose before-images are looked for in one step, and objects that are compared one by one. */
const OVERWRITTEN_STEP = 1024;
const DIFFERENT_STEP = 16_384;

export class MapQuestions {
  readonly #open: ObjectVdi;
  readonly #calls: ObjectCalls;
  readonly #objectSize: number;
  readonly #lookups = new Admission(PARALLEL_LOOKUPS);

  constructor(open: ObjectVdi, calls: ObjectCalls) {
    this.#open = open;
    this.#calls = calls;
    this.#objectSize = 2 ** open.record.blockSizeShift;
  }

  cache(offset: number, length: number): Awaitable<void> {
    if (length <= FEW_OBJECTS * this.#objectSize && this.isHole(offset, length)) return;
    return this.#cacheEach(offset, offset + length);
  }

  async #cacheEach(offset: number, end: number): Promise<void> {
    const work = new LongWork(this.#open);
    const begin = work.begin();
    if (begin) await begin;
    const pending = new Several(PARALLEL_LOOKUPS);
    try {
      for (let at = offset; at < end && !pending.hasFailed;) {
        const idx = Math.floor(at / this.#objectSize);
        if ((this.#open.map[idx] ?? 0) === 0) at = this.endOfHole(idx, end);
        else {
          const turn = this.#lookups.enter();
          if (turn) {
            work.pause();
            await turn;
            work.resume();
          }
          const from = at - idx * this.#objectSize;
          const length = Math.min(this.#objectSize - from, end - at);
          at += length;
          const later = this.#cacheObject(idx, from, length);
          if (later === undefined) this.#lookups.leave();
          else pending.add(later.finally(this.#lookups.leave));
        }
        if (work.isOver()) await work.next();
      }
    } finally {
      work.pause();
      await pending.settled();
    }
    await pending.all();
  }

  #cacheObject(idx: number, from: number, length: number): Awaitable<void> {
    const owner = this.#open.map[idx] ?? 0;
    if (owner === 0) return;
    try {
      return this.#calls.cacheObject(owner, idx, from, length);
    } catch (error) {
      const failure = error as Error;
      return Promise.reject(failure);
    }
  }

  /** At once if no object has to be looked at in the store, and there are few. */
  extents(offset: number, length: number, sink: ExtentSink): Awaitable<void> {
    if (this.#isAllData(offset, length)) {
      sink(offset, length, false);
      return;
    }
    const end = offset + length;
    const work = length <= FEW_OBJECTS * this.#objectSize ? undefined : new LongWork(this.#open);
    const walk = new Walk(new ExtentJoiner(offset, sink), offset, end, work);
    const later = work?.begin() ?? this.#extentsOn(walk);
    if (later !== undefined) return this.#untilDone(later, () => this.#extentsOn(walk));
  }

  /** Whether a range within one object is known to be data: most questions are about such a range. */
  #isAllData(offset: number, length: number): boolean {
    const idx = Math.floor(offset / this.#objectSize);
    if (offset + length > (idx + 1) * this.#objectSize) return false;
    const owner = this.#open.map[idx] ?? 0;
    return owner !== 0 && this.#open.isAllData?.(owner, idx) === true;
  }

  /** Continue the walk. Returns a promise after which to continue; undefined if the walk is done. */
  #extentsOn(walk: Walk): Promise<void> | undefined {
    const { joiner, end, work } = walk;
    work?.resume();
    // The store's answer about an object may have ended early: its rest counts as data.
    joiner.fillUpTo(walk.at);
    while (walk.at < end && !joiner.isStopped) {
      const idx = Math.floor(walk.at / this.#objectSize);
      // The map may have been replaced meanwhile, even by a shorter one.
      const owner = this.#open.map[idx] ?? 0;
      if (owner === 0) {
        const next = this.endOfHole(idx, end);
        joiner.add(next - walk.at, true);
        walk.at = next;
      } else {
        if (!walk.isAdmitted) {
          const turn = this.#lookups.enter();
          walk.isAdmitted = true;
          if (turn) {
            work?.pause();
            return turn;
          }
        }
        const later = this.#lookAt(walk, owner, idx);
        if (later) return later;
      }
      if (work?.isOver()) {
        this.#endLookups(walk);
        return work.next();
      }
    }
    this.#endLookups(walk);
    work?.pause();
    joiner.finish();
    return undefined;
  }

  /** Ask the store about the object at idx, up to the end of the object or of the range. */
  #lookAt(walk: Walk, owner: number, idx: number): Promise<void> | undefined {
    const base = idx * this.#objectSize;
    const { at, joiner } = walk;
    walk.at = Math.min(base + this.#objectSize, walk.end);
    let later: Awaitable<void>;
    try {
      later = this.#calls.objectExtents(owner, idx, at - base, walk.at - at, joiner.addPart);
    } catch (error) {
      this.#endLookups(walk);
      throw error;
    }
    if (later === undefined) {
      joiner.fillUpTo(walk.at);
      return undefined;
    }
    walk.work?.pause();
    walk.isAdmitted = false;
    return later.finally(this.#lookups.leave);
  }

  #endLookups(walk: Walk): void {
    if (!walk.isAdmitted) return;
    walk.isAdmitted = false;
    this.#lookups.leave();
  }

  async #untilDone(later: Promise<void>, goOn: () => Promise<void> | undefined): Promise<void> {
    for (let next: Promise<void> | undefined = later; next !== undefined; next = goOn()) await next;
  }

  /** Where the objects that are not allocated from `idx` on end, at `end` at most. */
  endOfHole(idx: number, end: number): number {
    const last = endOfZeros(this.#open.map, idx, Math.ceil(end / this.#objectSize));
    return Math.min(last * this.#objectSize, end);
  }

  isHole(offset: number, length: number): boolean {
    const { map } = this.#open;
    const last = Math.floor((offset + length - 1) / this.#objectSize);
    const first = Math.floor(offset / this.#objectSize);
    if (last - first >= FEW_OBJECTS) return last < map.length && endOfZeros(map, first, last + 1) > last;
    for (let idx = first; idx <= last; idx++) {
      if (map[idx] !== 0) return false;
    }
    return true;
  }

  /**
   * Objects whose owners differ, and objects that were overwritten under a temporary snapshot. Exact to the object, by the two
   * maps alone; where the store knows more of an object, exact to what it knows.
   */
  changedSince(before: ObjectVdi, offset: number, length: number, sink: ExtentSink): Awaitable<void> {
    if (before.record.blockSizeShift !== this.#open.record.blockSizeShift) {
      throw new Error('invariant: snapshots of one VDI have one object size');
    }
    const walk = new Walk(new ExtentJoiner(offset, sink), offset, offset + length, new LongWork(this.#open));
    const later = walk.work?.begin() ?? this.#changesOn(before, walk);
    if (later !== undefined) return this.#untilDone(later, () => this.#changesOn(before, walk));
  }

  /** Like #extentsOn. */
  #changesOn(base: ObjectVdi, walk: Walk): Promise<void> | undefined {
    const { joiner, end, work } = walk;
    const last = Math.ceil(end / this.#objectSize);
    work?.resume();
    while (walk.at < end && !joiner.isStopped) {
      const idx = Math.floor(walk.at / this.#objectSize);
      const { map } = this.#open;
      const before = base.map;
      const looksForKept = this.#open.nextOverwritten !== undefined || base.nextOverwritten !== undefined;
      const stepEnd = looksForKept ? Math.min(last, idx + OVERWRITTEN_STEP) : last;
      const owner = map[idx] ?? 0;
      const ownerBefore = before[idx] ?? 0;
      const isOther = owner !== ownerBefore;
      if (isOther && owner !== 0 && ownerBefore !== 0 && this.#open.changedBlocks !== undefined) {
        const start = idx * this.#objectSize;
        const to = Math.min(start + this.#objectSize, end);
        const { at } = walk;
        walk.at = to;
        const { addPart } = joiner;
        // What was overwritten under a temporary snapshot is not in the objects that the maps name.
        const isKept =
          this.#open.nextOverwritten?.(idx, idx + 1) === idx || base.nextOverwritten?.(idx, idx + 1) === idx;
        const isKnown = !isKept && this.#open.changedBlocks(owner, ownerBefore, idx, at - start, to - at, addPart);
        if (!isKnown) joiner.add(to - at, true);
        if (work?.isOver(STEPS_PER_LOOK)) return work.next();
        continue;
      }
      let next: number;
      if (isOther) next = endOfDifferent(map, before, idx, Math.min(last, idx + DIFFERENT_STEP));
      else {
        // Objects of a snapshot are not changed in place, except where it keeps before-images.
        next = endOfSame(map, before, idx, stepEnd);
        next = this.#open.nextOverwritten?.(idx, next) ?? next;
        next = base.nextOverwritten?.(idx, next) ?? next;
      }
      const isChanged = isOther || next === idx;
      const to = Math.min(Math.max(next, idx + 1) * this.#objectSize, end);
      joiner.add(to - walk.at, isChanged);
      walk.at = to;
      if (work?.isOver(looksForKept || isOther ? STEPS_PER_LOOK : 1)) return work.next();
    }
    work?.pause();
    joiner.finish();
    return undefined;
  }
}
