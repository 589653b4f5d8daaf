/**
 * A filter that keeps changes in memory: copy-on-write over a device that is never written. It owns what is read from
 * that device, and when; changed-blocks.ts has the changes. Closing it does not save them.
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
} from '../block-device.js';
import { completeDevice, type AnyDevice } from '../device.js';
import { ChangedBlocks } from './changed-blocks.js';
import { checkBlockSize, Forwarding, isPromise, memoryFor, readWhole } from './forwarding.js';

/** Options of `overlay`. */
export interface OverlayOptions {
  /**
   * Memory for changes, in bytes; a change that needs more fails with ENOSPC. No limit by default. Each block takes about 1 KiB
   * more, which is not counted.
   */
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
  readonly #changed: ChangedBlocks;
  readonly #reportsBase: boolean;
  /** Blocks that are being read to be changed. */
  readonly #loading = new Map<number, Promise<void>>();

  constructor(device: CompleteDevice, { maxBytes = Infinity, blockSize = 4096, multiConn = false }: OverlayOptions) {
    checkBlockSize('blockSize', blockSize);
    const can = { canFlush: true, canFua: true, canTrim: true, canZero: true, canFastZero: true };
    super(device, { ...can, readOnly: false, multiConn, contexts: [ALLOCATION_CONTEXT], wideContexts: [] });
    const { size, minimumBlockSize, contexts } = device.geometry;
    this.#changed = new ChangedBlocks(size, Math.max(blockSize, minimumBlockSize), maxBytes);
    this.#reportsBase = contexts.includes(ALLOCATION_CONTEXT);
    this.isHole = (offset, length) => this.#knowsHole(offset, offset + length);
  }

  get allocatedBytes(): number {
    return this.#changed.bytes;
  }

  override read(offset: number, into: Buffer, signal?: AbortSignal): Awaitable<Transferred> {
    const end = offset + into.length;
    const at = this.#changed.read(offset, into, offset);
    if (at === end) return undefined;
    const isAllBelow = at === offset && this.#changed.unchangedUntil(offset, end) === end;
    return isAllBelow ? this.inner.read(offset, into, signal) : this.#readMixed(offset, into, at, signal);
  }

  override write(offset: number, data: Buffer): Awaitable<Transferred> {
    return this.#change(offset, offset + data.length, data, offset);
  }

  override zero(offset: number, length: number): Awaitable<void> {
    const end = offset + length;
    const [first, last] = this.#changed.wholeBlocks(offset, end);
    if (first >= last) return this.#change(offset, end, undefined, offset);
    this.#changed.hide(first, last, offset);
    const { blockSize } = this.#changed;
    const tail = Math.min(end, last * blockSize);
    const head = this.#change(offset, first * blockSize, undefined, offset);
    if (isPromise(head)) return head.then(() => this.#change(tail, end, undefined, tail));
    return this.#change(tail, end, undefined, tail);
  }

  /** Parts of blocks stay as they are. */
  override trim(offset: number, length: number): void {
    const [first, last] = this.#changed.wholeBlocks(offset, offset + length);
    if (first < last) this.#changed.hide(first, last, offset);
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

  async #readMixed(offset: number, into: Buffer, from: number, signal: AbortSignal | undefined): Promise<void> {
    const end = offset + into.length;
    for (let at = from; at < end;) {
      const next = this.#changed.unchangedUntil(at, end);
      await readWhole(this.inner, at, into.subarray(at - offset, next - offset), signal);
      at = this.#changed.read(offset, into, next);
    }
  }

  /** Write `data`, or zeros, to [at, end); `data` begins at `offset`. */
  #change(at: number, end: number, data: Buffer | undefined, offset: number): Awaitable<void> {
    const { blockSize } = this.#changed;
    while (at < end) {
      const index = Math.floor(at / blockSize);
      const next = Math.min(end, (index + 1) * blockSize);
      if (!this.#changed.change(at, next, data, at - offset)) {
        const from = at;
        // The block may have been zeroed while it was read: it is looked at again.
        return this.#load(index, from).then(() => this.#change(from, end, data, offset));
      }
      at = next;
    }
    return undefined;
  }

  /** Read a block of the device, to be changed at `offset`. It has no signal: requests of several clients may wait for it. */
  async #load(index: number, offset: number): Promise<void> {
    let load = this.#loading.get(index);
    if (load === undefined) {
      load = this.#loadBlock(index).finally(() => this.#loading.delete(index));
      this.#loading.set(index, load);
    }
    try {
      await load;
    } catch (error) {
      if (!(error instanceof DeviceError)) throw error;
      // This request has changed nothing of the block, wherever in it the device has failed.
      throw new DeviceError(error.code, error.message, { cause: error, offset });
    }
  }

  async #loadBlock(index: number): Promise<void> {
    const { blockSize } = this.#changed;
    const start = index * blockSize;
    // Those that are being read count, too.
    this.#changed.reserve((this.#loading.size + 1) * blockSize, start);
    const block = memoryFor(this.inner, blockSize);
    const length = Math.min(blockSize, this.geometry.size - start);
    await readWhole(this.inner, start, block.subarray(0, length), undefined);
    this.#changed.add(index, block);
  }

  #extentsFrom(from: number, end: number, sink: ExtentSink, signal: AbortSignal | undefined): Awaitable<void> {
    for (let at = from; at < end;) {
      let next = this.#changed.dataUntil(at, end);
      let flags = 0;
      if (next <= at) {
        next = this.#changed.zerosUntil(at, end);
        flags = STATE_HOLE | STATE_ZERO;
      }
      if (next > at) {
        at = sink(at, next - at, flags) ? next : end;
        continue;
      }
      const answer = this.#baseExtents(at, end, sink, signal);
      if (isPromise(answer)) return answer.then((rest) => this.#extentsFrom(rest, end, sink, signal));
      at = answer;
    }
    return undefined;
  }

  /** The extents of the device from `at` up to a change. Returns where to go on: `end` if no more are wanted, or known. */
  #baseExtents(at: number, end: number, sink: ExtentSink, signal: AbortSignal | undefined): Awaitable<number> {
    const baseEnd = this.#changed.unchangedUntil(at, end);
    if (!this.#reportsBase) return sink(at, baseEnd - at, 0) ? baseEnd : end;
    let next = at;
    let wantsMore = true;
    const cuttingSink: ExtentSink = (offset, length, flags) => {
      const extentEnd = Math.min(baseEnd, offset + length);
      if (wantsMore && extentEnd > next) {
        // One that begins too late stays wrong, for whoever checks it: its flags do not hold for what it leaves out.
        const begin = Math.max(next, offset);
        wantsMore = sink(begin, extentEnd - begin, flags);
        next = extentEnd;
      }
      return wantsMore && next < baseEnd;
    };
    // The device may stop before its end: the client asks again from there.
    const rest = (): number => (wantsMore && next === baseEnd ? baseEnd : end);
    const answer = this.inner.extents(ALLOCATION_CONTEXT, at, baseEnd - at, cuttingSink, signal);
    return isPromise(answer) ? answer.then(rest) : rest();
  }

  #knowsHole(offset: number, end: number): boolean {
    if (this.#changed.dataUntil(offset, end) > offset) return false;
    const zeroEnd = this.#changed.zerosUntil(offset, end);
    if (zeroEnd > offset) return zeroEnd === end;
    return this.#changed.unchangedUntil(offset, end) === end && (this.inner.isHole?.(offset, end - offset) ?? false);
  }
}
