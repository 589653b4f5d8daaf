/**
 * The extents that answer a block status request, for all its contexts: collected from a device one context after the
 * other, neighbours joined, cut to the requested range, to a bounded number, and all at the same byte; and written as the
 * payloads of chunks. It checks what BlockDevice.extents promises; it never calls a device and sends nothing.
 *
 * The protocol lets each context end at a different byte. Clients that query two contexts and continue where one of them
 * ends (users of libnbd do, for example virtnbdbackup) miss the rest of the other one: so all contexts of a reply end at
 * the same byte.
 */

import { ALLOCATION_CONTEXT, type ExtentSink } from '../block-device.js';
import { REPLY_TYPE, writeUInt64 } from '../protocol/wire.js';

/** Most extents of one reply, all contexts together: 2 MiB; as many as qemu sends for one. A client continues from there. */
export const MAX_REPLY_EXTENTS = 128 * 1024;
/** Bytes of an extent, in memory and with extended headers; half of that without. */
const WIDE_EXTENT_SIZE = 16;
/** Extents per memory chunk of 64 KiB, which are reused. Most answers have few extents, in a first chunk of 1 KiB. */
const CHUNK_EXTENTS = 4096;
const FIRST_EXTENTS = 64;
/** Most extents of one reply without memory from the budget: it needs no chunk. Not less than the contexts of a request. */
export const OWN_REPLY_EXTENTS = FIRST_EXTENTS;
/** Chunks kept for reuse: 4 MiB, which is what the longest answer takes. */
const KEPT_CHUNKS = 64;
const MAX_FLAGS_32 = 0xffff_ffff;

/**
 * The most memory that a block status may use until its reply, bytes: the extents of the contexts so far, and those of one more
 * context or the reply. A short range has few extents, since none is shorter than a byte.
 */
export function blockStatusMemory(length: number, contextCount: number): number {
  const extents = Math.min(MAX_REPLY_EXTENTS, contextCount * length);
  // The last chunk of each context may be almost empty.
  return WIDE_EXTENT_SIZE * (2 * extents + contextCount * Math.min(CHUNK_EXTENTS, length));
}

/** The collectors of one request, in the order of its contexts. */
export class StatusReply {
  readonly collectors: ExtentCollector[] = [];
  #end: number;

  readonly #offset: number;
  readonly #contextCount: number;
  readonly #reqOne: boolean;
  readonly #most: number;

  /**
   * @param contextCount the number of contexts
   * @param reqOne NBD_CMD_FLAG_REQ_ONE: one extent for each
   * @param most the most extents of all contexts together
   */
  constructor(offset: number, length: number, contextCount: number, reqOne: boolean, most = MAX_REPLY_EXTENTS) {
    this.#offset = offset;
    this.#contextCount = contextCount;
    this.#reqOne = reqOne;
    this.#most = most;
    this.#end = offset + length;
  }

  /** Bytes to query for the next context: no more than the earlier contexts cover. */
  get length(): number {
    return this.#end - this.#offset;
  }

  /** A collector for the next context: the device fills it, then the caller passes it to `add`. */
  next(context: string, isWide: boolean): ExtentCollector {
    return new ExtentCollector(context, this.#offset, this.length, this.#reqOne ? 1 : this.#most, isWide);
  }

  /**
   * The device has reported the extents of this context. They may cover less than was requested: then all contexts end there.
   * Errors: Error if there is none.
   */
  add(collector: ExtentCollector): void {
    collector.finish();
    const { collectors } = this;
    collectors.push(collector);
    // Each context still to come needs one extent at least.
    const most = this.#reqOne ? collectors.length : this.#most - (this.#contextCount - collectors.length);
    this.#end = this.#offset + commonLength(collectors, most);
    for (const each of collectors) each.cutTo(this.length);
  }

  /** The reply is written: the memory of the extents can be reused. */
  release(): void {
    for (const collector of this.collectors) collector.release();
  }
}

/**
 * The most bytes that all collectors cover with `most` extents together; `most` is not less than their number. A binary search:
 * as many steps as a length has bits, however many extents there are.
 */
function commonLength(collectors: readonly ExtentCollector[], most: number): number {
  let longest = Infinity;
  for (const collector of collectors) longest = Math.min(longest, collector.length);
  if (extentsWithin(collectors, longest) <= most) return longest;
  // A byte needs one extent of each.
  let enough = 1;
  let tooMuch = longest;
  while (tooMuch - enough > 1) {
    const middle = enough + Math.floor((tooMuch - enough) / 2);
    if (extentsWithin(collectors, middle) <= most) enough = middle;
    else tooMuch = middle;
  }
  return enough;
}

/** How many extents cover the first `length` bytes of all contexts. */
function extentsWithin(collectors: readonly ExtentCollector[], length: number): number {
  let count = 0;
  for (const collector of collectors) count += collector.countWithin(length);
  return count;
}

/** Memory chunks for reuse, of CHUNK_EXTENTS each. */
const spareChunks: Float64Array[] = [];

/** The extents of one context. */
export class ExtentCollector {
  /** The number of extents. */
  count = 0;
  /** For each extent its end, relative to the first extent's offset, and its flags. */
  readonly #first: Float64Array;
  readonly #chunks: Float64Array[] = [];
  readonly #end: number;
  #reached: number;
  #lastFlags = 0;
  #isFinished = false;
  /** How the device broke the contract of ExtentSink. */
  #breach: string | undefined;

  readonly #context: string;
  readonly #begin: number;
  readonly #most: number;
  readonly #isWide: boolean;

  /**
   * @param most the most extents; 1 for NBD_CMD_FLAG_REQ_ONE
   * @param isWide whether flags may have more than 32 bits
   */
  constructor(context: string, begin: number, length: number, most: number, isWide: boolean) {
    this.#context = context;
    this.#begin = begin;
    this.#most = most;
    this.#isWide = isWide;
    this.#first = new Float64Array(2 * Math.min(most, FIRST_EXTENTS));
    this.#reached = begin;
    this.#end = begin + length;
  }

  readonly sink: ExtentSink = (offset, length, flags) => {
    if (this.#isFinished) return false;
    if (offset !== this.#reached || !isExtentLength(length) || !this.#areFlags(flags)) {
      const found = `${shown(length)} bytes at ${shown(offset)} with flags ${shown(flags)}`;
      this.#breach ??= `reported ${found}, expected an extent at ${this.#reached}`;
      return false;
    }
    if (this.count === 0 || flags !== this.#lastFlags) {
      if (this.count === this.#most) return false;
      this.count++;
      this.#lastFlags = flags;
    }
    // Never beyond the requested range: forbidden with REQ_ONE, and so the length always fits into 32 bits.
    const reached = Math.min(offset + length, this.#end);
    this.#reached = reached;
    this.#set(this.count - 1, reached - this.#begin, flags);
    return reached < this.#end;
  };

  /** All extents are reported. Errors: Error if there is none, since at least one must be sent. */
  finish(): void {
    this.#isFinished = true;
    if (this.count === 0) {
      throw new Error(
        `the device ${this.#breach ?? 'reported no extent'} (extents of ${JSON.stringify(this.#context)})`,
      );
    }
  }

  /** Bytes that the extents cover. */
  get length(): number {
    return this.#reached - this.#begin;
  }

  /** How many extents cover the first `length` bytes; all extents together cover at least that. */
  countWithin(length: number): number {
    let low = 0;
    let high = this.count - 1;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if (this.#endOf(middle) >= length) high = middle;
      else low = middle + 1;
    }
    return low + 1;
  }

  /** Drop everything after the first `length` bytes; all extents together cover at least that. */
  cutTo(length: number): void {
    if (length === this.length) return;
    this.count = this.countWithin(length);
    this.#set(this.count - 1, length, this.#flagsOf(this.count - 1));
    this.#reached = this.#begin + length;
    const chunks = Math.ceil(Math.max(0, this.count - FIRST_EXTENTS) / CHUNK_EXTENTS);
    while (this.#chunks.length > chunks) this.#releaseChunk();
  }

  /** Give its memory back. It must not be used any more; a device that still reports extents is told that it can stop. */
  release(): void {
    this.#isFinished = true;
    while (this.#chunks.length > 0) this.#releaseChunk();
  }

  payloadSize(extendedHeaders: boolean): number {
    return extendedHeaders ? 8 + WIDE_EXTENT_SIZE * this.count : 4 + (WIDE_EXTENT_SIZE / 2) * this.count;
  }

  writePayload(target: Buffer, contextId: number, extendedHeaders: boolean): void {
    target.writeUInt32BE(contextId, 0);
    let at = 4;
    if (extendedHeaders) {
      target.writeUInt32BE(this.count, 4);
      at = 8;
    }
    let begin = 0;
    for (let index = 0; index < this.count; index++) {
      const end = this.#endOf(index);
      if (extendedHeaders) {
        writeUInt64(target, end - begin, at);
        writeUInt64(target, this.#flagsOf(index), at + 8);
        at += WIDE_EXTENT_SIZE;
      } else {
        target.writeUInt32BE(end - begin, at);
        target.writeUInt32BE(this.#flagsOf(index), at + 4);
        at += WIDE_EXTENT_SIZE / 2;
      }
      begin = end;
    }
  }

  #set(index: number, end: number, flags: number): void {
    if (index < FIRST_EXTENTS) {
      this.#first[2 * index] = end;
      this.#first[2 * index + 1] = flags;
      return;
    }
    const at = index - FIRST_EXTENTS;
    const number = Math.floor(at / CHUNK_EXTENTS);
    let chunk = this.#chunks[number];
    if (chunk === undefined) {
      chunk = spareChunks.pop() ?? new Float64Array(2 * CHUNK_EXTENTS);
      this.#chunks.push(chunk);
    }
    chunk[2 * (at % CHUNK_EXTENTS)] = end;
    chunk[2 * (at % CHUNK_EXTENTS) + 1] = flags;
  }

  #endOf(index: number): number {
    return this.#at(index, 0);
  }

  #flagsOf(index: number): number {
    return this.#at(index, 1);
  }

  #at(index: number, what: 0 | 1): number {
    if (index < FIRST_EXTENTS) return this.#first[2 * index + what] as number;
    const at = index - FIRST_EXTENTS;
    const chunk = this.#chunks[Math.floor(at / CHUNK_EXTENTS)] as Float64Array;
    return chunk[2 * (at % CHUNK_EXTENTS) + what] as number;
  }

  #releaseChunk(): void {
    const chunk = this.#chunks.pop();
    if (chunk !== undefined && spareChunks.length < KEPT_CHUNKS) spareChunks.push(chunk);
  }

  #areFlags(flags: number): boolean {
    return Number.isSafeInteger(flags) && flags >= 0 && (this.#isWide || flags <= MAX_FLAGS_32);
  }
}

/** Whether an extent may have this length: whole bytes, and it may reach beyond the end of the export. */
export function isExtentLength(length: unknown): length is number {
  return typeof length === 'number' && length > 0 && (Number.isInteger(length) || length === Infinity);
}

/** What a device gave for a number, for a message. */
function shown(value: unknown): string {
  return typeof value === 'number' ? String(value) : `(a ${typeof value})`;
}

/** "only BLOCK_STATUS for structured replies, and only BLOCK_STATUS_EXT for extended headers" */
export function statusChunkType(extendedHeaders: boolean): number {
  return extendedHeaders ? REPLY_TYPE.BLOCK_STATUS_EXT : REPLY_TYPE.BLOCK_STATUS;
}

/** Whether a context's flags may have more than 32 bits. Those of the base namespace never have. */
export function isWideContext(context: string, wideContexts: readonly string[] = []): boolean {
  return context !== ALLOCATION_CONTEXT && wideContexts.includes(context);
}
