/**
 * The layout of replies on the wire. The kind of reply of a connection is chosen here, once, from what was negotiated; the
 * reply queue gets sizes and writes headers through it. It never allocates on the path of a request that succeeds, and
 * never sends.
 *
 * Simple replies have a header and a read's data. Chunked ones (structured, or extended with headers of 32 bytes that
 * repeat the request's offset) also carry holes, several pieces, block status, and error messages.
 */

import {
  EXTENDED_REPLY_MAGIC,
  EXTENDED_REPLY_SIZE,
  REPLY_FLAG_DONE,
  REPLY_TYPE,
  SIMPLE_REPLY_MAGIC,
  SIMPLE_REPLY_SIZE,
  STRUCTURED_REPLY_MAGIC,
  STRUCTURED_REPLY_SIZE,
  writeUInt64,
  type Negotiated,
} from '../protocol/wire.js';

/** What a reply repeats of its request, as received: the offset may be larger than a number can hold exactly. */
export interface Addressee {
  readonly cookieHigh: number;
  readonly cookieLow: number;
  readonly offsetHigh: number;
  readonly offsetLow: number;
}

/** A copy that survives the decoding of the next request. */
export function addresseeOf({ cookieHigh, cookieLow, offsetHigh, offsetLow }: Addressee): Addressee {
  return { cookieHigh, cookieLow, offsetHigh, offsetLow };
}

export interface ReplyEncoder {
  /** Bytes before the data of a successful read that is answered in one piece. */
  readonly readHeaderSize: number;
  /** Bytes of a successful reply without data. */
  readonly doneSize: number;
  /** Bytes of the header of a chunk; 0 if replies are simple and there are no chunks. */
  readonly chunkHeaderSize: number;
  /** The header of a read's reply with `length` bytes of data in one piece. */
  writeReadHeader(
    target: Buffer,
    at: number,
    cookieHigh: number,
    cookieLow: number,
    offset: number,
    length: number,
  ): void;
  /** Success of a request other than a read. The offset is the request's as received, in halves like the cookie. */
  writeDone(
    target: Buffer,
    at: number,
    cookieHigh: number,
    cookieLow: number,
    offsetHigh: number,
    offsetLow: number,
  ): void;
  /** An error as a simple reply. Chunked replies have error chunks instead. */
  writeError(target: Buffer, at: number, cookieHigh: number, cookieLow: number, errno: number): void;
  /** The header of a chunk with a payload of `length` bytes. */
  writeChunkHeader(target: Buffer, at: number, flags: number, type: number, to: Addressee, length: number): void;
}

/** Bytes of an offset, at the front of the payload of a data or hole chunk. */
export const CHUNK_OFFSET_SIZE = 8;
/** Payload of a hole chunk. */
export const HOLE_PAYLOAD_SIZE = 12;

/** proto.md, "Simple reply message". */
const simpleReplies: ReplyEncoder = {
  readHeaderSize: SIMPLE_REPLY_SIZE,
  doneSize: SIMPLE_REPLY_SIZE,
  chunkHeaderSize: 0,
  writeReadHeader(target, at, cookieHigh, cookieLow) {
    writeSimpleReply(target, at, cookieHigh, cookieLow, 0);
  },
  writeDone(target, at, cookieHigh, cookieLow) {
    writeSimpleReply(target, at, cookieHigh, cookieLow, 0);
  },
  writeError: writeSimpleReply,
  writeChunkHeader: unreachable,
};

/** proto.md, "Structured reply chunk message". */
const structuredReplies: ReplyEncoder = {
  readHeaderSize: STRUCTURED_REPLY_SIZE + CHUNK_OFFSET_SIZE,
  // "a simple reply MAY be used as a reply to any request other than READ": 4 bytes less, and libnbd, which fetches a
  // reply's header in pieces, saves a system call.
  doneSize: SIMPLE_REPLY_SIZE,
  chunkHeaderSize: STRUCTURED_REPLY_SIZE,
  writeReadHeader(target, at, cookieHigh, cookieLow, offset, length) {
    const payload = length + CHUNK_OFFSET_SIZE;
    writeStructured(target, at, REPLY_FLAG_DONE, REPLY_TYPE.OFFSET_DATA, cookieHigh, cookieLow, payload);
    writeUInt64(target, offset, at + STRUCTURED_REPLY_SIZE);
  },
  writeDone(target, at, cookieHigh, cookieLow) {
    writeSimpleReply(target, at, cookieHigh, cookieLow, 0);
  },
  writeError: unreachable,
  writeChunkHeader(target, at, flags, type, to, length) {
    writeStructured(target, at, flags, type, to.cookieHigh, to.cookieLow, length);
  },
};

/** proto.md of extension-ext-header, "Extended reply chunk message". */
const extendedReplies: ReplyEncoder = {
  readHeaderSize: EXTENDED_REPLY_SIZE + CHUNK_OFFSET_SIZE,
  doneSize: EXTENDED_REPLY_SIZE,
  chunkHeaderSize: EXTENDED_REPLY_SIZE,
  writeReadHeader(target, at, cookieHigh, cookieLow, offset, length) {
    const payload = length + CHUNK_OFFSET_SIZE;
    writeExtended(target, at, REPLY_FLAG_DONE, REPLY_TYPE.OFFSET_DATA, cookieHigh, cookieLow, payload);
    writeUInt64(target, offset, at + 16);
    writeUInt64(target, offset, at + EXTENDED_REPLY_SIZE);
  },
  writeDone(target, at, cookieHigh, cookieLow, offsetHigh, offsetLow) {
    writeExtended(target, at, REPLY_FLAG_DONE, REPLY_TYPE.NONE, cookieHigh, cookieLow, 0);
    target.writeUInt32BE(offsetHigh, at + 16);
    target.writeUInt32BE(offsetLow, at + 20);
  },
  writeError: unreachable,
  writeChunkHeader(target, at, flags, type, to, length) {
    writeExtended(target, at, flags, type, to.cookieHigh, to.cookieLow, length);
    target.writeUInt32BE(to.offsetHigh, at + 16);
    target.writeUInt32BE(to.offsetLow, at + 20);
  },
};

function writeSimpleReply(target: Buffer, at: number, cookieHigh: number, cookieLow: number, errno: number): void {
  target.writeUInt32BE(SIMPLE_REPLY_MAGIC, at);
  target.writeUInt32BE(errno, at + 4);
  target.writeUInt32BE(cookieHigh, at + 8);
  target.writeUInt32BE(cookieLow, at + 12);
}

function writeStructured(
  target: Buffer,
  at: number,
  flags: number,
  type: number,
  cookieHigh: number,
  cookieLow: number,
  length: number,
): void {
  target.writeUInt32BE(STRUCTURED_REPLY_MAGIC, at);
  target.writeUInt16BE(flags, at + 4);
  target.writeUInt16BE(type, at + 6);
  target.writeUInt32BE(cookieHigh, at + 8);
  target.writeUInt32BE(cookieLow, at + 12);
  target.writeUInt32BE(length, at + 16);
}

/** All but the offset. */
function writeExtended(
  target: Buffer,
  at: number,
  flags: number,
  type: number,
  cookieHigh: number,
  cookieLow: number,
  length: number,
): void {
  target.writeUInt32BE(EXTENDED_REPLY_MAGIC, at);
  target.writeUInt16BE(flags, at + 4);
  target.writeUInt16BE(type, at + 6);
  target.writeUInt32BE(cookieHigh, at + 8);
  target.writeUInt32BE(cookieLow, at + 12);
  writeUInt64(target, length, at + 24);
}

function unreachable(): never {
  throw new Error('reply-encoder: not a reply of the negotiated kind');
}

/** The encoder for a connection. */
export function chooseReplyEncoder(negotiated: Negotiated): ReplyEncoder {
  if (negotiated.extendedHeaders) return extendedReplies;
  return negotiated.structuredReplies ? structuredReplies : simpleReplies;
}
