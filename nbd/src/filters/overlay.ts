/**
 * A filter that keeps changes in memory: copy-on-write over a device that is never written. It owns the changed pages and the
 * ranges that were zeroed or trimmed; closing it does not save them.
 */

import {
  ALLOCATION_CONTEXT,
  DeviceError,
  STATE_HOLE,
  STATE_ZERO,
  type Awaitable,
  type CompleteDevice,
  type ExtentSink,
  type Transferred,
  type ZeroMode,
} from '../block-device.js';
import { completeDevice, type AnyDevice } from '../device.js';
import { PageTable } from '../page-table.js';
import { checkBlockSize, Forwarding, isPromise, memoryFor, readWhole } from './forwarding.js';
import { RangeSet } from './range-set.js';

/** What a range of zeros costs, bytes, for `maxBytes`: two numbers, in arrays that grow ahead. */
const ZERO_RANGE_BYTES = 32;

/** Options of `overlay`. */
export interface OverlayOptions {
  /** Memory for changes, in bytes; a change that needs more fails with ENOSPC. No limit by default. */
  readonly maxBytes?: number;
  /** The unit of copying, bytes: a power of two from 512 to 32 MiB, at least the device's minimum block size. Default 4096. */
  readonly blockSize?: number;
  /** Announced to clients: true if this one object serves all connections. False by default. */
  readonly multiConn?: boolean;
}

/** A device with changes in memory. */
export interface OverlayDevice extends CompleteDevice {
  /** Bytes of memory in use for changes. */
  readonly allocatedBytes: number;
}

/**
 * `device` made writable: changes are kept in memory, `device` is only read. A write of a part of a block reads the rest of that
 * block first. Zeroed and trimmed blocks hide what is below, and cost almost nothing; they are reported as holes also after a
 * zero with `noHole`, because nothing is reserved. A flush has nothing to do. Of the meta contexts of `device` only
 * base:allocation remains.
 * Errors: RangeError for `blockSize` or `maxBytes`.
 */
export function overlay(device: AnyDevice, options: OverlayOptions = {}): OverlayDevice {
  return new Overlay(completeDevice(device), options);
}

class Overlay extends Forwarding implements OverlayDevice {
  readonly #blockSize: number;
  readonly #maxBytes: number;
  readonly #reportsBase: boolean;
  /** Changed blocks by number. A block that is not here is zeros if its beginning is in #zeros, else it is the device's. */
  readonly #blocks = new PageTable<Buffer>();
  /** Whole blocks that are zeros, as ranges of block numbers, unless #blocks has them. */
  readonly #zeros = new RangeSet();
  /** Blocks that are being read to be changed. */
  readonly #loading = new Map<number, Promise<void>>();

  constructor(device: CompleteDevice, { maxBytes = Infinity, blockSize = 4096, multiConn = false }: OverlayOptions) {
    checkBlockSize('blockSize', blockSize);
    if (!(maxBytes >= 0)) throw new RangeError(`maxBytes ${maxBytes} is not a number of bytes`);
    const can = { canFlush: true, canFua: true, canTrim: true, canZero: true, canFastZero: true };
    super(device, { ...can, readOnly: false, multiConn, contexts: [ALLOCATION_CONTEXT], wideContexts: [] });
    this.#blockSize = Math.max(blockSize, device.geometry.minimumBlockSize);
    this.#maxBytes = maxBytes;
    this.#reportsBase = device.geometry.contexts.includes(ALLOCATION_CONTEXT);
    this.isHole = (offset, length) => this.#knowsHole(offset, offset + length);
  }

  get allocatedBytes(): number {
    return this.#blocks.count * this.#blockSize + this.#zeros.count * ZERO_RANGE_BYTES;
  }

  override read(offset: number, into: Buffer, signal?: AbortSignal): Awaitable<Transferred> {
    const end = offset + into.length;
    const at = this.#readOwn(offset, into, offset);
    if (at === end) return undefined;
    if (at === offset && this.#baseEnd(offset, end) === end) return this.inner.read(offset, into, signal);
    return this.#readMixed(offset, into, at, signal);
  }

  override write(offset: number, data: Buffer, _fua: boolean, signal?: AbortSignal): Awaitable<Transferred> {
    return this.#change(offset, offset + data.length, data, offset, signal);
  }

  override zero(offset: number, length: number, _mode: ZeroMode, signal?: AbortSignal): Awaitable<void> {
    const end = offset + length;
    const [first, last] = this.#wholeBlocks(offset, end);
    if (first >= last) return this.#change(offset, end, undefined, offset, signal);
    this.#hide(first, last, offset);
    const tail = Math.min(end, last * this.#blockSize);
    const change = this.#change(offset, first * this.#blockSize, undefined, offset, signal);
    if (isPromise(change)) return change.then(() => this.#change(tail, end, undefined, tail, signal));
    return this.#change(tail, end, undefined, tail, signal);
  }

  /** Parts of blocks stay as they are. */
  override trim(offset: number, length: number): void {
    const [first, last] = this.#wholeBlocks(offset, offset + length);
    if (first < last) this.#hide(first, last, offset);
  }

  override flush(): void {
    // Nothing of this is durable, and nothing of the device has changed.
  }

  override extents(
    _context: string,
    offset: number,
    length: number,
    sink: ExtentSink,
    signal?: AbortSignal,
  ): Awaitable<void> {
    return this.#extentsFrom(offset, offset + length, sink, signal);
  }

  /** Copy what is changed from `at` on, up to the first byte that is the device's: its offset is returned, or the end. */
  #readOwn(offset: number, into: Buffer, at: number): number {
    const size = this.#blockSize;
    const end = offset + into.length;
    while (at < end) {
      const index = Math.floor(at / size);
      const next = Math.min(end, (index + 1) * size);
      const block = this.#blocks.get(index);
      if (block !== undefined) block.copy(into, at - offset, at % size, (at % size) + next - at);
      else if (this.#zeros.has(index)) into.fill(0, at - offset, next - offset);
      else return at;
      at = next;
    }
    return end;
  }

  async #readMixed(offset: number, into: Buffer, from: number, signal: AbortSignal | undefined): Promise<void> {
    const end = offset + into.length;
    for (let at = from; at < end;) {
      const next = this.#baseEnd(at, end);
      await readWhole(this.inner, at, into.subarray(at - offset, next - offset), signal);
      at = this.#readOwn(offset, into, next);
    }
  }

  /** Where the device's bytes from `at` on end: at a changed block, or at `end`. */
  #baseEnd(at: number, end: number): number {
    const index = Math.floor(at / this.#blockSize);
    const last = this.#zeros.nextFrom(index, Math.ceil(end / this.#blockSize));
    return Math.min(end, this.#blocks.firstPresent(index, last) * this.#blockSize);
  }

  /** Write `data`, or zeros, to [at, end); `data` begins at `offset`. */
  #change(
    at: number,
    end: number,
    data: Buffer | undefined,
    offset: number,
    signal: AbortSignal | undefined,
  ): Awaitable<void> {
    while (at < end) {
      const next = Math.min(end, (Math.floor(at / this.#blockSize) + 1) * this.#blockSize);
      if (!this.#changeBlock(at, next, data, at - offset)) return this.#loadAndChange(at, end, data, offset, signal);
      at = next;
    }
    return undefined;
  }

  async #loadAndChange(
    at: number,
    end: number,
    data: Buffer | undefined,
    offset: number,
    signal: AbortSignal | undefined,
  ): Promise<void> {
    await this.#load(Math.floor(at / this.#blockSize), at);
    // The block may have been zeroed while it was read: then this looks again.
    await this.#change(at, end, data, offset, signal);
  }

  /** Change [at, end), a part of one block. False: it must be read before. Errors: DeviceError ENOSPC. */
  #changeBlock(at: number, end: number, data: Buffer | undefined, from: number): boolean {
    const size = this.#blockSize;
    const index = Math.floor(at / size);
    let block = this.#blocks.get(index);
    if (block === undefined) {
      const isWhole = at === index * size && (end - at === size || end === this.geometry.size);
      const isZero = this.#zeros.has(index);
      if (isZero && data === undefined) return true;
      if (!isZero && !isWhole) return false;
      this.#reserve(size, at);
      block = Buffer.alloc(size);
      this.#blocks.set(index, block);
    }
    if (data === undefined) block.fill(0, at % size, (at % size) + end - at);
    else data.copy(block, at % size, from, from + end - at);
    return true;
  }

  /** Read a block of the device, to be changed at `offset`. It has no signal: requests of several clients may wait for it. */
  #load(index: number, offset: number): Promise<void> {
    let load = this.#loading.get(index);
    if (load === undefined) {
      load = this.#loadBlock(index, offset).finally(() => this.#loading.delete(index));
      this.#loading.set(index, load);
    }
    return load;
  }

  async #loadBlock(index: number, offset: number): Promise<void> {
    const start = index * this.#blockSize;
    const length = Math.min(this.#blockSize, this.geometry.size - start);
    this.#reserve(this.#blockSize, offset);
    const block = memoryFor(this.inner, this.#blockSize);
    try {
      await readWhole(this.inner, start, block.subarray(0, length), undefined);
    } catch (error) {
      if (!(error instanceof DeviceError)) throw error;
      // Nothing of this block was changed, wherever in it the device has failed.
      throw new DeviceError(error.code, error.message, { cause: error, offset });
    }
    // Written or zeroed as a whole meanwhile: that is newer.
    if (this.#blocks.get(index) === undefined && !this.#zeros.has(index)) this.#blocks.set(index, block);
  }

  /** The numbers of the blocks that are wholly in [offset, end): [first, last). The last of the disk may be shorter. */
  #wholeBlocks(offset: number, end: number): readonly [number, number] {
    const last = end / this.#blockSize;
    return [Math.ceil(offset / this.#blockSize), end === this.geometry.size ? Math.ceil(last) : Math.floor(last)];
  }

  /** Make the blocks [first, last) zeros. */
  #hide(first: number, last: number, offset: number): void {
    this.#reserve(ZERO_RANGE_BYTES, offset);
    this.#blocks.deleteRange(first, last);
    this.#zeros.add(first, last);
  }

  #reserve(bytes: number, offset: number): void {
    if (this.allocatedBytes + this.#loading.size * this.#blockSize + bytes <= this.#maxBytes) return;
    throw new DeviceError('ENOSPC', `changes may use ${this.#maxBytes} bytes of memory`, { offset });
  }

  #extentsFrom(from: number, end: number, sink: ExtentSink, signal: AbortSignal | undefined): Awaitable<void> {
    const size = this.#blockSize;
    const endBlock = Math.ceil(end / size);
    for (let at = from; at < end;) {
      const index = Math.floor(at / size);
      let next = Math.min(end, this.#blocks.firstAbsent(index, endBlock) * size);
      let flags = 0;
      if (next <= at) {
        const zeroEnd = this.#zeros.endAt(index);
        if (zeroEnd === index) return this.#baseExtents(at, end, sink, signal);
        next = Math.min(end, this.#blocks.firstPresent(index, Math.min(zeroEnd, endBlock)) * size);
        flags = STATE_HOLE | STATE_ZERO;
      }
      if (!sink(at, next - at, flags)) return undefined;
      at = next;
    }
    return undefined;
  }

  /** The extents of the device from `at` on, and then those that follow. */
  #baseExtents(at: number, end: number, sink: ExtentSink, signal: AbortSignal | undefined): Awaitable<void> {
    const baseEnd = this.#baseEnd(at, end);
    if (!this.#reportsBase) {
      return sink(at, baseEnd - at, 0) ? this.#extentsFrom(baseEnd, end, sink, signal) : undefined;
    }
    let next = at;
    let wantsMore = true;
    const cuttingSink: ExtentSink = (offset, length, flags) => {
      const extentEnd = Math.min(baseEnd, offset + length);
      if (wantsMore && extentEnd > next) {
        wantsMore = sink(next, extentEnd - next, flags);
        next = extentEnd;
      }
      return wantsMore && next < baseEnd;
    };
    // The device may stop before its end: the client asks again from there.
    const follow = (): Awaitable<void> =>
      wantsMore && next === baseEnd ? this.#extentsFrom(baseEnd, end, sink, signal) : undefined;
    const answer = this.inner.extents(ALLOCATION_CONTEXT, at, baseEnd - at, cuttingSink, signal);
    return isPromise(answer) ? answer.then(follow) : follow();
  }

  #knowsHole(offset: number, end: number): boolean {
    const index = Math.floor(offset / this.#blockSize);
    const endBlock = Math.ceil(end / this.#blockSize);
    if (this.#blocks.firstPresent(index, endBlock) < endBlock) return false;
    const zeroEnd = this.#zeros.endAt(index);
    if (zeroEnd >= endBlock) return true;
    if (zeroEnd > index || this.#zeros.nextFrom(index, endBlock) < endBlock) return false;
    return this.inner.isHole?.(offset, end - offset) ?? false;
  }
}
