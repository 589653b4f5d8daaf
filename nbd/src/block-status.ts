/**
 * The extents that answer a block status request, for all its contexts: collected from a device one context after the
 * other, neighbours joined, cut to the range asked for, to a bounded number, and all at the same byte; and written as the
 * payloads of chunks. It holds devices to what BlockDevice.extents promises; it never asks a device by itself and sends
 * nothing.
 *
 * The protocol lets each context end elsewhere. Clients that ask for two and go on from where one of them ends (libnbd's
 * users do, virtnbdbackup among them) lose what the other one had not told: so no reply has contexts of different lengths.
 */

import { ALLOCATION_CONTEXT, type ExtentSink } from './block-device.js';
import { REPLY_TYPE, writeUInt64 } from './protocol.js';

/** Extents of one reply, all contexts together: 2 MiB at most; as many as qemu gives for one. A client asks on from there. */
export const MAX_REPLY_EXTENTS = 128 * 1024;
/** Bytes of an extent, with extended headers; half of it without. */
const WIDE_EXTENT_SIZE = 16;
const MAX_FLAGS_32 = 0xffff_ffff;

/**
 * Bytes of memory that a block status may take until it is answered, at most: what was collected for the contexts so far,
 * and for one more. A short range has few extents, whatever the device says: none is shorter than a byte.
 */
export function blockStatusMemory(length: number, contextCount: number): number {
  return 2 * WIDE_EXTENT_SIZE * Math.min(MAX_REPLY_EXTENTS, contextCount * length);
}

/** The collectors of one request, in the order of its contexts. */
export class StatusReply {
  readonly collectors: ExtentCollector[] = [];
  private end: number;

  /**
   * @param contextCount how many contexts there will be
   * @param reqOne NBD_CMD_FLAG_REQ_ONE: one extent for each
   */
  constructor(
    private readonly offset: number,
    length: number,
    private readonly contextCount: number,
    private readonly reqOne: boolean,
  ) {
    this.end = offset + length;
  }

  /** Bytes that the next context is to be asked for: no more than those before it have told of. */
  get length(): number {
    return this.end - this.offset;
  }

  /** For the next context; to be filled by the device, then given to `add`. */
  next(context: string, isWide: boolean): ExtentCollector {
    return new ExtentCollector(context, this.offset, this.length, this.reqOne ? 1 : MAX_REPLY_EXTENTS, isWide);
  }

  /**
   * The device has told what it tells of this context, which may be less than it was asked for: then all contexts end
   * there. @throws Error if it told nothing
   */
  add(collector: ExtentCollector): void {
    collector.finish();
    const { collectors } = this;
    collectors.push(collector);
    // Each context still to come needs one extent at least.
    const most = this.reqOne ? collectors.length : MAX_REPLY_EXTENTS - (this.contextCount - collectors.length);
    this.end = this.offset + commonLength(collectors, most);
    for (const each of collectors) each.cutTo(this.length);
  }
}

/** The most bytes that all collectors cover with `most` extents together; `most` is not less than their number. */
function commonLength(collectors: readonly ExtentCollector[], most: number): number {
  let shortest = Infinity;
  let count = 0;
  for (const collector of collectors) {
    shortest = Math.min(shortest, collector.length);
    count += collector.count;
  }
  if (count <= most) return shortest;
  /** Of each: which extent covers the byte behind `common`, and where that ends. */
  const at = collectors.map(() => 0);
  const ends = collectors.map((collector) => collector.lengthOf(0));
  count = collectors.length;
  for (;;) {
    let common = Infinity;
    for (const end of ends) if (end < common) common = end;
    for (let i = 0; i < collectors.length; i++) {
      if (ends[i] !== common || common === shortest) continue;
      const next = (at[i] as number) + 1;
      at[i] = next;
      ends[i] = common + (collectors[i] as ExtentCollector).lengthOf(next);
      count++;
    }
    if (common === shortest || count > most) return common;
  }
}

/** The extents of one context. */
export class ExtentCollector {
  /** Length and flags of each extent, one after the other. */
  private readonly extents: number[] = [];
  private readonly end: number;
  private reached: number;
  private lastLength = 0;
  private lastFlags = 0;
  /** What the device did that it must not do. */
  private breach: string | undefined;

  /**
   * @param most extents; 1 for NBD_CMD_FLAG_REQ_ONE
   * @param isWide whether flags may have more than 32 bits
   */
  constructor(
    private readonly context: string,
    private readonly begin: number,
    length: number,
    private readonly most: number,
    private readonly isWide: boolean,
  ) {
    this.reached = begin;
    this.end = begin + length;
  }

  readonly sink: ExtentSink = (offset, length, flags) => {
    if (offset !== this.reached || !(length > 0) || !this.areFlags(flags)) {
      this.breach ??= `reported ${length} bytes at ${offset} with flags ${flags}, expected what is at ${this.reached}`;
      return false;
    }
    // Never beyond what was asked: it must not with REQ_ONE, and a length of 32 bits always holds it.
    const reached = Math.min(offset + length, this.end);
    const taken = reached - offset;
    if (this.lastLength > 0 && flags === this.lastFlags) {
      this.lastLength += taken;
    } else {
      if (this.lastLength > 0) {
        this.extents.push(this.lastLength, this.lastFlags);
        if (this.extents.length === 2 * this.most) {
          this.lastLength = 0;
          return false;
        }
      }
      this.lastLength = taken;
      this.lastFlags = flags;
    }
    this.reached = reached;
    return reached < this.end;
  };

  /** All extents are in. @throws Error if the device gave none: at least one must be sent. */
  finish(): void {
    if (this.lastLength > 0) this.extents.push(this.lastLength, this.lastFlags);
    this.lastLength = 0;
    if (this.extents.length === 0) {
      throw new Error(`the device ${this.breach ?? 'reported no extent'} (extents of ${JSON.stringify(this.context)})`);
    }
  }

  /** How many extents there are. */
  get count(): number {
    return this.extents.length / 2;
  }

  /** Bytes they cover. */
  get length(): number {
    return this.reached - this.begin;
  }

  /** Bytes of one of them. */
  lengthOf(index: number): number {
    return this.extents[2 * index] as number;
  }

  /** Leave out what lies behind the first `length` bytes, of which there are so many at least. */
  cutTo(length: number): void {
    let behind = this.length - length;
    while (behind > 0) {
      const last = this.lengthOf(this.count - 1);
      if (last > behind) this.extents[this.extents.length - 2] = last - behind;
      else this.extents.length -= 2;
      behind -= last;
    }
    this.reached = this.begin + length;
  }

  payloadSize(extendedHeaders: boolean): number {
    return extendedHeaders ? 8 + WIDE_EXTENT_SIZE * this.count : 4 + (WIDE_EXTENT_SIZE / 2) * this.count;
  }

  writePayload(target: Buffer, contextId: number, extendedHeaders: boolean): void {
    const { extents } = this;
    target.writeUInt32BE(contextId, 0);
    let at = 4;
    if (extendedHeaders) {
      target.writeUInt32BE(extents.length / 2, 4);
      at = 8;
      for (const value of extents) {
        writeUInt64(target, value, at);
        at += 8;
      }
      return;
    }
    for (const value of extents) {
      target.writeUInt32BE(value, at);
      at += 4;
    }
  }

  private areFlags(flags: number): boolean {
    return Number.isSafeInteger(flags) && flags >= 0 && (this.isWide || flags <= MAX_FLAGS_32);
  }
}

/** "only BLOCK_STATUS for structured replies, and only BLOCK_STATUS_EXT for extended headers" */
export function statusChunkType(extendedHeaders: boolean): number {
  return extendedHeaders ? REPLY_TYPE.BLOCK_STATUS_EXT : REPLY_TYPE.BLOCK_STATUS;
}

/** Whether a context's flags may have more than 32 bits. Those of the base namespace never have. */
export function isWideContext(context: string, wideContexts: readonly string[] = []): boolean {
  return context !== ALLOCATION_CONTEXT && wideContexts.includes(context);
}
