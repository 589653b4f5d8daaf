/**
 * Which parts of a read are sent as data and which as holes. It owns that decision and the layout of the chunks in one block
 * of memory; it calls no device and sends nothing.
 */

import { STATE_ZERO, type ExtentSink } from '../block-device.js';
import { REPLY_FLAG_DONE, REPLY_TYPE, writeUInt64 } from '../protocol/wire.js';
import { isExtentLength } from './block-status.js';
import { CHUNK_OFFSET_SIZE, HOLE_PAYLOAD_SIZE, type Addressee, type ReplyEncoder } from './reply-encoder.js';

/** For shorter reads the device is not asked for holes, bytes. */
export const SPARSE_READ_BYTES = 128 * 1024;
/** A shorter hole is sent as data, bytes: a chunk for it costs both sides more. */
const LEAST_HOLE_BYTES = 4096;
/** "the server SHOULD use chunks with lengths and offsets as an integer multiple of 512 bytes, where possible" */
const CHUNK_ALIGNMENT = 512;
/** Most chunks of one read; the remainder is sent as data. Limits the headers, and the device's reads for one request. */
const MAX_CHUNKS = 128;

/** A part of a read that is sent as one chunk. */
export interface Part {
  readonly offset: number;
  readonly length: number;
  readonly isHole: boolean;
}

export class ReadPlan {
  readonly #end: number;
  /** The end of the extents reported so far. */
  #covered: number;
  #zerosFrom: number | undefined;
  /** The device may still call the sink, which then has no effect. */
  #isFinished = false;
  readonly #parts: Part[] = [];
  /** `parts` covers everything before this offset. */
  #planned: number;

  readonly #offset: number;
  readonly #length: number;

  constructor(offset: number, length: number) {
    this.#offset = offset;
    this.#length = length;
    this.#end = offset + length;
    this.#covered = offset;
    this.#planned = offset;
  }

  /** For BlockDevice.extents. Ranges not reported, or reported out of order, count as data. */
  readonly sink: ExtentSink = (offset, length, flags) => {
    if (this.#isFinished || offset !== this.#covered || !isExtentLength(length)) return false;
    if (!Number.isSafeInteger(flags)) return false;
    const isZero = (flags & STATE_ZERO) !== 0;
    if (isZero) this.#zerosFrom ??= offset;
    else this.#endZeros();
    this.#covered = Math.min(offset + length, this.#end);
    return this.#covered < this.#end && this.#parts.length < MAX_CHUNKS - 2;
  };

  /** No extents are known: the whole range is data. */
  forget(): void {
    this.#parts.length = 0;
    this.#planned = this.#offset;
    this.#zerosFrom = undefined;
    this.#covered = this.#end;
  }

  /** The parts in ascending order, covering the whole range. */
  finish(): readonly Part[] {
    if (this.#isFinished) return this.#parts;
    this.#isFinished = true;
    this.#endZeros();
    this.#addData(this.#end);
    return this.#parts;
  }

  #endZeros(): void {
    const from = this.#zerosFrom;
    if (from === undefined) return;
    this.#zerosFrom = undefined;
    const start = from === this.#offset ? from : Math.ceil(from / CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT;
    const end = this.#covered === this.#end ? this.#end : Math.floor(this.#covered / CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT;
    if (end - start < LEAST_HOLE_BYTES) return;
    this.#addData(start);
    this.#parts.push({ offset: start, length: end - start, isHole: true });
    this.#planned = end;
  }

  #addData(end: number): void {
    if (end === this.#planned) return;
    this.#parts.push({ offset: this.#planned, length: end - this.#planned, isHole: false });
    this.#planned = end;
  }
}

/** Bytes of a reply made of `parts`. */
export function sizeOfParts(parts: readonly Part[], encoder: ReplyEncoder): number {
  let bytes = 0;
  for (const { length, isHole } of parts) {
    bytes += encoder.chunkHeaderSize + (isHole ? HOLE_PAYLOAD_SIZE : CHUNK_OFFSET_SIZE + length);
  }
  return bytes;
}

/** Write the headers and holes of the reply. Returns one buffer for each data part, for the device to fill. */
export function layParts(target: Buffer, parts: readonly Part[], to: Addressee, encoder: ReplyEncoder): Buffer[] {
  const data: Buffer[] = [];
  let at = 0;
  parts.forEach(({ offset, length, isHole }, index) => {
    const flags = index === parts.length - 1 ? REPLY_FLAG_DONE : 0;
    const type = isHole ? REPLY_TYPE.OFFSET_HOLE : REPLY_TYPE.OFFSET_DATA;
    const payload = isHole ? HOLE_PAYLOAD_SIZE : CHUNK_OFFSET_SIZE + length;
    encoder.writeChunkHeader(target, at, flags, type, to, payload);
    at += encoder.chunkHeaderSize;
    writeUInt64(target, offset, at);
    if (isHole) target.writeUInt32BE(length, at + CHUNK_OFFSET_SIZE);
    else data.push(target.subarray(at + CHUNK_OFFSET_SIZE, at + payload));
    at += payload;
  });
  return data;
}
