/**
 * What an overlay has changed, in memory: blocks with data, and ranges of blocks that are zeros. It owns the bound on that memory;
 * it does not know the device below, and all of its methods are synchronous.
 */

import { DeviceError } from '../block-device.js';
import { PageTable } from '../page-table.js';
import { RangeSet } from './range-set.js';

/** What a range of zeros costs, bytes: two numbers, in arrays that grow ahead. */
const ZERO_RANGE_BYTES = 32;

export class ChangedBlocks {
  readonly blockSize: number;
  readonly #size: number;
  readonly #maxBytes: number;
  /** By number. A block that is not here is zeros if it is in #zeros, else it is not changed. */
  readonly #blocks = new PageTable<Buffer>();
  /** Numbers of blocks that are zeros, unless #blocks has them. */
  readonly #zeros = new RangeSet();

  /** Errors: RangeError if `maxBytes` is not a number of bytes. */
  constructor(size: number, blockSize: number, maxBytes: number) {
    if (!(maxBytes >= 0)) throw new RangeError(`maxBytes ${maxBytes} is not a number of bytes`);
    this.blockSize = blockSize;
    this.#size = size;
    this.#maxBytes = maxBytes;
  }

  /** Bytes of memory in use. */
  get bytes(): number {
    return this.#blocks.count * this.blockSize + this.#zeros.count * ZERO_RANGE_BYTES;
  }

  /** Copy what is changed from `at` on; `into` begins at `offset`. The offset of the first byte that is not changed, or the end. */
  read(offset: number, into: Buffer, at: number): number {
    const size = this.blockSize;
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

  /** Where the unchanged bytes from `at` on end, at most at `end`. `at` itself must be unchanged. */
  unchangedUntil(at: number, end: number): number {
    const index = Math.floor(at / this.blockSize);
    const last = this.#zeros.nextFrom(index, Math.ceil(end / this.blockSize));
    return Math.min(end, this.#blocks.firstPresent(index, last) * this.blockSize);
  }

  /** Where the data in memory from `at` on ends, at most at `end`; `at` or less if there is none. */
  dataUntil(at: number, end: number): number {
    const index = Math.floor(at / this.blockSize);
    return Math.min(end, this.#blocks.firstAbsent(index, Math.ceil(end / this.blockSize)) * this.blockSize);
  }

  /** Where the zeros from `at` on end, at most at `end`; `at` or less if there are none. */
  zerosUntil(at: number, end: number): number {
    const index = Math.floor(at / this.blockSize);
    const last = Math.min(this.#zeros.endAt(index), Math.ceil(end / this.blockSize));
    return Math.min(end, this.#blocks.firstPresent(index, last) * this.blockSize);
  }

  /**
   * Change [at, end), a part of one block, to the bytes of `data` from `from` on, or to zeros. False: nothing has changed, because
   * the rest of the block is not known; it must be read and given to `add`. Errors: DeviceError ENOSPC.
   */
  change(at: number, end: number, data: Buffer | undefined, from: number): boolean {
    const size = this.blockSize;
    const index = Math.floor(at / size);
    let block = this.#blocks.get(index);
    if (block === undefined) {
      const isWhole = at === index * size && (end - at === size || end === this.#size);
      const isZero = this.#zeros.has(index);
      if (isZero && data === undefined) return true;
      if (!isZero && !isWhole) return false;
      this.reserve(size, at);
      block = Buffer.alloc(size);
      this.#blocks.set(index, block);
    }
    if (data === undefined) block.fill(0, at % size, (at % size) + end - at);
    else data.copy(block, at % size, from, from + end - at);
    return true;
  }

  /**
   * A block that was read to be changed. If it was written or zeroed as a whole meanwhile, that is newer. Errors: DeviceError
   * ENOSPC, if others have taken the memory meanwhile.
   */
  add(index: number, block: Buffer): void {
    if (this.#blocks.get(index) !== undefined || this.#zeros.has(index)) return;
    this.reserve(this.blockSize, index * this.blockSize);
    this.#blocks.set(index, block);
  }

  /** The numbers of the blocks that are wholly in [offset, end): [first, last). The last of the disk may be shorter. */
  wholeBlocks(offset: number, end: number): readonly [number, number] {
    const last = end / this.blockSize;
    return [Math.ceil(offset / this.blockSize), end === this.#size ? Math.ceil(last) : Math.floor(last)];
  }

  /** Make the blocks [first, last) zeros. Errors: DeviceError ENOSPC, at `offset`. */
  hide(first: number, last: number, offset: number): void {
    // A block that goes makes room for more than a range: what is full can be trimmed.
    if (this.#blocks.firstPresent(first, last) === last) this.reserve(ZERO_RANGE_BYTES, offset);
    this.#blocks.deleteRange(first, last);
    this.#zeros.add(first, last);
  }

  /** Errors: DeviceError ENOSPC, at `offset`, if so many bytes more are too many. */
  reserve(bytes: number, offset: number): void {
    if (this.bytes + bytes <= this.#maxBytes) return;
    throw new DeviceError('ENOSPC', `changes may use ${this.#maxBytes} bytes of memory`, { offset });
  }
}
