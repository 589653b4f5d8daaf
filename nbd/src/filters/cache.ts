/**
 * A filter that keeps what was read in memory. Writes go through to the device and drop the blocks that they touch. It owns the
 * blocks, and the rule that what was read during a write of the same block is not kept.
 */

import type { Awaitable, CompleteDevice, Transferred, ZeroMode } from '../block-device.js';
import { completeDevice, type AnyDevice } from '../device.js';
import { checkBlockSize, Forwarding, isPromise, memoryFor, readWhole } from './forwarding.js';

/** Neighbouring blocks that are not there are read together, up to so many bytes. */
const MAX_LOAD_BYTES = 1024 * 1024;

/** Options of `cache`. */
export interface CacheOptions {
  /** Memory for blocks, in bytes: at least one block is kept. Default 64 MiB. */
  readonly maxBytes?: number;
  /** What is read and kept, bytes: a power of two from 512 to 32 MiB, at least the device's minimum block size. Default 65536. */
  readonly blockSize?: number;
  /** Announced to clients: true if this one object serves all connections. False by default. */
  readonly multiConn?: boolean;
}

/** A device with a read cache. */
export interface CachedDevice extends CompleteDevice {
  /** Bytes of data in the cache. */
  readonly cachedBytes: number;
}

/** A read of blocks [from, to) from the device. */
interface Load {
  readonly from: number;
  readonly to: number;
  /** Others may wait for it, and its blocks are kept: nothing has been written there since before it began. */
  isFresh: boolean;
  readonly data: Buffer;
  ended: Promise<void>;
}

/** A change of blocks [from, to) that has not been answered. */
interface Change {
  readonly from: number;
  readonly to: number;
}

/**
 * `device` with a cache for reads; what was used last is kept. Writes, zeros, trims and flushes go straight to the device:
 * nothing is durable later than it would be without the cache. Data that reaches the device on another way is not noticed. A
 * CACHE request reads the range into the cache. If the blocks of a read cannot be read, it reads what was asked for, alone.
 * Errors: RangeError for `blockSize` or `maxBytes`.
 */
export function cache(device: AnyDevice, options: CacheOptions = {}): CachedDevice {
  return new Cache(completeDevice(device), options);
}

class Cache extends Forwarding implements CachedDevice {
  readonly #blockSize: number;
  readonly #maxBlocks: number;
  /** By number; those used last are at the end. */
  readonly #blocks = new Map<number, Buffer>();
  readonly #loads = new Set<Load>();
  /** The fresh loads, by each of their blocks. */
  readonly #loading = new Map<number, Load>();
  readonly #changes = new Set<Change>();

  constructor(device: CompleteDevice, { maxBytes = 64 * 1024 * 1024, blockSize = 65536, multiConn }: CacheOptions) {
    checkBlockSize('blockSize', blockSize);
    if (!(maxBytes >= 0)) throw new RangeError(`maxBytes ${maxBytes} is not a number of bytes`);
    super(device, { canCache: true, multiConn: multiConn ?? false });
    this.fillsBuffer = true;
    this.#blockSize = Math.max(blockSize, device.geometry.minimumBlockSize);
    this.#maxBlocks = Math.max(1, Math.floor(maxBytes / this.#blockSize));
  }

  get cachedBytes(): number {
    return this.#blocks.size * this.#blockSize;
  }

  override read(offset: number, into: Buffer, signal?: AbortSignal): Awaitable<Transferred> {
    const end = offset + into.length;
    for (let at = offset; at < end;) {
      const block = this.#use(Math.floor(at / this.#blockSize));
      if (block === undefined) return this.#readRest(offset, into, at, signal);
      const start = at % this.#blockSize;
      at += block.copy(into, at - offset, start, start + end - at);
    }
    return undefined;
  }

  override write(offset: number, data: Buffer, fua: boolean, signal?: AbortSignal): Awaitable<Transferred> {
    return this.#changing(offset, data.length, () => super.write(offset, data, fua, signal));
  }

  override zero(offset: number, length: number, mode: ZeroMode, signal?: AbortSignal): Awaitable<void> {
    return this.#changing(offset, length, () => super.zero(offset, length, mode, signal));
  }

  override trim(offset: number, length: number, fua: boolean, signal?: AbortSignal): Awaitable<void> {
    return this.#changing(offset, length, () => super.trim(offset, length, fua, signal));
  }

  override async cache(offset: number, length: number, signal?: AbortSignal): Promise<void> {
    const first = Math.floor(offset / this.#blockSize);
    // What does not fit would only drop what was just read.
    const end = Math.min(Math.ceil((offset + length) / this.#blockSize), first + this.#maxBlocks);
    for (let index = first; index < end && signal?.aborted !== true;) {
      const load = this.#blocks.has(index) ? undefined : (this.#loading.get(index) ?? this.#load(index, end));
      await load?.ended;
      index = load?.to ?? index + 1;
    }
  }

  /** Loads have no signal: requests of several clients may wait for one. */
  async #readRest(offset: number, into: Buffer, from: number, signal: AbortSignal | undefined): Promise<void> {
    const end = offset + into.length;
    const size = this.#blockSize;
    const loads: Load[] = [];
    for (let at = from; at < end;) {
      const index = Math.floor(at / size);
      const block = this.#use(index);
      if (block === undefined) {
        const load = this.#loading.get(index) ?? this.#load(index, Math.ceil(end / size));
        loads.push(load);
        at = load.to * size;
      } else {
        at += block.copy(into, at - offset, at % size, (at % size) + end - at);
      }
    }
    // All of them have ended before the first byte is copied: nothing touches `into` once this has failed.
    const ends = await Promise.allSettled(loads.map(({ ended }) => ended));
    // Blocks are larger than what was asked for, and a load may be for somebody else's request as well: one bad sector must not
    // make what is beside it unreadable.
    if (ends.some(({ status }) => status === 'rejected')) {
      if (this.inner.fillsBuffer !== true) into.fill(0);
      return readWhole(this.inner, offset, into, signal);
    }
    for (const load of loads) {
      const at = Math.max(from, load.from * size);
      load.data.copy(into, at - offset, at - load.from * size, end - load.from * size);
    }
  }

  /** The block, if it is there, as the one that was used last. */
  #use(index: number): Buffer | undefined {
    const block = this.#blocks.get(index);
    if (block !== undefined) {
      this.#blocks.delete(index);
      this.#blocks.set(index, block);
    }
    return block;
  }

  /** Read the blocks from `from` on that are not there, up to `end`. */
  #load(from: number, end: number): Load {
    const limit = Math.min(end, from + Math.max(1, Math.floor(MAX_LOAD_BYTES / this.#blockSize)));
    let to = from + 1;
    while (to < limit && !this.#blocks.has(to) && !this.#loading.has(to)) to++;
    const start = from * this.#blockSize;
    const data = memoryFor(this.inner, Math.min(to * this.#blockSize, this.geometry.size) - start);
    const load: Load = { from, to, isFresh: true, data, ended: Promise.resolve() };
    for (const change of this.#changes) if (overlap(change, load)) load.isFresh = false;
    if (load.isFresh) for (let index = from; index < to; index++) this.#loading.set(index, load);
    this.#loads.add(load);
    load.ended = this.#finish(load, start);
    // Those who wait for it report it.
    load.ended.catch(() => undefined);
    return load;
  }

  async #finish(load: Load, start: number): Promise<void> {
    try {
      await readWhole(this.inner, start, load.data, undefined);
      if (load.isFresh) this.#keep(load);
    } finally {
      this.#loads.delete(load);
      this.#forget(load);
    }
  }

  #keep({ from, to, data }: Load): void {
    const size = this.#blockSize;
    for (let index = from; index < to; index++) {
      const part = data.subarray((index - from) * size, (index - from + 1) * size);
      // A part would keep all of `data` in memory.
      this.#blocks.set(index, to - from === 1 ? data : Buffer.from(part));
    }
    for (const oldest of this.#blocks.keys()) {
      if (this.#blocks.size <= this.#maxBlocks) break;
      this.#blocks.delete(oldest);
    }
  }

  /** Nobody else waits for `load` from now on, and it is not kept. */
  #forget(load: Load): void {
    if (load.isFresh) for (let index = load.from; index < load.to; index++) this.#loading.delete(index);
    load.isFresh = false;
  }

  /** Drop the blocks of the range, before the device changes it and whether it succeeds or not. */
  #changing<T>(offset: number, length: number, act: () => Awaitable<T>): Awaitable<T> {
    const from = Math.floor(offset / this.#blockSize);
    const change: Change = { from, to: Math.ceil((offset + length) / this.#blockSize) };
    if (change.to - from <= this.#blocks.size) {
      for (let index = from; index < change.to; index++) this.#blocks.delete(index);
    } else {
      for (const index of this.#blocks.keys()) if (index >= from && index < change.to) this.#blocks.delete(index);
    }
    for (const load of this.#loads) if (overlap(load, change)) this.#forget(load);
    this.#changes.add(change);
    let answer: Awaitable<T>;
    try {
      answer = act();
    } catch (error) {
      this.#changes.delete(change);
      throw error;
    }
    if (isPromise(answer)) return answer.finally(() => this.#changes.delete(change));
    this.#changes.delete(change);
    return answer;
  }
}

function overlap(one: Change, other: Change): boolean {
  return one.from < other.to && other.from < one.to;
}
