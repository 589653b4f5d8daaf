/**
 * How a reply looks on the wire. The kind of reply a connection speaks is chosen here, once, from what was negotiated;
 * the reply queue only asks for header sizes and writes headers through it. It never allocates and never sends.
 */

import { SIMPLE_REPLY_MAGIC, SIMPLE_REPLY_SIZE, type Negotiated } from './protocol.js';

export interface ReplyEncoder {
  /** Bytes before the data of a successful read. */
  readonly readHeaderSize: number;
  /** Bytes of a reply without data. Never more than a read header, so a read that fails fits where it was to be. */
  readonly statusSize: number;
  writeReadHeader(
    target: Buffer,
    at: number,
    cookieHigh: number,
    cookieLow: number,
    offset: number,
    length: number,
  ): void;
  /** `errno` 0 means success. */
  writeStatus(target: Buffer, at: number, cookieHigh: number, cookieLow: number, errno: number): void;
}

/** proto.md, "Simple reply message". */
const simpleReplies: ReplyEncoder = {
  readHeaderSize: SIMPLE_REPLY_SIZE,
  statusSize: SIMPLE_REPLY_SIZE,
  writeReadHeader(target, at, cookieHigh, cookieLow) {
    writeSimpleReply(target, at, cookieHigh, cookieLow, 0);
  },
  writeStatus(target, at, cookieHigh, cookieLow, errno) {
    writeSimpleReply(target, at, cookieHigh, cookieLow, errno);
  },
};

function writeSimpleReply(target: Buffer, at: number, cookieHigh: number, cookieLow: number, errno: number): void {
  target.writeUInt32BE(SIMPLE_REPLY_MAGIC, at);
  target.writeUInt32BE(errno, at + 4);
  target.writeUInt32BE(cookieHigh, at + 8);
  target.writeUInt32BE(cookieLow, at + 12);
}

/** The encoder for a connection. Structured replies and extended headers will be chosen here. */
export function chooseReplyEncoder(_negotiated: Negotiated): ReplyEncoder {
  return simpleReplies;
}
