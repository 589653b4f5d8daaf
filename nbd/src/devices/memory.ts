/**
 * A disk in memory: sparse, with pages that are allocated when they are first written and given back when they are zeroed or
 * trimmed, or over memory that the caller has. It owns the pages; it is never durable.
 */

import {
  ALLOCATION_CONTEXT,
  DeviceError,
  STATE_HOLE,
  STATE_ZERO,
  type CompleteDevice,
  type ExtentSink,
  type Geometry,
  type ZeroMode,
} from '../block-device.js';
import { completeDevice, completeGeometry } from '../device.js';
import { PageTable } from '../page-table.js';

/** Bytes. Smaller pages would make large disks of many small objects; larger ones waste memory on scattered small writes. */
const PAGE_BYTES = 32 * 1024;

/** Options of `memoryDevice`. */
export interface MemoryOptions {
  /** Bytes. */
  readonly size: number;
  /**
   * Memory that may be used, in bytes; a write that needs more fails with ENOSPC. It is used in pages of 32 KiB; as much as
   * `size` is always enough. No limit by default.
   */
  readonly maxBytes?: number;
  /** Announced to clients: true if this one object serves all connections. False by default. */
  readonly multiConn?: boolean;
}

/** A disk in memory. */
export interface MemoryDevice extends CompleteDevice {
  /** Bytes of memory in use for data. */
  readonly allocatedBytes: number;
}

/**
 * A disk in memory: of so many bytes, which costs nothing until it is written, or over `bytes`, which are read and written in
 * place. It answers synchronously, and reports extents. Closing it keeps the data as long as the object is referred to, so that
 * one object may serve several connections, one after the other or at once. Zeros with `noHole` keep the pages that are
 * allocated, and reserve no others.
 * Errors: RangeError if the size is not an integer from 0 to 2^53-1.
 */
export function memoryDevice(given: number | MemoryOptions | Uint8Array): MemoryDevice {
  if (given instanceof Uint8Array) return denseMemory(given);
  return new SparseMemory(typeof given === 'number' ? { size: given } : given);
}

/** All of `bytes` is data: nothing can be given back. */
function denseMemory(bytes: Uint8Array): MemoryDevice {
  const device = completeDevice({
    size: bytes.length,
    fillsBuffer: true,
    canFua: true,
    canFastZero: true,
    read: (offset, into) => {
      const part = bytes.subarray(offset, offset + into.length);
      into.set(part);
      // Fewer, if the caller has made its buffer smaller.
      return part.length;
    },
    write: (offset, data) => void bytes.set(data, offset),
    zero: (offset, length) => void bytes.fill(0, offset, offset + length),
    flush: () => undefined,
  });
  return Object.assign(device, { allocatedBytes: bytes.length });
}

class SparseMemory implements MemoryDevice {
  readonly geometry: Geometry;
  readonly fillsBuffer = true;
  readonly #pages = new PageTable<Buffer>();
  readonly #maxPages: number;

  constructor({ size, maxBytes = Infinity, multiConn = false }: MemoryOptions) {
    if (!Number.isSafeInteger(size) || size < 0)
      throw new RangeError(`size ${size} is not an integer from 0 to 2^53-1`);
    if (!(maxBytes >= 0)) throw new RangeError(`maxBytes ${maxBytes} is not a number of bytes`);
    // The last page may be longer than the rest of the disk.
    this.#maxPages = maxBytes >= size ? Infinity : Math.floor(maxBytes / PAGE_BYTES);
    this.geometry = completeGeometry({
      ...{ size, multiConn, canFua: true, canTrim: true, canZero: true, canFastZero: true },
      contexts: [ALLOCATION_CONTEXT],
    });
  }

  get allocatedBytes(): number {
    return this.#pages.count * PAGE_BYTES;
  }

  read(offset: number, into: Buffer): void {
    for (let done = 0; done < into.length;) {
      const index = Math.floor((offset + done) / PAGE_BYTES);
      const start = (offset + done) % PAGE_BYTES;
      const length = Math.min(into.length - done, PAGE_BYTES - start);
      const page = this.#pages.get(index);
      if (page === undefined) into.fill(0, done, done + length);
      else page.copy(into, done, start, start + length);
      done += length;
    }
  }

  write(offset: number, data: Buffer): void {
    for (let done = 0; done < data.length;) {
      const index = Math.floor((offset + done) / PAGE_BYTES);
      const start = (offset + done) % PAGE_BYTES;
      const length = Math.min(data.length - done, PAGE_BYTES - start);
      const page = this.#pages.get(index) ?? this.#allocate(index, offset + done, length === PAGE_BYTES);
      data.copy(page, start, done, done + length);
      done += length;
    }
  }

  flush(): void {
    // Memory has nothing to be made durable.
  }

  zero(offset: number, length: number, { noHole }: ZeroMode): void {
    const end = offset + length;
    const first = Math.ceil(offset / PAGE_BYTES);
    // The last page may be cut off by the end of the disk.
    const last = end === this.geometry.size ? Math.ceil(end / PAGE_BYTES) : Math.floor(end / PAGE_BYTES);
    if (first >= last || noHole) {
      this.#fill(offset, end);
      return;
    }
    this.#fill(offset, first * PAGE_BYTES);
    this.#fill(last * PAGE_BYTES, end);
    this.#pages.deleteRange(first, last);
  }

  trim(offset: number, length: number): void {
    this.zero(offset, length, { noHole: false, fua: false, fastZero: false });
  }

  cache(): void {
    throw new DeviceError('ENOTSUP', 'memory has no cache');
  }

  extents(_context: string, offset: number, length: number, sink: ExtentSink): void {
    const end = offset + length;
    const endPage = Math.ceil(end / PAGE_BYTES);
    for (let at = offset; at < end;) {
      const page = Math.floor(at / PAGE_BYTES);
      const isHole = this.#pages.get(page) === undefined;
      const nextPage = isHole ? this.#pages.firstPresent(page, endPage) : this.#pages.firstAbsent(page, endPage);
      const next = Math.min(end, nextPage * PAGE_BYTES);
      if (!sink(at, next - at, isHole ? STATE_HOLE | STATE_ZERO : 0)) return;
      at = next;
    }
  }

  isHole(offset: number, length: number): boolean {
    const endPage = Math.ceil((offset + length) / PAGE_BYTES);
    return this.#pages.firstPresent(Math.floor(offset / PAGE_BYTES), endPage) === endPage;
  }

  close(): void {
    // The data stays for the next connection.
  }

  /** A new page. `isWhole`: all of it is about to be written. Errors: DeviceError ENOSPC. */
  #allocate(index: number, offset: number, isWhole: boolean): Buffer {
    if (this.#pages.count >= this.#maxPages) {
      throw new DeviceError('ENOSPC', `the disk in memory may use ${this.#maxPages * PAGE_BYTES} bytes`, { offset });
    }
    const page = isWhole ? Buffer.allocUnsafeSlow(PAGE_BYTES) : Buffer.alloc(PAGE_BYTES);
    this.#pages.set(index, page);
    return page;
  }

  /** Write zeros to the pages that are there. */
  #fill(offset: number, end: number): void {
    const endPage = Math.ceil(end / PAGE_BYTES);
    let index = Math.floor(offset / PAGE_BYTES);
    while ((index = this.#pages.firstPresent(index, endPage)) < endPage) {
      const start = index * PAGE_BYTES;
      this.#pages.get(index)?.fill(0, Math.max(0, offset - start), Math.min(PAGE_BYTES, end - start));
      index++;
    }
  }
}
