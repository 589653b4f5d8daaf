/**
 * Checks the server's output against its input, byte by byte. Written from the protocol's text, independently of the library: it
 * shares only the protocol's numbers with it.
 */

import {
  CMD,
  CMD_FLAG,
  EXTENDED_REPLY_MAGIC,
  EXTENDED_REQUEST_MAGIC,
  MAX_PAYLOAD,
  OPT,
  REP,
  REPLY_TYPE,
  REQUEST_MAGIC,
  SIMPLE_REPLY_MAGIC,
  STRUCTURED_REPLY_MAGIC,
} from '../../src/protocol/wire.js';

type Level = 'simple' | 'structured' | 'extended';

interface Asked {
  readonly type: number;
  readonly flags: number;
  readonly cookie: bigint;
  readonly offset: bigint;
  /** Effect length. */
  readonly length: bigint;
  covered: bigint;
  pieces: [bigint, bigint][];
  contexts: Set<number>;
  /** Bytes covered by the contexts so far, and the sum of their extents. */
  statusBytes: bigint | undefined;
  statusExtents: number;
  hasFailed: boolean;
}

const IHAVEOPT = 0x49484156454f5054n;
const REPLY_MAGIC = 0x3e889045565a9n;
const ERRNOS = new Set([1, 5, 12, 22, 28, 75, 95, 108]);

class Malformed extends Error {}

function must(holds: boolean, what: string): asserts holds {
  if (!holds) throw new Malformed(what);
}

class Cursor {
  at = 0;

  constructor(readonly bytes: Buffer) {}

  get left(): number {
    return this.bytes.length - this.at;
  }

  take(length: number): Buffer | undefined {
    if (this.left < length) return undefined;
    this.at += length;
    return this.bytes.subarray(this.at - length, this.at);
  }
}

/**
 * Throws if `output` is not what a server may answer to `input`.
 * @param isComplete the client waited for the end: then every whole request must have its reply
 */
export function checkServerOutput(input: Buffer, output: Buffer, isComplete: boolean): void {
  const said = new Cursor(output);
  const heard = new Cursor(input);
  const greeting = said.take(18);
  if (greeting === undefined) return must(!isComplete, 'no greeting');
  must(greeting.toString('latin1', 0, 16) === 'NBDMAGICIHAVEOPT' && greeting.readUInt16BE(16) === 3, 'a bad greeting');
  const clientFlags = heard.take(4)?.readUInt32BE(0) ?? 0;
  const level = checkOptions(heard, said, clientFlags);
  if (level === undefined) return must(said.left === 0, 'bytes after the handshake that did not succeed');
  checkTransmission(heard, said, level, isComplete);
}

/** The level, if the handshake led to the transmission phase; leaves both cursors at its beginning. */
function checkOptions(heard: Cursor, said: Cursor, clientFlags: number): Level | undefined {
  let isStructured = false;
  let isExtended = false;
  let isSelected = false;
  for (;;) {
    const header = heard.take(16);
    if (header === undefined || header.readBigUInt64BE(0) !== IHAVEOPT) return undefined;
    const option = header.readUInt32BE(8);
    if (heard.take(header.readUInt32BE(12)) === undefined) return undefined;
    if (said.left === 0) return undefined;
    if (option === OPT.EXPORT_NAME) {
      const answer = said.take((clientFlags & 2) !== 0 ? 10 : 134);
      must(answer !== undefined && !isExtended, 'an export that was opened by name');
      must((answer.readUInt16BE(8) & 1) !== 0, 'transmission flags');
      must(
        answer.subarray(10).every((byte) => byte === 0),
        'zeros that are not',
      );
      must(((answer.readUInt16BE(8) & (1 << 7)) !== 0) === isStructured, 'SEND_DF');
      return isStructured ? 'structured' : 'simple';
    }
    for (;;) {
      const reply = said.take(20);
      must(reply !== undefined && reply.readBigUInt64BE(0) === REPLY_MAGIC, 'an option reply');
      must(reply.readUInt32BE(8) === option, 'a reply to another option');
      const type = reply.readUInt32BE(12);
      const data = said.take(reply.readUInt32BE(16));
      must(data !== undefined, 'option reply data');
      if (type >= 0x80000000) {
        must(data.length <= 4096 && type <= REP.ERR_EXT_HEADER_REQD, 'an error reply');
        break;
      }
      if (type === REP.ACK) {
        must(data.length === 0, 'ACK with data');
        if (option === OPT.STRUCTURED_REPLY) isStructured = true;
        if (option === OPT.EXTENDED_HEADERS) isExtended = isStructured = true;
        if (option === OPT.GO) return isExtended ? 'extended' : isStructured ? 'structured' : 'simple';
        if (option === OPT.ABORT) return undefined;
        break;
      }
      const expected = new Map<number, number[]>([
        [OPT.LIST, [REP.SERVER]],
        [OPT.INFO, [REP.INFO]],
        [OPT.GO, [REP.INFO]],
        [OPT.LIST_META_CONTEXT, [REP.META_CONTEXT]],
        [OPT.SET_META_CONTEXT, [REP.META_CONTEXT]],
      ]);
      must(expected.get(option)?.includes(type) === true, `reply type ${type} to option ${option}`);
      if (type === REP.SERVER) must(data.length >= 4 && data.readUInt32BE(0) <= data.length - 4, 'a list entry');
      if (type === REP.META_CONTEXT) {
        must((isStructured || option === OPT.LIST_META_CONTEXT) && data.includes(':', 4), 'a meta context');
        isSelected ||= option === OPT.SET_META_CONTEXT;
      }
      if (type === REP.INFO) {
        const info = data.readUInt16BE(0);
        must(info !== 0 || data.length === 12, 'NBD_INFO_EXPORT');
        must(info !== 3 || data.length === 14, 'NBD_INFO_BLOCK_SIZE');
        if (info === 0) must(((data.readUInt16BE(10) & (1 << 7)) !== 0) === isStructured, 'SEND_DF');
        if (info === 0) must((data.readUInt16BE(10) & (1 << 12)) === 0 || (isExtended && isSelected), 'STATUS_PAYLOAD');
      }
    }
  }
}

function checkTransmission(heard: Cursor, said: Cursor, level: Level, isComplete: boolean): void {
  const waiting = new Map<bigint, Asked[]>();
  const isCleanEnd = readRequests(heard, level, waiting);
  while (said.left > 0) if (!checkReply(said, level, waiting)) break;
  if (!isComplete) return;
  must(said.left === 0, 'half a reply');
  if (isCleanEnd)
    must(
      Array.from(waiting.values()).every((list) => list.length === 0),
      'a request without a reply',
    );
}

/** All whole requests, up to one that must end the connection. False if there is one. */
function readRequests(heard: Cursor, level: Level, waiting: Map<bigint, Asked[]>): boolean {
  const isExtended = level === 'extended';
  for (;;) {
    const header = heard.take(isExtended ? 32 : 28);
    if (header === undefined) return true;
    if (header.readUInt32BE(0) !== (isExtended ? EXTENDED_REQUEST_MAGIC : REQUEST_MAGIC)) return false;
    const flags = header.readUInt16BE(4);
    const type = header.readUInt16BE(6);
    if (type === CMD.DISC) return true;
    let length = isExtended ? header.readBigUInt64BE(24) : BigInt(header.readUInt32BE(24));
    const hasPayload = type === CMD.WRITE || (isExtended && (flags & CMD_FLAG.PAYLOAD_LEN) !== 0);
    if (hasPayload) {
      if (length > (isExtended ? MAX_PAYLOAD : 2 * MAX_PAYLOAD)) return false;
      const payload = heard.take(Number(length));
      if (payload === undefined) return true;
      if (type === CMD.BLOCK_STATUS && payload.length >= 8) length = payload.readBigUInt64BE(0);
    }
    const cookie = header.readBigUInt64BE(8);
    const asked = { type, flags, cookie, offset: header.readBigUInt64BE(16), length };
    const list = waiting.get(cookie) ?? [];
    list.push({
      ...asked,
      covered: 0n,
      pieces: [],
      contexts: new Set(),
      statusBytes: undefined,
      statusExtents: 0,
      hasFailed: false,
    });
    waiting.set(cookie, list);
  }
}

/** One reply or chunk. False if the output ends within it. */
function checkReply(said: Cursor, level: Level, waiting: Map<bigint, Asked[]>): boolean {
  if (said.left < 4) return false;
  const magic = said.bytes.readUInt32BE(said.at);
  if (magic === SIMPLE_REPLY_MAGIC) {
    must(level !== 'extended', 'a simple reply among extended ones');
    const header = said.take(16);
    if (header === undefined) return false;
    const errno = header.readUInt32BE(4);
    const cookie = header.readBigUInt64BE(8);
    const list = waiting.get(cookie) ?? [];
    must(list.length > 0, 'a reply to nothing');
    // It may belong to any of several requests with this cookie.
    const fits = (asked: Asked): boolean =>
      level === 'simple' || (asked.type !== CMD.READ && asked.type !== CMD.BLOCK_STATUS);
    const asked = list.find(fits);
    must(asked !== undefined, 'a simple reply to a read');
    must(errno === 0 || ERRNOS.has(errno), `error ${errno}`);
    if (level === 'structured') must(errno === 0, 'an error without words');
    list.splice(list.indexOf(asked), 1);
    if (errno === 0 && asked.type === CMD.READ) {
      must(asked.length <= BigInt(MAX_PAYLOAD), 'a read that is too long');
      return said.take(Number(asked.length)) !== undefined;
    }
    return true;
  }
  must(magic === (level === 'extended' ? EXTENDED_REPLY_MAGIC : STRUCTURED_REPLY_MAGIC), 'a reply magic');
  must(level !== 'simple', 'a chunk among simple replies');
  const header = said.take(level === 'extended' ? 32 : 20);
  if (header === undefined) return false;
  const flags = header.readUInt16BE(4);
  const type = header.readUInt16BE(6);
  const length = level === 'extended' ? Number(header.readBigUInt64BE(24)) : header.readUInt32BE(16);
  must((flags & ~1) === 0 && length <= MAX_PAYLOAD + 8, 'a chunk header');
  const list = waiting.get(header.readBigUInt64BE(8)) ?? [];
  const fits = (asked: Asked): boolean =>
    (level !== 'extended' || asked.offset === header.readBigUInt64BE(16)) && mayAnswer(type, asked);
  const asked = list.find(fits);
  must(asked !== undefined, `a chunk of type ${type} to nothing`);
  const payload = said.take(length);
  if (payload === undefined) return false;
  checkChunk(level, type, payload, asked);
  if ((flags & 1) !== 0) {
    list.splice(list.indexOf(asked), 1);
    if (!asked.hasFailed && asked.type === CMD.READ) must(asked.covered === asked.length, 'not all of a read');
    if (!asked.hasFailed && asked.type === CMD.BLOCK_STATUS) must(asked.contexts.size > 0, 'no context');
  } else {
    must(type !== REPLY_TYPE.NONE && type < 0x8000, 'a chunk that must be the last');
  }
  return true;
}

function mayAnswer(type: number, asked: Asked): boolean {
  if (type === REPLY_TYPE.OFFSET_DATA || type === REPLY_TYPE.OFFSET_HOLE) return asked.type === CMD.READ;
  if (type === REPLY_TYPE.BLOCK_STATUS || type === REPLY_TYPE.BLOCK_STATUS_EXT) return asked.type === CMD.BLOCK_STATUS;
  return true;
}

function checkChunk(level: Level, type: number, payload: Buffer, asked: Asked): void {
  const end = asked.offset + asked.length;
  switch (type) {
    case REPLY_TYPE.NONE:
      return must(payload.length === 0, 'an empty chunk');
    case REPLY_TYPE.OFFSET_DATA:
    case REPLY_TYPE.OFFSET_HOLE: {
      must(type === REPLY_TYPE.OFFSET_DATA ? payload.length >= 9 : payload.length === 12, 'a content chunk');
      const from = payload.readBigUInt64BE(0);
      const size = type === REPLY_TYPE.OFFSET_DATA ? BigInt(payload.length - 8) : BigInt(payload.readUInt32BE(8));
      must(size > 0n && from >= asked.offset && from + size <= end, 'content outside its request');
      must(
        asked.pieces.every(([a, b]) => from + size <= a || from >= b),
        'content that overlaps',
      );
      asked.pieces.push([from, from + size]);
      asked.covered += size;
      return must(asked.pieces.length === 1 || (asked.flags & CMD_FLAG.DF) === 0, 'pieces in spite of DF');
    }
    case REPLY_TYPE.BLOCK_STATUS:
    case REPLY_TYPE.BLOCK_STATUS_EXT: {
      const isWide = type === REPLY_TYPE.BLOCK_STATUS_EXT;
      must(isWide === (level === 'extended'), 'the type of block status');
      const [head, each] = isWide ? [8, 16] : [4, 8];
      const count = (payload.length - head) / each;
      must(Number.isInteger(count) && count >= 1 && count <= 2 ** 20, 'the size of a block status');
      if (isWide) must(payload.readUInt32BE(4) === count, 'the count of a block status');
      const id = payload.readUInt32BE(0);
      must(!asked.contexts.has(id), 'a context twice');
      asked.contexts.add(id);
      let sum = 0n;
      let before: bigint | undefined;
      for (let at = head; at < payload.length; at += each) {
        must(sum < asked.length, 'an extent behind the requested range');
        const size = isWide ? payload.readBigUInt64BE(at) : BigInt(payload.readUInt32BE(at));
        const status = isWide ? payload.readBigUInt64BE(at + 8) : BigInt(payload.readUInt32BE(at + 4));
        must(size > 0n, 'an empty extent');
        must(status !== before, 'extents that were not joined');
        before = status;
        sum += size;
      }
      must(sum <= asked.length, 'more than was asked for');
      must(asked.statusBytes === undefined || asked.statusBytes === sum, 'contexts of different lengths');
      asked.statusBytes = sum;
      asked.statusExtents += count;
      must(asked.statusExtents <= 128 * 1024, 'too many extents in one reply');
      return must((asked.flags & CMD_FLAG.REQ_ONE) === 0 || count === 1, 'more than one extent');
    }
    case REPLY_TYPE.ERROR:
    case REPLY_TYPE.ERROR_OFFSET: {
      const tail = type === REPLY_TYPE.ERROR ? 0 : 8;
      must(payload.length >= 6 + tail && ERRNOS.has(payload.readUInt32BE(0)), 'an error');
      const words = payload.readUInt16BE(4);
      must(words === payload.length - 6 - tail && words <= 4096, 'the length of a message');
      must(!payload.subarray(6, 6 + words).includes(0), 'NUL in a message');
      new TextDecoder('utf-8', { fatal: true }).decode(payload.subarray(6, 6 + words));
      if (tail > 0) {
        const at = payload.readBigUInt64BE(payload.length - 8);
        must(at >= asked.offset && at < end, 'an error outside its request');
      }
      asked.hasFailed = true;
      return;
    }
    default:
      must(false, `chunk type ${type}`);
  }
}
