/**
 * An open VDI as a flat disk: splits requests into objects and decides, per object, between in place, create and copy.
 * Owns the write gate and the single flight of creations; knows nothing of names, exports or how objects are kept.
 */
import type { ObjectVdi, ReadCount, Switch } from '../store/open-vdi.js';
import { behindEndError, StoreError } from '../store/store-error.js';
import type { Awaitable, VdiRecord } from '../store/vdi-record.js';
import { Admission } from './admission.js';
import { ExtentJoiner, Walk } from './extent-walk.js';
import { FirstWrites, FirstWritesPolicy } from './first-writes.js';
import { LongWork, STEPS_PER_LOOK } from './loop-share.js';
import { endOfDifferent, endOfSame, endOfZeros } from './map-runs.js';
import { Several } from './several.js';
import { isHoleIn, readsAsZeros } from './reads-as-zeros.js';
import { ObjectCalls } from './store-calls.js';
import { objectsOf, type Vdi, type ZeroRequest } from './vdi.js';
import { CLOSED, WriteGate } from './write-gate.js';

/** Object changes one zero, trim or multi-object write has under way at a time. */
const PARALLEL_OBJECTS = 8;
/** Objects of a disk that the store is asked about at a time, for where data is and for reading ahead, by all requests together. */
const PARALLEL_LOOKUPS = 4;
/** Requests about more objects than this take their share of the loop. */
const FEW_OBJECTS = 64;
/** Objects whose kept blocks are looked for in one step, and objects that are compared one by one. */
const OVERWRITTEN_STEP = 1024;
const DIFFERENT_STEP = 16_384;
const NOTHING = Buffer.alloc(0);

export class CopyOnWriteVdi implements Vdi {
  readonly gate = new WriteGate();
  readonly #open: ObjectVdi;
  readonly #calls: ObjectCalls;
  readonly #objectSize: number;
  /** idx -> the creation, copy or removal of that object that is under way. */
  readonly #transitions = new Map<number, Promise<void>>();
  /** idx -> in-place operations under way off the loop; a transition waits until there are none. */
  readonly #inPlace = new Map<number, number>();
  /** idx -> first writes that come together; its transition is under way. */
  readonly #gathering = new Map<number, FirstWrites>();
  readonly #gathers = new FirstWritesPolicy();
  #inPlaceWaiters: { idx: number; wake: () => void }[] = [];
  readonly #lookups = new Admission(PARALLEL_LOOKUPS);
  /** Objects copied because they were shared: what a snapshot costs. */
  copies = 0;

  /** `readOnlyBecause`: of the store; undefined if it can be changed. */
  constructor(open: ObjectVdi, readOnlyBecause: string | undefined) {
    this.#open = open;
    this.#calls = new ObjectCalls(open, readOnlyBecause);
    this.#objectSize = 2 ** open.record.blockSizeShift;
  }

  get record(): VdiRecord {
    return this.#open.record;
  }

  /** The store's side of this VDI; for the catalog. */
  get opened(): ObjectVdi {
    return this.#open;
  }

  /** Of a temporary snapshot: why it can be read no more. */
  get failure(): Error | undefined {
    return this.#open.failure;
  }

  get size(): number {
    return this.#open.record.size;
  }

  /**
   * Fill `into` with the bytes at `offset`. The range must lie within the disk as it was opened. Errors: BEHIND_END if the disk
   * was shrunk since; why it is gone; and the store's.
   */
  read(offset: number, into: Buffer): Awaitable<void> {
    if (offset + into.length > this.size) this.#isOutside('BEHIND_END');
    if (this.#open.noteRead === undefined) return this.#read(offset, into);
    return this.#countedRead(this.#open.noteRead(offset, into.length), offset, into);
  }

  async #countedRead(count: ReadCount, offset: number, into: Buffer): Promise<void> {
    count.inFlight++;
    try {
      await this.#read(offset, into);
    } finally {
      count.inFlight--;
    }
  }

  #read(offset: number, into: Buffer): Awaitable<void> {
    const idx = Math.floor(offset / this.#objectSize);
    const within = offset - idx * this.#objectSize;
    if (within + into.length <= this.#objectSize) return this.#readObject(idx, within, into);
    let later: Promise<void>[] | undefined;
    for (let done = 0; done < into.length;) {
      const at = offset + done;
      const part = Math.floor(at / this.#objectSize);
      const from = at - part * this.#objectSize;
      const length = Math.min(this.#objectSize - from, into.length - done);
      const result = this.#readObject(part, from, into.subarray(done, done + length));
      if (result !== undefined) (later ??= []).push(result);
      done += length;
    }
    if (later) return allDone(later);
  }

  /** With `fua`, durable when it answers. Errors: StoreError, NO_SPACE among them. */
  write(offset: number, data: Buffer, fua: boolean): Awaitable<void> {
    const epoch = this.gate.tryEnter();
    if (epoch === CLOSED) return this.#whenOpen((later) => this.#writeInside(later, offset, data, fua));
    return this.#writeInside(epoch, offset, data, fua);
  }

  /**
   * Make the range zeros; unless `noHole`, its space is given back, and what is zeros already in objects that a snapshot
   * shares is left as it is. Costs only what is allocated. With `fastZero` it fails (StoreError SLOW) before anything has
   * changed where objects would have to be copied or zeros written.
   */
  zero(offset: number, length: number, options: ZeroRequest): Awaitable<void> {
    const epoch = this.gate.tryEnter();
    if (epoch === CLOSED) return this.#whenOpen((later) => this.#zeroEntered(later, offset, length, options));
    return this.#zeroEntered(epoch, offset, length, options);
  }

  /** Give the range's space back; it reads as zeros. */
  trim(offset: number, length: number, fua: boolean): Awaitable<void> {
    return this.zero(offset, length, { noHole: false, fua });
  }

  /** Everything answered before is durable when it resolves. */
  flush(): Awaitable<void> {
    if (this.record.isSnapshot) return;
    return this.#open.flush();
  }

  cache(offset: number, length: number): Awaitable<void> {
    if (length <= FEW_OBJECTS * this.#objectSize && this.isHole(offset, length)) return;
    return this.#cacheEach(offset, offset + length);
  }

  async #cacheEach(offset: number, end: number): Promise<void> {
    const work = new LongWork(this);
    const begin = work.begin();
    if (begin) await begin;
    const pending = new Several(PARALLEL_LOOKUPS);
    try {
      for (let at = offset; at < end && !pending.hasFailed;) {
        const idx = Math.floor(at / this.#objectSize);
        if ((this.#open.map[idx] ?? 0) === 0) at = this.#endOfHole(idx, end);
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
      return Promise.reject(error);
    }
  }

  /**
   * Data and holes of the range in ascending order, neighbours joined. `sink` returns false to stop. Each object is told of
   * as it is when its turn comes, never as it was before the question. Answers at once if nothing has to be asked of the
   * filesystem and it does not take long.
   */
  extents(
    offset: number,
    length: number,
    sink: (offset: number, length: number, hole: boolean) => boolean,
  ): Awaitable<void> {
    if (offset + length > this.size) this.#isOutside('BEHIND_END');
    if (this.#isAllData(offset, length)) {
      sink(offset, length, false);
      return;
    }
    const end = offset + length;
    const work = length <= FEW_OBJECTS * this.#objectSize ? undefined : new LongWork(this);
    const walk = new Walk(new ExtentJoiner(offset, sink), offset, end, work);
    const later = work?.begin() ?? this.#extentsOn(walk);
    if (later !== undefined) return this.#untilDone(later, () => this.#extentsOn(walk));
  }

  /** Whether a range within one object is known to be data: what most reads are about. */
  #isAllData(offset: number, length: number): boolean {
    const idx = Math.floor(offset / this.#objectSize);
    if (offset + length > (idx + 1) * this.#objectSize) return false;
    const owner = this.#open.map[idx] ?? 0;
    return owner !== 0 && this.#open.isAllData?.(owner, idx) === true;
  }

  /** Go on with it. Returns what has to be awaited before it can be gone on with again; undefined if it is done. */
  #extentsOn(walk: Walk): Promise<void> | undefined {
    const { joiner, end, work } = walk;
    work?.resume();
    // Of an object that was looked at: what the store has not told.
    joiner.fillUpTo(walk.at);
    while (walk.at < end && !joiner.isStopped) {
      const idx = Math.floor(walk.at / this.#objectSize);
      // The map may be another one by now, and a shorter one.
      const owner = this.#open.map[idx] ?? 0;
      if (owner === 0) {
        const next = this.#endOfHole(idx, end);
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

  /** What the store says of the rest of the object at idx, or of as much of it as is asked about. */
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
  #endOfHole(idx: number, end: number): number {
    const last = endOfZeros(this.#open.map, idx, Math.ceil(end / this.#objectSize));
    return Math.min(last * this.#objectSize, end);
  }

  /** Whether no object of the range is allocated: then it reads as zeros. Asks the map only, never the store. */
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
   * Where this VDI may differ from `base`, a snapshot of the same line: objects that are not the same ones. Exact to the
   * object, from the two maps alone; neighbours joined, `sink` returns false to stop. Answers at once if it does not take
   * long.
   */
  changedSince(
    base: Vdi,
    offset: number,
    length: number,
    sink: (offset: number, length: number, changed: boolean) => boolean,
  ): Awaitable<void> {
    const before = objectsOf(base);
    if (before.record.blockSizeShift !== this.record.blockSizeShift) {
      throw new Error('invariant: snapshots of one VDI have one object size');
    }
    const walk = new Walk(new ExtentJoiner(offset, sink), offset, offset + length, new LongWork(this));
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
      const isOther = (map[idx] ?? 0) !== (before[idx] ?? 0);
      let next: number;
      if (isOther) next = endOfDifferent(map, before, idx, Math.min(last, idx + DIFFERENT_STEP));
      else {
        // While a snapshot is there nobody writes its objects in place, unless what was there is kept aside for it.
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

  async take(change: Switch): Promise<VdiRecord> {
    if (change.needsNoPause) {
      // Nothing is awaited between the two: a write that enters the gate after the switch must not be in the snapshot.
      void change.switchOver();
      await this.gate.newEpoch();
      return change.finish();
    }
    // Most of what is dirty goes to disk before the writers are held, so little is left for after.
    await this.flush();
    await this.withWritersHeld(async () => change.switchOver());
    return change.finish();
  }

  async withWritersHeld<T>(work: () => Promise<T>): Promise<T> {
    await this.gate.close();
    try {
      return await work();
    } finally {
      this.gate.open();
    }
  }

  close(): Promise<void> {
    return this.#calls.close();
  }

  #readObject(idx: number, within: number, into: Buffer): Awaitable<void> {
    const owner = this.#open.map[idx] ?? this.#isOutside('BEHIND_END');
    if (owner === 0) {
      into.fill(0);
      return;
    }
    const later = this.#calls.readObject(owner, idx, within, into);
    if (later === undefined || !this.#open.objectsMove) return later;
    return this.#readAgainIfGone(later, owner, idx, within, into);
  }

  /** What took the object's place, if it went while it was read. */
  async #readAgainIfGone(
    later: Promise<void>,
    owner: number,
    idx: number,
    within: number,
    into: Buffer,
  ): Promise<void> {
    try {
      await later;
    } catch (error) {
      if ((error as StoreError).code !== 'GONE') throw error;
      // Its entry may be on its way to the map; and with the map as it was, it may have gone and come again.
      await this.#transitions.get(idx)?.catch(() => undefined);
      if (this.#open.map[idx] === owner) await this.#calls.readObject(owner, idx, within, into);
      else await this.#readObject(idx, within, into);
    }
  }

  /** Do it again if the VDI has got a new map meanwhile: what was decided on the old one does not hold. */
  async #againIfMoved(later: Promise<void>, again: () => Awaitable<void>): Promise<void> {
    try {
      await later;
    } catch (error) {
      if ((error as StoreError).code !== 'MOVED') throw error;
      await again();
    }
  }

  async #whenOpen(inside: (epoch: number) => Awaitable<void>): Promise<void> {
    const epoch = await this.gate.enter();
    await inside(epoch);
  }

  /** Only where others may change what is open. */
  #isOutside(code: 'BEHIND_END' | 'NO_SPACE'): never {
    throw this.#open.failure ?? behindEndError(this.record, code);
  }

  #writeInside(epoch: number, offset: number, data: Buffer, fua: boolean): Awaitable<void> {
    const idx = Math.floor(offset / this.#objectSize);
    const within = offset - idx * this.#objectSize;
    let later: Awaitable<void>;
    try {
      if (offset + data.length > this.size) this.#isOutside('NO_SPACE');
      later =
        within + data.length <= this.#objectSize
          ? this.#writeObject(idx, within, data, epoch)
          : this.#writeMany(offset, data, epoch);
    } catch (error) {
      this.gate.leave(epoch);
      throw error;
    }
    if (later !== undefined) return this.#leaveAfter(epoch, later, offset, data.length, fua);
    this.gate.leave(epoch);
    if (fua) return this.#makeDurable(offset, data.length);
  }

  async #leaveAfter(epoch: number, later: Promise<void>, offset: number, length: number, fua: boolean): Promise<void> {
    try {
      await later;
    } finally {
      this.gate.leave(epoch);
    }
    // Outside the gate: a snapshot need not wait for the disk.
    if (fua) await this.#makeDurable(offset, length);
  }

  #makeDurable(offset: number, length: number): Promise<void> {
    const first = Math.floor(offset / this.#objectSize);
    const last = Math.floor((offset + length - 1) / this.#objectSize);
    return first === last ? this.#open.flushObject(first) : this.#open.flush();
  }

  async #writeMany(offset: number, data: Buffer, epoch: number): Promise<void> {
    const parts: (() => Awaitable<void>)[] = [];
    this.#eachPart(offset, data.length, (idx, from, length, done) => {
      parts.push(() => this.#writeObject(idx, from, data.subarray(done, done + length), epoch));
    });
    await inParallel(parts);
  }

  /** `epoch`: the gate's, of a write that comes right from there; CLOSED of one that is done once more. */
  #writeObject(idx: number, within: number, data: Buffer, epoch = CLOSED): Awaitable<void> {
    if (this.#transitions.size > 0) {
      const transition = this.#transitions.get(idx);
      if (transition) {
        const gathered = this.#gathering.get(idx);
        if (gathered?.join(within, data, epoch))
          return this.#orAgain(gathered.done as Promise<void>, idx, within, data);
        return this.#afterTransition(transition, () => this.#writeObject(idx, within, data));
      }
    }
    const owner = this.#open.map[idx] ?? 0;
    if (owner !== 0 && this.#open.exclusive(idx)) {
      const later = this.#calls.writeObject(idx, within, data);
      if (later === undefined) return;
      return this.#orAgain(this.#trackInPlace(idx, later), idx, within, data);
    }
    if (owner !== 0 && epoch !== CLOSED && this.#isWorthGathering(within, data.length)) {
      return this.#orAgain(this.#gather(idx, data, epoch), idx, within, data);
    }
    return this.#orAgain(
      this.#transition(idx, () => this.#create(idx, within, data)),
      idx,
      within,
      data,
    );
  }

  /** A write that is done once more if the VDI has gone on as another meanwhile. */
  #orAgain(later: Promise<void>, idx: number, within: number, data: Buffer): Promise<void> {
    if (!this.#open.objectsMove) return later;
    return this.#againIfMoved(later, () => this.#writeObject(idx, within, data));
  }

  #isWorthGathering(within: number, length: number): boolean {
    return this.#open.gathersFirstWrites === true && this.#gathers.isWorthIt(within, length, this.#objectSize);
  }

  /** Make the object at idx with `data` and what follows on it at once. */
  #gather(idx: number, data: Buffer, epoch: number): Promise<void> {
    const gathered = new FirstWrites(data, epoch, this.#objectSize, () => this.gate.isAwaited(epoch));
    this.#gathering.set(idx, gathered);
    gathered.done = this.#transition(idx, async () => {
      const all = await gathered.whole();
      this.#gathering.delete(idx);
      this.#gathers.learn(gathered.count);
      await this.#create(idx, 0, all);
    });
    return gathered.done;
  }

  async #create(idx: number, within: number, data: Buffer): Promise<void> {
    const owner = this.#open.map[idx] ?? 0;
    const isWhole = data.length === this.#objectSize;
    const isCopy = owner !== 0 && !isWhole;
    await this.#calls.makeObject(idx, within, data, isCopy ? owner : 0);
    if (isCopy) this.copies++;
  }

  #zeroEntered(epoch: number, offset: number, length: number, options: ZeroRequest): Awaitable<void> {
    if (offset + length > this.size) {
      this.gate.leave(epoch);
      this.#isOutside('NO_SPACE');
    }
    if (options.fastZero) return this.#zeroIfFast(epoch, offset, length, options);
    return this.#zeroInside(epoch, offset, length, options);
  }

  /** Decided inside the gate, and begun: a snapshot that comes later may make it slow, but not wrong. */
  async #zeroIfFast(epoch: number, offset: number, length: number, options: ZeroRequest): Promise<void> {
    try {
      if (!(await this.#canZeroFast(offset, length, options.noHole))) {
        throw new StoreError('SLOW', `zeroing ${length} bytes at ${offset} needs data to be copied or written`);
      }
    } catch (error) {
      this.gate.leave(epoch);
      throw error;
    }
    await this.#zeroInside(epoch, offset, length, options);
  }

  #zeroInside(epoch: number, offset: number, length: number, options: ZeroRequest): Awaitable<void> {
    const idx = Math.floor(offset / this.#objectSize);
    const within = offset - idx * this.#objectSize;
    if (within + length > this.#objectSize) return this.#zeroMany(epoch, offset, length, options);
    let later: Awaitable<void>;
    try {
      later = this.#zeroObject(idx, within, length, options.noHole);
    } catch (error) {
      this.gate.leave(epoch);
      throw error;
    }
    if (later !== undefined) return this.#leaveAfter(epoch, later, offset, length, options.fua);
    this.gate.leave(epoch);
    if (options.fua) return this.#open.flush();
  }

  /**
   * A range of many objects. What is not allocated is zeros already: an empty 4 TiB disk is trimmed by looking at its map.
   * Between two objects it makes way for a snapshot: that may have the one zeroed and the other not, as long as this is not answered.
   */
  async #zeroMany(epoch: number, offset: number, length: number, options: ZeroRequest): Promise<void> {
    const { noHole } = options;
    const end = offset + length;
    const work = new LongWork(this);
    const pending = new Several(PARALLEL_OBJECTS);
    let isInside = true;
    try {
      const begin = work.begin();
      if (begin) await begin;
      for (let at = offset; at < end && !pending.hasFailed;) {
        const idx = Math.floor(at / this.#objectSize);
        const within = at - idx * this.#objectSize;
        const part = Math.min(this.#objectSize - within, end - at);
        if ((this.#open.map[idx] ?? 0) === 0 && !noHole && !this.#transitions.has(idx)) {
          at = this.#endOfIdleHole(idx, end);
        } else {
          const later = this.#zeroObject(idx, within, part, noHole);
          at += part;
          if (later !== undefined) pending.add(later);
          if (pending.isFull) {
            work.pause();
            await pending.one();
            work.resume();
          }
        }
        if (work.isOver()) await work.next();
        if (this.gate.isAwaited(epoch)) {
          work.pause();
          await pending.settled();
          this.gate.leave(epoch);
          isInside = false;
          epoch = await this.gate.enter();
          isInside = true;
          work.resume();
        }
      }
    } catch (error) {
      pending.fail(error);
    }
    work.pause();
    await pending.settled();
    if (isInside) this.gate.leave(epoch);
    await pending.all();
    if (options.fua) await this.#open.flush();
  }

  /** The same, but no further than the next object that is being made or removed. */
  #endOfIdleHole(idx: number, end: number): number {
    let to = this.#endOfHole(idx, end);
    for (const other of this.#transitions.keys()) if (other > idx) to = Math.min(to, other * this.#objectSize);
    return to;
  }

  /**
   * Only the first and the last object of the range can be changed in part. Those may have to be copied; that the store has
   * to write zeros is the same for all.
   */
  async #canZeroFast(offset: number, length: number, noHole: boolean): Promise<boolean> {
    const end = offset + length;
    const first = Math.floor(offset / this.#objectSize);
    const last = Math.floor((end - 1) / this.#objectSize);
    const canStore = this.#open.canZeroFast({ noHole });
    if (noHole && !canStore) return false;
    for (const idx of first === last ? [first] : [first, last]) {
      const from = Math.max(offset - idx * this.#objectSize, 0);
      const partLength = Math.min(end - idx * this.#objectSize, this.#objectSize) - from;
      const owner = this.#open.map[idx] ?? 0;
      if (owner === 0 || this.#isWhole(idx, from, partLength)) continue;
      if (this.#open.exclusive(idx)) {
        if (!canStore) return false;
      } else if (noHole || !(await isHoleIn(this.#calls, owner, idx, from, partLength))) return false;
    }
    return true;
  }

  /** The disk's last object may end before the object does; what lies behind the end is nobody's. */
  #isWhole(idx: number, within: number, length: number): boolean {
    return within === 0 && length === Math.min(this.#objectSize, this.size - idx * this.#objectSize);
  }

  /** `looked`: the owner whose object was looked at already and is not zeros there; 0 for none. */
  #zeroObject(idx: number, within: number, length: number, noHole: boolean, looked = 0): Awaitable<void> {
    const later = this.#zeroObjectOnce(idx, within, length, noHole, looked);
    if (later === undefined || !this.#open.objectsMove) return later;
    return this.#againIfMoved(later, () => this.#zeroObject(idx, within, length, noHole));
  }

  #zeroObjectOnce(idx: number, within: number, length: number, noHole: boolean, looked: number): Awaitable<void> {
    const transition = this.#transitions.get(idx);
    if (transition) return this.#afterTransition(transition, () => this.#zeroObject(idx, within, length, noHole));
    const owner = this.#open.map[idx] ?? 0;
    const whole = this.#isWhole(idx, within, length);
    if (!noHole) {
      if (owner === 0) return;
      if (owner !== looked && this.#isRelied(idx)) return this.#zeroUnlessZeros(idx, within, length, owner);
      if (whole) return this.#giveUp(idx);
    }
    if (owner !== 0 && this.#open.exclusive(idx)) {
      const later = this.#calls.zeroObject(idx, within, length, { noHole });
      return later === undefined ? undefined : this.#trackInPlace(idx, later);
    }
    return this.#createThenZero(idx, within, length, noHole, whole);
  }

  /** The object at idx is not ours any more. */
  #giveUp(idx: number): Awaitable<void> {
    if (this.#inPlace.has(idx)) return this.#transition(idx, async () => this.#calls.dropObject(idx));
    const later = this.#calls.dropObject(idx);
    if (later !== undefined) return this.#transition(idx, () => later);
  }

  /** Somebody else's snapshot relies on the object at idx: changing it costs a copy, and makes it count as changed. */
  #isRelied(idx: number): boolean {
    return !this.#open.exclusive(idx) || this.#open.isKeptAside?.(idx) === true;
  }

  /**
   * A range that is zeros in `owner`'s object is done: it came to be so before this, or while this was under way. Whatever
   * is written meanwhile, there or into a copy, counts as having come later.
   */
  async #zeroUnlessZeros(idx: number, within: number, length: number, owner: number): Promise<void> {
    let isDone = false;
    try {
      isDone = await readsAsZeros(this.#calls, owner, idx, within, length);
    } catch {
      // What cannot be read can still be given up; and if it has to be copied, the copying tells.
    }
    if (!isDone) await this.#zeroObject(idx, within, length, false, owner);
  }

  async #createThenZero(idx: number, within: number, length: number, noHole: boolean, whole: boolean): Promise<void> {
    if (whole && this.#open.map[idx] !== 0) {
      await this.#transition(idx, async () => this.#calls.dropObject(idx));
    }
    if (!this.#transitions.has(idx) && (this.#open.map[idx] === 0 || !this.#open.exclusive(idx))) {
      await this.#transition(idx, () => this.#create(idx, 0, NOTHING));
    }
    await this.#zeroObject(idx, within, length, noHole);
  }

  /** Run a change of ownership alone for its idx: after what is under way in place, with everybody else waiting. */
  #transition(idx: number, change: () => Promise<void>): Promise<void> {
    const run = async (): Promise<void> => {
      try {
        if (this.#inPlace.has(idx)) {
          await new Promise<void>((wake) => this.#inPlaceWaiters.push({ idx, wake }));
        }
        await change();
      } finally {
        this.#transitions.delete(idx);
      }
    };
    const transition = run();
    // `run` may have finished its synchronous part only: it is registered before anything else can look
    this.#transitions.set(idx, transition);
    return transition;
  }

  async #afterTransition(transition: Promise<void>, retry: () => Awaitable<void>): Promise<void> {
    // Its failure belongs to whoever started it; we try for ourselves.
    await transition.catch(() => undefined);
    await retry();
  }

  async #trackInPlace(idx: number, later: Promise<void>): Promise<void> {
    this.#inPlace.set(idx, (this.#inPlace.get(idx) ?? 0) + 1);
    try {
      await later;
    } finally {
      const left = (this.#inPlace.get(idx) ?? 1) - 1;
      if (left > 0) this.#inPlace.set(idx, left);
      else {
        this.#inPlace.delete(idx);
        const woken = this.#inPlaceWaiters.filter((waiter) => waiter.idx === idx);
        if (woken.length > 0) {
          this.#inPlaceWaiters = this.#inPlaceWaiters.filter((waiter) => waiter.idx !== idx);
          for (const { wake } of woken) wake();
        }
      }
    }
  }

  #eachPart(
    offset: number,
    length: number,
    visit: (idx: number, within: number, length: number, done: number) => void,
  ): void {
    for (let done = 0; done < length;) {
      const at = offset + done;
      const idx = Math.floor(at / this.#objectSize);
      const within = at - idx * this.#objectSize;
      const part = Math.min(this.#objectSize - within, length - done);
      visit(idx, within, part, done);
      done += part;
    }
  }
}

/** All of them, also when one fails: nothing of a request may still be running when it is answered. */
async function allDone(parts: readonly Promise<void>[]): Promise<void> {
  const results = await Promise.allSettled(parts);
  for (const result of results) if (result.status === 'rejected') throw result.reason;
}

async function inParallel(parts: readonly (() => Awaitable<void>)[]): Promise<void> {
  let next = 0;
  let failure: { error: unknown } | undefined;
  const worker = async (): Promise<void> => {
    while (next < parts.length && !failure) {
      const part = parts[next++] as () => Awaitable<void>;
      try {
        const later = part();
        if (later !== undefined) await later;
      } catch (error) {
        failure ??= { error };
      }
    }
  };
  await Promise.all(Array.from({ length: Math.min(PARALLEL_OBJECTS, parts.length) }, worker));
  if (failure) throw failure.error;
}
