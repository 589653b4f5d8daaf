/**
 * The transmission phase, client side: from bytes to answered requests. It owns the parser's state and trusts nothing:
 * every reply must fit a request that waits for it, every chunk the range of its request, and no more memory is used than
 * the request allows. It sends nothing and has no socket.
 */

import {
  CMD,
  CMD_FLAG,
  decodeString,
  EXTENDED_REPLY_MAGIC,
  EXTENDED_REPLY_SIZE,
  MAX_CHUNK_EXTENTS,
  MAX_STRING_BYTES,
  NBD_ERRNO,
  readUInt64,
  REPLY_FLAG_DONE,
  REPLY_TYPE,
  REPLY_TYPE_ERROR_BIT,
  SIMPLE_REPLY_MAGIC,
  SIMPLE_REPLY_SIZE,
  STRUCTURED_REPLY_MAGIC,
  STRUCTURED_REPLY_SIZE,
} from '../protocol/wire.js';
import { asError } from './argument-checks.js';
import { Coverage } from './coverage.js';
import type { Watched } from './silence-watch.js';

/** The layout of requests and replies: simple replies, structured ones, or extended headers both ways. */
export type ReplyLevel = 'simple' | 'structured' | 'extended';

/** A range of an export and its flags in a meta context. */
export interface Extent {
  readonly offset: number;
  readonly length: number;
  /** Defined by the context; for `base:allocation` STATE_HOLE and STATE_ZERO. */
  readonly flags: number;
}

/** The server's answer to a request that failed. */
export interface ReplyFailure {
  readonly errno: number;
  readonly message: string | undefined;
  readonly offset: number | undefined;
}

/** A request that waits for its reply. Its callbacks must not throw, except `onHole`. */
export interface PendingReply {
  readonly type: number;
  readonly flags: number;
  readonly offset: number;
  readonly length: number;
  /** The buffer for a read's data, exactly `length` bytes. */
  readonly into?: Uint8Array | undefined;
  /** Called for each hole of a read; its zeros are filled in anyway. It belongs to the user, and may throw. */
  readonly onHole?: ((offset: number, length: number) => void) | undefined;
  /** The ids of the contexts whose status is expected, each once. */
  readonly contextIds?: readonly number[] | undefined;
  readonly onExtents?: ((contextId: number, extents: Extent[]) => void) | undefined;
  /** Called once, when the whole reply has arrived. `thrown`: what `onHole` has thrown. */
  readonly finish: (failure: ReplyFailure | undefined, thrown: Error | undefined) => void;
  /** Called instead when the connection is lost. */
  readonly lose: (cause: Error) => void;
}

/** The longest error chunk accepted, bytes; the standard ones have at most 6 + 4096 + 8. */
const MAX_ERROR_PAYLOAD = 64 * 1024;

/** A reply that has arrived in part. */
class Progress implements Watched {
  failure: ReplyFailure | undefined;
  thrown: Error | undefined;
  contentChunks = 0;
  readonly covered = new Coverage();
  /** Undefined for a request of no contexts. */
  readonly contextsSeen: Set<number> | undefined;
  parts = 0;
  sentEnd = 0;
  /** The caller has given up: the reply is checked like any other, and goes nowhere. */
  isDiscarded = false;

  constructor(readonly pending: PendingReply) {
    this.contextsSeen = pending.contextIds === undefined ? undefined : new Set();
  }
}

export class ReplyReader {
  /** In the order in which they were sent. */
  readonly #waiting = new Map<number, Progress>();
  /** Those of `waiting` whose callers still wait. */
  #wanted = 0;
  /** Called when no caller waits any more. */
  onIdle: (() => void) | undefined;
  readonly #header = Buffer.alloc(EXTENDED_REPLY_SIZE);
  #headerFill = 0;
  #headerSize: number;
  #isDead = false;

  /** The chunk whose payload is arriving. */
  #current: Progress | undefined;
  #isLast = false;
  #type = 0;
  /** Collects a payload that is decoded as a whole. */
  #gathered: Buffer | undefined;
  #gatheredFill = 0;
  /** Where data go (undefined: nowhere), and how many bytes are still to arrive. */
  #dataInto: Uint8Array | undefined;
  #dataAt = 0;
  #dataLeft = 0;

  readonly #level: ReplyLevel;
  /** The server violated the protocol; no further input is parsed. */
  readonly #violated: (message: string) => void;

  constructor(level: ReplyLevel, violated: (message: string) => void) {
    this.#level = level;
    this.#violated = violated;
    this.#headerSize = level === 'extended' ? EXTENDED_REPLY_SIZE : SIMPLE_REPLY_SIZE;
  }

  has(cookie: number): boolean {
    return this.#waiting.has(cookie);
  }

  /** No caller waits for a reply. */
  get isIdle(): boolean {
    return this.#wanted === 0;
  }

  /** The oldest request in flight. */
  oldest(): Watched | undefined {
    for (const progress of this.#waiting.values()) return progress;
    return undefined;
  }

  /** @param sentEnd see Watched */
  expect(cookie: number, pending: PendingReply, sentEnd: number): void {
    const progress = new Progress(pending);
    progress.sentEnd = sentEnd;
    this.#waiting.set(cookie, progress);
    this.#wanted++;
  }

  /** The caller has given up: its memory is not touched from now on, and neither `finish` nor `lose` will be called. */
  discard(cookie: number): void {
    const progress = this.#waiting.get(cookie);
    if (progress === undefined || progress.isDiscarded) return;
    progress.isDiscarded = true;
    // The rest of the data that is arriving goes nowhere.
    if (this.#current === progress) this.#dataInto = undefined;
    this.#unwant();
  }

  /** No more replies will arrive: every request fails with `cause`. */
  abandon(cause: Error): void {
    this.#isDead = true;
    this.#dataInto = undefined;
    for (const { pending, isDiscarded } of this.#waiting.values()) if (!isDiscarded) pending.lose(cause);
    this.#waiting.clear();
    this.#wanted = 0;
    this.onIdle?.();
  }

  /** An operation of several requests has begun: the client is not idle until `release`. */
  hold(): void {
    this.#wanted++;
  }

  release(): void {
    // After `abandon` nothing is counted.
    if (!this.#isDead) this.#unwant();
  }

  #unwant(): void {
    if (--this.#wanted === 0) this.onIdle?.();
  }

  feed(chunk: Buffer): void {
    let at = 0;
    while (at < chunk.length && !this.#isDead) {
      if (this.#dataLeft > 0) at += this.#takeData(chunk, at);
      else if (this.#gathered !== undefined) at += this.#gather(chunk, at, this.#gathered);
      else at += this.#takeHeader(chunk, at);
    }
  }

  #takeHeader(chunk: Buffer, at: number): number {
    const taken = chunk.copy(this.#header, this.#headerFill, at, at + this.#headerSize - this.#headerFill);
    this.#headerFill += taken;
    if (this.#headerFill < this.#headerSize) return taken;
    const magic = this.#header.readUInt32BE(0);
    if (this.#level === 'structured' && magic === STRUCTURED_REPLY_MAGIC && this.#headerFill < STRUCTURED_REPLY_SIZE) {
      this.#headerSize = STRUCTURED_REPLY_SIZE;
      return taken;
    }
    this.#headerFill = 0;
    if (this.#level === 'extended') {
      if (magic === EXTENDED_REPLY_MAGIC) this.#takeChunkHeader(readUInt64(this.#header, 24));
      else this.#violation('a reply that is not an extended one');
    } else if (this.#headerSize === STRUCTURED_REPLY_SIZE) {
      this.#headerSize = SIMPLE_REPLY_SIZE;
      this.#takeChunkHeader(this.#header.readUInt32BE(16));
    } else if (magic === SIMPLE_REPLY_MAGIC) {
      this.#takeSimpleReply();
    } else {
      this.#violation('a reply with a wrong magic');
    }
    return taken;
  }

  #find(): Progress | undefined {
    return this.#header.readUInt32BE(8) === 0 ? this.#waiting.get(this.#header.readUInt32BE(12)) : undefined;
  }

  #takeSimpleReply(): void {
    const progress = this.#find();
    if (progress === undefined) return this.#violation('a reply to no request');
    const { type, offset, length } = progress.pending;
    const errno = this.#header.readUInt32BE(4);
    if (this.#level === 'structured') {
      if (type === CMD.READ) return this.#violation('a simple reply to a read');
      if (type === CMD.BLOCK_STATUS && errno === 0) return this.#violation('a block status without extents');
    }
    this.#current = progress;
    this.#isLast = true;
    progress.parts++;
    if (errno !== 0) progress.failure = { errno, message: undefined, offset: undefined };
    if (errno === 0 && type === CMD.READ && length > 0) {
      progress.covered.add(offset, offset + length);
      this.#expectData(progress, 0, length);
    } else {
      this.#endChunk();
    }
  }

  /** The header of a chunk is in `header`; `length` bytes of payload follow it. */
  #takeChunkHeader(length: number): void {
    const progress = this.#find();
    if (progress === undefined) return this.#violation('a reply to no request');
    if (this.#level === 'extended' && readUInt64(this.#header, 16) !== progress.pending.offset) {
      return this.#violation('a reply with the offset of another request');
    }
    const flags = this.#header.readUInt16BE(4);
    this.#type = this.#header.readUInt16BE(6);
    this.#isLast = (flags & REPLY_FLAG_DONE) !== 0;
    this.#current = progress;
    progress.parts++;
    const command = progress.pending.type;

    if ((this.#type & REPLY_TYPE_ERROR_BIT) !== 0) {
      if (length < 6 || length > MAX_ERROR_PAYLOAD) return this.#violation(`an error of ${length} bytes`);
      this.#expectPayload(length);
    } else if (this.#type === REPLY_TYPE.NONE) {
      if (length !== 0 || !this.#isLast) return this.#violation('an empty chunk that is not empty or not the last');
      this.#endChunk();
    } else if (this.#type === REPLY_TYPE.OFFSET_DATA && command === CMD.READ) {
      if (length < 9 || length - 8 > progress.pending.length) return this.#violation(`${length} bytes of data`);
      if (!this.#countContent(progress)) return;
      // The offset is read first, then the data into their place.
      this.#dataLeft = 0;
      this.#dataAt = length - 8;
      this.#expectPayload(8);
    } else if (this.#type === REPLY_TYPE.OFFSET_HOLE && command === CMD.READ) {
      if (length !== 12) return this.#violation(`a hole of ${length} bytes`);
      if (!this.#countContent(progress)) return;
      this.#expectPayload(length);
    } else if (this.#isStatusType() && command === CMD.BLOCK_STATUS) {
      const [head, each] = this.#level === 'extended' ? [8, 16] : [4, 8];
      const count = (length - head) / each;
      const most = (progress.pending.flags & CMD_FLAG.REQ_ONE) !== 0 ? 1 : MAX_CHUNK_EXTENTS;
      if (!Number.isInteger(count) || count < 1 || count > most) {
        return this.#violation(`a block status of ${length} bytes`);
      }
      this.#expectPayload(length);
    } else {
      this.#violation(`a chunk of type ${this.#type} in reply to command ${command}`);
    }
  }

  #isStatusType(): boolean {
    return this.#type === (this.#level === 'extended' ? REPLY_TYPE.BLOCK_STATUS_EXT : REPLY_TYPE.BLOCK_STATUS);
  }

  /** False if a read with DF has more than one content chunk. */
  #countContent(progress: Progress): boolean {
    progress.contentChunks++;
    if (progress.contentChunks === 1 || (progress.pending.flags & CMD_FLAG.DF) === 0) return true;
    this.#violation('a reply in pieces to a read with DF');
    return false;
  }

  #expectPayload(length: number): void {
    this.#gathered = Buffer.allocUnsafe(length);
    this.#gatheredFill = 0;
  }

  #gather(chunk: Buffer, at: number, gathered: Buffer): number {
    const taken = chunk.copy(gathered, this.#gatheredFill, at);
    this.#gatheredFill += taken;
    if (this.#gatheredFill === gathered.length) {
      this.#gathered = undefined;
      const current = this.#current;
      if (current === undefined) throw new Error('reply-reader: a payload of nothing');
      this.#takePayload(current, gathered);
    }
    return taken;
  }

  #takePayload(progress: Progress, payload: Buffer): void {
    if ((this.#type & REPLY_TYPE_ERROR_BIT) !== 0) this.#takeError(progress, payload);
    else if (this.#type === REPLY_TYPE.OFFSET_DATA) this.#beginData(progress, readUInt64(payload, 0), this.#dataAt);
    else if (this.#type === REPLY_TYPE.OFFSET_HOLE) this.#takeHole(progress, payload);
    else this.#takeExtents(progress, payload);
  }

  #takeError(progress: Progress, payload: Buffer): void {
    const errno = payload.readUInt32BE(0);
    const messageLength = payload.readUInt16BE(4);
    const hasOffset = this.#type === REPLY_TYPE.ERROR_OFFSET;
    if (errno === 0 || messageLength > MAX_STRING_BYTES || 6 + messageLength + (hasOffset ? 8 : 0) > payload.length) {
      return this.#violation('a malformed error');
    }
    const message = decodeString(payload.subarray(6, 6 + messageLength));
    let offset: number | undefined;
    if (hasOffset) {
      offset = readUInt64(payload, 6 + messageLength);
      const { pending } = progress;
      if (offset < pending.offset || offset - pending.offset >= Math.max(1, pending.length)) {
        return this.#violation('an error outside its request');
      }
    }
    // The first error counts; others may follow for other parts.
    progress.failure ??= { errno, message: message === '' ? undefined : message, offset };
    this.#endChunk();
  }

  #beginData(progress: Progress, offset: number, length: number): void {
    if (!this.#cover(progress, offset, length)) return;
    this.#expectData(progress, offset - progress.pending.offset, length);
  }

  #takeHole(progress: Progress, payload: Buffer): void {
    const offset = readUInt64(payload, 0);
    const length = payload.readUInt32BE(8);
    if (!this.#cover(progress, offset, length)) return;
    const { into, onHole } = progress.pending;
    if (!progress.isDiscarded) {
      const at = offset - progress.pending.offset;
      into?.fill(0, at, at + length);
      try {
        onHole?.(offset, length);
      } catch (error) {
        // The call fails with it, when its reply is complete: the next reply begins there.
        progress.thrown ??= asError(error);
      }
    }
    this.#endChunk();
  }

  /** False if the range is not part of what this read still lacks. */
  #cover(progress: Progress, offset: number, length: number): boolean {
    const { pending, covered } = progress;
    const isInside = length > 0 && offset >= pending.offset && offset - pending.offset <= pending.length - length;
    if (!isInside) this.#violation('data outside of the requested range');
    else if (!covered.add(offset, offset + length)) this.#violation('data that overlaps, or comes in too many pieces');
    return !this.#isDead;
  }

  #expectData(progress: Progress, at: number, length: number): void {
    this.#dataInto = progress.isDiscarded ? undefined : progress.pending.into;
    this.#dataAt = at;
    this.#dataLeft = length;
  }

  #takeData(chunk: Buffer, at: number): number {
    const end = Math.min(chunk.length, at + this.#dataLeft);
    const taken = end - at;
    if (this.#dataInto !== undefined) chunk.copy(this.#dataInto, this.#dataAt, at, end);
    if (this.#current !== undefined) this.#current.parts++;
    this.#dataAt += taken;
    this.#dataLeft -= taken;
    if (this.#dataLeft === 0) {
      this.#dataInto = undefined;
      this.#endChunk();
    }
    return taken;
  }

  #takeExtents(progress: Progress, payload: Buffer): void {
    const { pending, contextsSeen } = progress;
    const isWide = this.#level === 'extended';
    const contextId = payload.readUInt32BE(0);
    const count = isWide ? (payload.length - 8) / 16 : (payload.length - 4) / 8;
    if (isWide && payload.readUInt32BE(4) !== count) return this.#violation('a block status with a wrong count');
    if (contextsSeen === undefined || !pending.contextIds?.includes(contextId) || contextsSeen.has(contextId)) {
      return this.#violation(`a block status of context ${contextId}, which was not requested`);
    }
    contextsSeen.add(contextId);
    const extents: Extent[] = [];
    const end = pending.offset + pending.length;
    let offset = pending.offset;
    for (let index = 0; index < count; index++) {
      const at = isWide ? 8 + 16 * index : 4 + 8 * index;
      const length = isWide ? readUInt64(payload, at) : payload.readUInt32BE(at);
      const flags = isWide ? readUInt64(payload, at + 8) : payload.readUInt32BE(at + 4);
      // "the sum of the length fields of the first N-1 extents MUST be less than the requested length"
      if (length === 0 || offset >= end) return this.#violation('an empty extent, or one beyond the requested range');
      if ((pending.flags & CMD_FLAG.REQ_ONE) !== 0 && length > pending.length) {
        return this.#violation('an extent longer than the requested range');
      }
      if (!Number.isFinite(flags)) {
        progress.failure ??= { errno: NBD_ERRNO.EOVERFLOW, message: 'flags of more than 53 bits', offset: undefined };
      }
      // The last one may reach beyond the requested range.
      extents.push({ offset, length: Math.min(length, end - offset), flags });
      offset += length;
    }
    if (!progress.isDiscarded) pending.onExtents?.(contextId, extents);
    this.#endChunk();
  }

  /** The chunk in `current` is complete; with the last one the reply is. */
  #endChunk(): void {
    const progress = this.#current;
    const isLast = this.#isLast;
    this.#current = undefined;
    if (progress === undefined || !isLast) return;
    const { pending, failure, covered, contextsSeen } = progress;
    if (failure === undefined) {
      if (pending.type === CMD.READ && covered.bytes !== pending.length) {
        return this.#violation(`a read of ${pending.length} bytes answered with ${covered.bytes}`);
      }
      if (pending.contextIds !== undefined && contextsSeen?.size !== pending.contextIds.length) {
        return this.#violation('a block status that lacks a context');
      }
    }
    this.#waiting.delete(this.#header.readUInt32BE(12));
    if (progress.isDiscarded) return;
    pending.finish(failure, progress.thrown);
    this.#unwant();
  }

  #violation(message: string): void {
    this.#isDead = true;
    this.#violated(message);
  }
}
