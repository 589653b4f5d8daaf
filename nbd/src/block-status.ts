/**
 * The extents that answer a block status request, for one context: collected from a device, neighbours joined, cut to
 * the range asked for and to a bounded number, and written as the payload of a chunk. It holds devices to what
 * BlockDevice.extents promises; it never asks a device by itself and sends nothing.
 */

import { ALLOCATION_CONTEXT, type ExtentSink } from './block-device.js';
import { REPLY_TYPE, writeUInt64 } from './protocol.js';

/** Extents of one reply, all contexts together: 256 KiB at most. A client asks on from where a reply ends. */
export const MAX_REPLY_EXTENTS = 16 * 1024;
const MAX_FLAGS_32 = 0xffff_ffff;

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
    offset: number,
    length: number,
    private readonly most: number,
    private readonly isWide: boolean,
  ) {
    this.reached = offset;
    this.end = offset + length;
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

  payloadSize(extendedHeaders: boolean): number {
    const count = this.extents.length / 2;
    return extendedHeaders ? 8 + 16 * count : 4 + 8 * count;
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
