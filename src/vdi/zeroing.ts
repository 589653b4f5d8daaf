/**
 * Zeroing and trimming of a VDI that consists of objects: whole objects are dropped, parts are zeroed in place, and an object
 * that a snapshot shares is copied only if the range is not zeros already. Enters nothing itself: the caller has entered the
 * gate, and a long request leaves it in between for a snapshot that waits.
 */
import type { ObjectVdi } from '../store/open-vdi.js';
import { behindEndError, StoreError } from '../store/store-error.js';
import type { Awaitable } from '../store/vdi-record.js';
import { LongWork } from './loop-share.js';
import type { MapQuestions } from './map-questions.js';
import type { ObjectChanges } from './object-changes.js';
import { isHoleIn, readsAsZeros } from './reads-as-zeros.js';
import { PARALLEL_OBJECTS, Several } from './several.js';
import type { ObjectCalls } from './store-calls.js';
import type { ZeroRequest } from './vdi.js';

const NOTHING = Buffer.alloc(0);

export class Zeroing {
  readonly #open: ObjectVdi;
  readonly #calls: ObjectCalls;
  readonly #changes: ObjectChanges;
  readonly #questions: MapQuestions;
  /** Make the object at idx, or copy it, with data laid over. */
  readonly #create: (idx: number, within: number, data: Buffer) => Awaitable<void>;
  readonly #objectSize: number;

  constructor(
    open: ObjectVdi,
    parts: {
      readonly calls: ObjectCalls;
      readonly changes: ObjectChanges;
      readonly questions: MapQuestions;
      readonly create: (idx: number, within: number, data: Buffer) => Awaitable<void>;
    },
  ) {
    this.#open = open;
    this.#calls = parts.calls;
    this.#changes = parts.changes;
    this.#questions = parts.questions;
    this.#create = parts.create;
    this.#objectSize = 2 ** open.record.blockSizeShift;
  }

  /** The request has entered the gate in `epoch`, and leaves it here, also on failure. */
  zero(epoch: number, offset: number, length: number, options: ZeroRequest): Awaitable<void> {
    if (offset + length > this.#open.record.size) {
      this.#changes.gate.leave(epoch);
      throw this.#open.failure ?? behindEndError(this.#open.record, 'NO_SPACE');
    }
    if (options.fastZero) return this.#zeroIfFast(epoch, offset, length, options);
    return this.#zeroInside(epoch, offset, length, options);
  }

  /** Decided and begun inside the gate: a snapshot that comes later may make it slow, but not wrong. */
  async #zeroIfFast(epoch: number, offset: number, length: number, options: ZeroRequest): Promise<void> {
    try {
      if (!(await this.#canZeroFast(offset, length, options.noHole))) {
        throw new StoreError('SLOW', `zeroing ${length} bytes at ${offset} needs data to be copied or written`);
      }
    } catch (error) {
      this.#changes.gate.leave(epoch);
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
      this.#changes.gate.leave(epoch);
      throw error;
    }
    if (later !== undefined) return this.#changes.leaveAfter(epoch, later, offset, length, options.fua);
    this.#changes.gate.leave(epoch);
    if (options.fua) return this.#open.flush();
  }

  /**
   * A range of many objects. Objects that are not allocated are zeros already: an empty disk of 4 TiB is trimmed by its map
   * alone. Between two objects it leaves the gate for a waiting snapshot. In that snapshot the first object is zeroed and the
   * second is not: allowed, because the request is not answered yet.
   */
  async #zeroMany(epoch: number, offset: number, length: number, options: ZeroRequest): Promise<void> {
    const { noHole } = options;
    const end = offset + length;
    const work = new LongWork(this.#open);
    const pending = new Several(PARALLEL_OBJECTS);
    let isInside = true;
    try {
      const begin = work.begin();
      if (begin) await begin;
      for (let at = offset; at < end && !pending.hasFailed;) {
        const idx = Math.floor(at / this.#objectSize);
        const within = at - idx * this.#objectSize;
        const part = Math.min(this.#objectSize - within, end - at);
        if ((this.#open.map[idx] ?? 0) === 0 && !noHole && this.#changes.running(idx) === undefined) {
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
        if (this.#changes.gate.isAwaited(epoch)) {
          work.pause();
          await pending.settled();
          this.#changes.gate.leave(epoch);
          isInside = false;
          epoch = await this.#changes.gate.enter();
          isInside = true;
          work.resume();
        }
      }
    } catch (error) {
      pending.fail(error);
    }
    work.pause();
    await pending.settled();
    if (isInside) this.#changes.gate.leave(epoch);
    await pending.all();
    if (options.fua) await this.#open.flush();
  }

  /** The end of the hole at idx, but no further than the next object that is being made or dropped. */
  #endOfIdleHole(idx: number, end: number): number {
    let to = this.#questions.endOfHole(idx, end);
    for (const other of this.#changes.changing) if (other > idx) to = Math.min(to, other * this.#objectSize);
    return to;
  }

  /**
   * Only the first and the last object of the range can be changed in part, and may have to be copied. Whether the store has to
   * write zeros is the same for all objects.
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
      if (this.#open.exclusive(idx) || this.#open.copiesBlocks === true) {
        if (!canStore) return false;
      } else if (noHole || !(await isHoleIn(this.#calls, owner, idx, from, partLength))) return false;
    }
    return true;
  }

  /** The disk may end inside its last object: the rest of that object does not count. */
  #isWhole(idx: number, within: number, length: number): boolean {
    return within === 0 && length === Math.min(this.#objectSize, this.#open.record.size - idx * this.#objectSize);
  }

  /** `looked`: the owner whose object is known not to be zeros there; 0 for none. */
  #zeroObject(idx: number, within: number, length: number, noHole: boolean, looked = 0): Awaitable<void> {
    const later = this.#zeroObjectOnce(idx, within, length, noHole, looked);
    if (later === undefined || !this.#open.objectsMove) return later;
    return this.#changes.againIfMoved(later, () => this.#zeroObject(idx, within, length, noHole));
  }

  #zeroObjectOnce(idx: number, within: number, length: number, noHole: boolean, looked: number): Awaitable<void> {
    const transition = this.#changes.running(idx);
    if (transition) return this.#changes.after(transition, () => this.#zeroObject(idx, within, length, noHole));
    const owner = this.#open.map[idx] ?? 0;
    const whole = this.#isWhole(idx, within, length);
    if (!noHole) {
      if (owner === 0) return;
      if (owner !== looked && this.#isNeeded(idx)) return this.#zeroUnlessZeros(idx, within, length, owner);
      if (whole) return this.#drop(idx);
    }
    if (owner !== 0 && this.#open.exclusive(idx)) {
      const later = this.#calls.zeroObject(idx, within, length, { noHole });
      return later === undefined ? undefined : this.#changes.trackInPlace(idx, later);
    }
    return this.#createThenZero(idx, within, length, noHole, whole);
  }

  /** Drop the whole object at idx. */
  #drop(idx: number): Awaitable<void> {
    if (this.#changes.isInPlace(idx)) return this.#changes.run(idx, async () => this.#calls.dropObject(idx));
    const later = this.#calls.dropObject(idx);
    if (later !== undefined) return this.#changes.run(idx, () => later);
  }

  /** A snapshot needs the object at idx: changing it costs a copy, and makes it count as changed. */
  #isNeeded(idx: number): boolean {
    return !this.#open.exclusive(idx) || this.#open.isKeptAside?.(idx) === true;
  }

  /**
   * If the range reads as zeros in the object of `owner`, there is nothing to do. A write that happens during the look, in place
   * or into a copy, counts as later than this request.
   */
  async #zeroUnlessZeros(idx: number, within: number, length: number, owner: number): Promise<void> {
    let isDone = false;
    try {
      isDone = await readsAsZeros(this.#calls, owner, idx, within, length);
    } catch {
      // An object that cannot be read can still be dropped; if it has to be copied, the copying fails.
    }
    if (!isDone) await this.#zeroObject(idx, within, length, false, owner);
  }

  async #createThenZero(idx: number, within: number, length: number, noHole: boolean, whole: boolean): Promise<void> {
    if (whole && this.#open.map[idx] !== 0) {
      await this.#changes.run(idx, async () => this.#calls.dropObject(idx));
    }
    if (this.#changes.running(idx) === undefined && (this.#open.map[idx] === 0 || !this.#open.exclusive(idx))) {
      await this.#changes.run(idx, async () => this.#create(idx, 0, NOTHING));
    }
    await this.#zeroObject(idx, within, length, noHole);
  }
}
