/**
 * An NBD client at the level of bytes: it sends exactly the bytes that a test gives it, valid or not, and reads answers by
 * exact lengths. It owns its socket; every wait has a time limit. It shares only the protocol's numbers with the library.
 */

import net from 'node:net';
import type { Duplex } from 'node:stream';
import { onTestFinished } from 'vitest';
import {
  CMD_FLAG,
  EXTENDED_REPLY_MAGIC,
  EXTENDED_REPLY_SIZE,
  EXTENDED_REQUEST_MAGIC,
  EXTENDED_REQUEST_SIZE,
  GREETING_SIZE,
  OPT,
  OPTION_MAGIC_HIGH,
  OPTION_MAGIC_LOW,
  OPTION_REPLY_HEADER_SIZE,
  OPTION_REPLY_MAGIC_HIGH,
  OPTION_REPLY_MAGIC_LOW,
  REP,
  REP_ERROR_BIT,
  REQUEST_HEADER_SIZE,
  REQUEST_MAGIC,
  SIMPLE_REPLY_MAGIC,
  SIMPLE_REPLY_SIZE,
  STRUCTURED_REPLY_MAGIC,
  STRUCTURED_REPLY_SIZE,
} from '../src/protocol/wire.js';

/** Time limit of a read before the test fails, milliseconds. */
const READ_BOUND_MS = 20_000;

/** FIXED_NEWSTYLE and NO_ZEROES. */
export const USUAL_CLIENT_FLAGS = 3;

export interface OptionReply {
  readonly option: number;
  readonly type: number;
  readonly data: Buffer;
}

export interface Reply {
  readonly errno: number;
  readonly cookie: bigint;
  readonly data: Buffer;
}

/** A reply of any kind, or one chunk of it. */
export interface Chunk {
  readonly kind: 'simple' | 'structured' | 'extended';
  /** Of a simple reply. */
  readonly errno: number;
  readonly isDone: boolean;
  readonly flags: number;
  readonly type: number;
  readonly cookie: bigint;
  /** Of an extended header. */
  readonly offset: bigint;
  readonly payload: Buffer;
}

export interface RequestFields {
  readonly type: number;
  readonly flags?: number;
  readonly cookie?: bigint;
  readonly offset?: number | bigint;
  readonly length?: number | bigint;
  readonly magic?: number;
}

export function uint16(value: number): Buffer {
  const bytes = Buffer.alloc(2);
  bytes.writeUInt16BE(value);
  return bytes;
}

export function uint32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
}

/** The 16 bytes before an option's data; `length` is what the header claims. */
export function optionHeader(option: number, length: number): Buffer {
  return Buffer.concat([uint32(OPTION_MAGIC_HIGH), uint32(OPTION_MAGIC_LOW), uint32(option), uint32(length)]);
}

export function optionBytes(option: number, data: Buffer = Buffer.alloc(0)): Buffer {
  return Buffer.concat([optionHeader(option, data.length), data]);
}

/** Data of INFO and GO; the length and count fields may differ from the data that follow. */
export function infoQuery(
  name: string | Buffer,
  infos: readonly number[] = [],
  claims: { readonly nameLength?: number; readonly infoCount?: number } = {},
): Buffer {
  const nameBytes = typeof name === 'string' ? Buffer.from(name) : name;
  return Buffer.concat([
    uint32(claims.nameLength ?? nameBytes.length),
    nameBytes,
    uint16(claims.infoCount ?? infos.length),
    ...infos.map(uint16),
  ]);
}

export function requestBytes(fields: RequestFields): Buffer {
  const bytes = Buffer.alloc(REQUEST_HEADER_SIZE);
  bytes.writeUInt32BE(fields.magic ?? REQUEST_MAGIC, 0);
  bytes.writeUInt16BE(fields.flags ?? 0, 4);
  bytes.writeUInt16BE(fields.type, 6);
  bytes.writeBigUInt64BE(fields.cookie ?? 0n, 8);
  bytes.writeBigUInt64BE(BigInt(fields.offset ?? 0), 16);
  bytes.writeUInt32BE(Number(fields.length ?? 0), 24);
  return bytes;
}

export function extendedRequestBytes(fields: RequestFields): Buffer {
  const bytes = Buffer.alloc(EXTENDED_REQUEST_SIZE);
  bytes.writeUInt32BE(fields.magic ?? EXTENDED_REQUEST_MAGIC, 0);
  bytes.writeUInt16BE(fields.flags ?? 0, 4);
  bytes.writeUInt16BE(fields.type, 6);
  bytes.writeBigUInt64BE(fields.cookie ?? 0n, 8);
  bytes.writeBigUInt64BE(BigInt(fields.offset ?? 0), 16);
  bytes.writeBigUInt64BE(BigInt(fields.length ?? 0), 24);
  return bytes;
}

export function uint64(value: number | bigint): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64BE(BigInt(value));
  return bytes;
}

/** Data of LIST_META_CONTEXT and SET_META_CONTEXT; the count may differ from the data that follow. */
export function metaQueries(exportName: string, queries: readonly (string | Buffer)[] = [], count?: number): Buffer {
  const withLength = (text: string | Buffer): Buffer => {
    const bytes = Buffer.from(text);
    return Buffer.concat([uint32(bytes.length), bytes]);
  };
  return Buffer.concat([withLength(exportName), uint32(count ?? queries.length), ...queries.map(withLength)]);
}

/** The fields of an error chunk. */
export function errorOf(chunk: Chunk): { errno: number; message: string; rest: Buffer } {
  const length = chunk.payload.readUInt16BE(4);
  return {
    errno: chunk.payload.readUInt32BE(0),
    message: chunk.payload.toString('utf8', 6, 6 + length),
    rest: chunk.payload.subarray(6 + length),
  };
}

export class RawClient {
  private chunks: Buffer[] = [];
  /** Received bytes that were not read yet. */
  available = 0;
  /** The server has ended the connection. */
  isOver = false;
  private wake: (() => void) | undefined;

  /** A client over a connected stream, which is destroyed at the end of the test. */
  constructor(readonly socket: Duplex) {
    socket.on('data', (chunk: Buffer) => {
      this.chunks.push(chunk);
      this.available += chunk.length;
      this.wake?.();
    });
    const over = (): void => {
      this.isOver = true;
      this.wake?.();
    };
    socket.on('end', over).on('close', over).on('error', over);
    onTestFinished(() => void socket.destroy());
  }

  static connect(address: net.NetConnectOpts): Promise<RawClient> {
    return new Promise((resolve, reject) => {
      const socket = net.connect(address);
      socket.once('error', reject);
      socket.once('connect', () => {
        socket.off('error', reject);
        resolve(new RawClient(socket));
      });
    });
  }

  send(...parts: readonly Buffer[]): void {
    this.socket.write(Buffer.concat(parts));
  }

  /** Closes the sending side; replies still arrive. */
  halfClose(): void {
    this.socket.end();
  }

  vanish(): void {
    this.socket.destroy();
  }

  /** Exactly `length` bytes. Fails if the server closes the connection before that. */
  async read(length: number): Promise<Buffer> {
    await this.bounded(() => this.available >= length || this.isOver, `${length} bytes`);
    if (this.available < length) throw new Error(`closed after ${this.available} of ${length} bytes`);
    const taken: Buffer[] = [];
    for (let missing = length; missing > 0;) {
      const chunk = this.chunks.shift() ?? Buffer.alloc(0);
      taken.push(chunk.subarray(0, missing));
      if (chunk.length > missing) this.chunks.unshift(chunk.subarray(missing));
      missing -= Math.min(missing, chunk.length);
    }
    this.available -= length;
    return Buffer.concat(taken, length);
  }

  /** All bytes up to the moment the server closes the connection. */
  async readToEnd(): Promise<Buffer> {
    await this.bounded(() => this.isOver, 'the end of the connection');
    return this.read(this.available);
  }

  // --- Handshake ---

  /** Reads the greeting and answers it. */
  async greet(clientFlags = USUAL_CLIENT_FLAGS): Promise<Buffer> {
    const greeting = await this.read(GREETING_SIZE);
    this.send(uint32(clientFlags));
    return greeting;
  }

  async readOptionReply(): Promise<OptionReply> {
    const header = await this.read(OPTION_REPLY_HEADER_SIZE);
    if (header.readUInt32BE(0) !== OPTION_REPLY_MAGIC_HIGH || header.readUInt32BE(4) !== OPTION_REPLY_MAGIC_LOW) {
      throw new Error(`not an option reply: ${header.toString('hex')}`);
    }
    const data = await this.read(header.readUInt32BE(16));
    return { option: header.readUInt32BE(8), type: header.readUInt32BE(12), data };
  }

  /** Sends an option. Returns all its replies, up to the acknowledgement or the error. */
  async option(option: number, data?: Buffer): Promise<OptionReply[]> {
    this.send(optionBytes(option, data));
    const replies: OptionReply[] = [];
    for (;;) {
      const reply = await this.readOptionReply();
      replies.push(reply);
      if (reply.type === REP.ACK || reply.type >= REP_ERROR_BIT) return replies;
    }
  }

  /** Goes from the greeting into the transmission phase. */
  async open(exportName: string): Promise<void> {
    await this.greet();
    const last = (await this.option(OPT.GO, infoQuery(exportName))).at(-1);
    if (last?.type !== REP.ACK) throw new Error(`GO was refused: ${last?.data.toString()}`);
  }

  /** Goes into the transmission phase with structured replies or extended headers, and these contexts selected. */
  async openWith(level: 'structured' | 'extended', exportName = 'disk', contexts: readonly string[] = []) {
    await this.greet();
    const option = level === 'extended' ? OPT.EXTENDED_HEADERS : OPT.STRUCTURED_REPLY;
    const replies = [await this.option(option)];
    if (contexts.length > 0) replies.push(await this.option(OPT.SET_META_CONTEXT, metaQueries(exportName, contexts)));
    replies.push(await this.option(OPT.GO, infoQuery(exportName)));
    for (const [last] of replies.map((list) => list.slice(-1))) {
      if (last?.type !== REP.ACK) throw new Error(`option ${last?.option} was refused: ${last?.data.toString()}`);
    }
  }

  // --- Transmission ---

  extendedRequest(fields: RequestFields, payload: Buffer = Buffer.alloc(0)): void {
    const isLong = payload.length > 0 && fields.length === undefined;
    const flags = (fields.flags ?? 0) | (payload.length > 0 ? CMD_FLAG.PAYLOAD_LEN : 0);
    this.send(extendedRequestBytes({ ...fields, flags, length: isLong ? payload.length : fields.length }), payload);
  }

  /** The next simple reply, without its data, or the next chunk. */
  async readChunk(): Promise<Chunk> {
    const magic = (await this.read(4)).readUInt32BE(0);
    const none = { errno: 0, isDone: true, flags: 0, type: 0, offset: 0n, payload: Buffer.alloc(0) };
    if (magic === SIMPLE_REPLY_MAGIC) {
      const header = await this.read(SIMPLE_REPLY_SIZE - 4);
      return { ...none, kind: 'simple', errno: header.readUInt32BE(0), cookie: header.readBigUInt64BE(4) };
    }
    const isExtended = magic === EXTENDED_REPLY_MAGIC;
    if (!isExtended && magic !== STRUCTURED_REPLY_MAGIC) throw new Error(`not a reply: ${magic.toString(16)}`);
    const header = await this.read((isExtended ? EXTENDED_REPLY_SIZE : STRUCTURED_REPLY_SIZE) - 4);
    const flags = header.readUInt16BE(0);
    const length = isExtended ? Number(header.readBigUInt64BE(20)) : header.readUInt32BE(12);
    return {
      ...{ kind: isExtended ? 'extended' : 'structured', errno: 0, flags, isDone: (flags & 1) !== 0 },
      type: header.readUInt16BE(2),
      cookie: header.readBigUInt64BE(4),
      offset: isExtended ? header.readBigUInt64BE(12) : 0n,
      payload: await this.read(length),
    };
  }

  /** All chunks of one reply; no other request may be in flight. */
  async readChunks(): Promise<Chunk[]> {
    const chunks: Chunk[] = [];
    do chunks.push(await this.readChunk());
    while (chunks.at(-1)?.isDone !== true);
    return chunks;
  }

  request(fields: RequestFields, payload: Buffer = Buffer.alloc(0)): void {
    this.send(requestBytes(fields), payload);
  }

  /** One reply; the length of its data, if it is a success, may depend on its cookie. */
  async readReply(dataLength: number | ((cookie: bigint) => number) = 0): Promise<Reply> {
    const header = await this.read(SIMPLE_REPLY_SIZE);
    if (header.readUInt32BE(0) !== SIMPLE_REPLY_MAGIC) throw new Error(`not a reply: ${header.toString('hex')}`);
    const errno = header.readUInt32BE(4);
    const cookie = header.readBigUInt64BE(8);
    const length = typeof dataLength === 'number' ? dataLength : dataLength(cookie);
    return { errno, cookie, data: await this.read(errno === 0 ? length : 0) };
  }

  private async bounded(isDone: () => boolean, what: string): Promise<void> {
    const bound = { isOver: false };
    const timer = setTimeout(() => {
      bound.isOver = true;
      this.wake?.();
    }, READ_BOUND_MS);
    while (!isDone() && !bound.isOver) {
      await new Promise<void>((resolve) => {
        this.wake = resolve;
      });
    }
    clearTimeout(timer);
    if (!isDone()) throw new Error(`waited ${READ_BOUND_MS} ms for ${what}, ${this.available} bytes came`);
  }
}
