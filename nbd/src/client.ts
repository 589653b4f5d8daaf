/**
 * A small NBD client: fixed newstyle, simple replies, requests pipelined as promises. It is for tests, tools and backups
 * inside a program; it keeps no cache and retries nothing. It owns its socket from connect() to the end.
 */

import net from 'node:net';
import type { Duplex } from 'node:stream';
import type { DeviceErrorCode, ExportInfo } from './block-device.js';
import { ByteReader } from './byte-reader.js';
import { connectTls, type ClientTls } from './tls.js';
import {
  CMD,
  CMD_FLAG,
  decodeString,
  encodeInfoRequest,
  encodeOption,
  encodeRequest,
  errorName,
  EXPORT_NAME_PADDING,
  GREETING_SIZE,
  HANDSHAKE_FLAG,
  INFO,
  MAX_PAYLOAD,
  NBD_MAGIC_HIGH,
  NBD_MAGIC_LOW,
  OPT,
  OPTION_MAGIC_HIGH,
  OPTION_MAGIC_LOW,
  OPTION_REPLY_HEADER_SIZE,
  OPTION_REPLY_MAGIC_HIGH,
  OPTION_REPLY_MAGIC_LOW,
  readUInt64,
  REP,
  REP_ERROR_BIT,
  SIMPLE_REPLY_MAGIC,
  SIMPLE_REPLY_SIZE,
  TRANSMISSION_FLAG,
} from './protocol.js';

/** Where the server is: an address, or a socket somebody else connected (`head`: bytes already received on it). */
export type ClientOptions = (
  | { readonly path: string }
  | { readonly host: string; readonly port: number }
  | { readonly socket: Duplex; readonly head?: Buffer }
) & {
  /** Go on over TLS only: a server that will not, or that does not prove itself, is refused. */
  readonly tls?: ClientTls;
};

/** What a server says of an export. Sizes in bytes. */
export interface ExportDetails {
  readonly size: number;
  readonly readOnly: boolean;
  readonly canFlush: boolean;
  readonly canFua: boolean;
  readonly canTrim: boolean;
  readonly canZero: boolean;
  readonly canFastZero: boolean;
  readonly canCache: boolean;
  readonly multiConn: boolean;
  readonly rotational: boolean;
  readonly minimumBlockSize: number;
  readonly preferredBlockSize: number;
  readonly maximumPayload: number;
  /** The server's own name for the export, if it told. */
  readonly name: string | undefined;
  readonly description: string | undefined;
}

/**
 * The NBD error of a failed request; UNKNOWN_EXPORT, POLICY, UNSUPPORTED, INVALID, TLS_REQUIRED and REFUSED for a failed
 * option; TLS_FAILED if TLS was asked for and could not be had; PROTOCOL if the server does not speak NBD; CLOSED if the connection is gone or in the wrong phase.
 */
export type NbdClientErrorCode =
  | DeviceErrorCode
  | 'UNKNOWN_EXPORT'
  | 'POLICY'
  | 'UNSUPPORTED'
  | 'INVALID'
  | 'TLS_REQUIRED'
  | 'TLS_FAILED'
  | 'REFUSED'
  | 'PROTOCOL'
  | 'CLOSED';

export class NbdClientError extends Error {
  constructor(
    readonly code: NbdClientErrorCode,
    message: string,
    options?: ErrorOptions,
  ) {
    super(message, options);
    this.name = 'NbdClientError';
  }
}

/** An option reply of more bytes is not believed. */
const MAX_OPTION_REPLY_BYTES = 64 * 1024;
/** How long disconnect() waits for the server to close its side, milliseconds. */
const DISCONNECT_WAIT_MS = 2_000;

const OPTION_ERROR_CODES: ReadonlyMap<number, NbdClientErrorCode> = new Map<number, NbdClientErrorCode>([
  [REP.ERR_UNSUP, 'UNSUPPORTED'],
  [REP.ERR_POLICY, 'POLICY'],
  [REP.ERR_INVALID, 'INVALID'],
  [REP.ERR_TLS_REQD, 'TLS_REQUIRED'],
  [REP.ERR_UNKNOWN, 'UNKNOWN_EXPORT'],
  [REP.ERR_SHUTDOWN, 'ESHUTDOWN'],
]);

interface OptionReply {
  readonly type: number;
  readonly data: Buffer;
}

interface PendingReply {
  /** Where a read's data goes. */
  readonly into: Buffer | undefined;
  readonly resolve: () => void;
  readonly reject: (error: NbdClientError) => void;
  /** For messages: "read of 4096 bytes at 0". */
  readonly what: string;
}

export class NbdClient {
  private readonly reader: ByteReader;
  private phase: 'options' | 'transmission' | 'closed' = 'options';
  private noZeroes = false;
  private failure: NbdClientError | undefined;
  private nextCookie = 1;
  private readonly pending = new Map<number, PendingReply>();
  private readonly replyHeader = Buffer.alloc(SIMPLE_REPLY_SIZE);
  private headerFill = 0;
  /** The read whose data is arriving, and how much of it has. */
  private filling: PendingReply | undefined;
  private filled = 0;
  private readonly socketGone: Promise<void>;

  private constructor(private socket: Duplex) {
    this.reader = new ByteReader(socket);
    this.socketGone = new Promise((resolve) => {
      socket.once('close', () => {
        this.fail(new NbdClientError('CLOSED', 'the connection is closed'));
        resolve();
      });
    });
    this.listen(socket);
  }

  private listen(socket: Duplex): void {
    socket.on('data', this.onOptionData);
    socket.on('error', (error) => {
      this.fail(new NbdClientError('CLOSED', `the connection failed: ${error.message}`, { cause: error }));
    });
    socket.on('end', this.onEnd);
    // Whoever handed it over may have paused it.
    socket.resume();
  }

  private readonly onEnd = (): void => {
    const { socket } = this;
    this.fail(new NbdClientError('CLOSED', 'the server closed the connection'));
    // A socket that was handed over may allow half-open connections and would stay.
    socket.end(() => socket.destroy());
  };

  /**
   * Connect and exchange greetings; next is list(), info() or go().
   * @throws NbdClientError TLS_FAILED if `tls` was asked for and could not be had, CLOSED if there is no connection, PROTOCOL if the peer is no fixed-newstyle NBD server
   */
  static async connect(options: ClientOptions): Promise<NbdClient> {
    const client = new NbdClient('socket' in options ? options.socket : await connectSocket(options));
    if ('socket' in options && options.head !== undefined) client.reader.feed(options.head);
    try {
      await client.greet();
      if (options.tls !== undefined) await client.startTls(options.tls, 'host' in options ? options.host : 'localhost');
    } catch (error) {
      client.socket.destroy();
      throw error;
    }
    return client;
  }

  /** The exports the server lists (NBD_OPT_LIST). */
  async list(): Promise<ExportInfo[]> {
    const exports: ExportInfo[] = [];
    for (const { type, data } of await this.option(OPT.LIST, Buffer.alloc(0))) {
      if (type !== REP.SERVER) continue;
      const nameLength = data.length >= 4 ? data.readUInt32BE(0) : Infinity;
      if (nameLength > data.length - 4) throw this.protocolError('a malformed list entry');
      const name = decodeString(data.subarray(4, 4 + nameLength));
      const description = decodeString(data.subarray(4 + nameLength));
      if (name === undefined || description === undefined) throw this.protocolError('a list entry that is no text');
      exports.push({ name, description });
    }
    return exports;
  }

  /** What go() would give, without opening the export (NBD_OPT_INFO). */
  async info(exportName: string): Promise<ExportDetails> {
    return this.details(await this.option(OPT.INFO, infoQuery(exportName)));
  }

  /** Open an export (NBD_OPT_GO, or NBD_OPT_EXPORT_NAME with a server that lacks it). Afterwards requests may be made. */
  async go(exportName: string): Promise<ExportDetails> {
    let details: ExportDetails;
    try {
      details = this.details(await this.option(OPT.GO, infoQuery(exportName)));
    } catch (error) {
      if (!(error instanceof NbdClientError) || error.code !== 'UNSUPPORTED') throw error;
      details = await this.exportName(exportName);
    }
    this.phase = 'transmission';
    this.socket.off('data', this.onOptionData);
    this.socket.on('data', this.onReplyData);
    const rest = this.reader.takeRest();
    if (rest.length > 0) this.onReplyData(rest);
    return details;
  }

  /** `length` bytes at `offset`; at most MAX_PAYLOAD at a time. */
  async read(offset: number, length: number): Promise<Buffer> {
    const into = Buffer.allocUnsafe(length);
    await this.readInto(offset, into);
    return into;
  }

  /** Fill `into` with the bytes at `offset`. */
  readInto(offset: number, into: Buffer): Promise<void> {
    return this.request(CMD.READ, 0, offset, into.length, 'read', into);
  }

  /** Write `data` at `offset`; it must not change until the promise settles. */
  write(offset: number, data: Buffer, options: { readonly fua?: boolean } = {}): Promise<void> {
    return this.request(CMD.WRITE, options.fua ? CMD_FLAG.FUA : 0, offset, data.length, 'write', undefined, data);
  }

  zero(
    offset: number,
    length: number,
    options: { readonly fua?: boolean; readonly noHole?: boolean; readonly fastZero?: boolean } = {},
  ): Promise<void> {
    const flags =
      (options.fua ? CMD_FLAG.FUA : 0) |
      (options.noHole ? CMD_FLAG.NO_HOLE : 0) |
      (options.fastZero ? CMD_FLAG.FAST_ZERO : 0);
    return this.request(CMD.WRITE_ZEROES, flags, offset, length, 'zero');
  }

  trim(offset: number, length: number, options: { readonly fua?: boolean } = {}): Promise<void> {
    return this.request(CMD.TRIM, options.fua ? CMD_FLAG.FUA : 0, offset, length, 'trim');
  }

  flush(): Promise<void> {
    return this.request(CMD.FLUSH, 0, 0, 0, 'flush');
  }

  cache(offset: number, length: number): Promise<void> {
    return this.request(CMD.CACHE, 0, offset, length, 'cache');
  }

  /** Say goodbye and close: NBD_OPT_ABORT or NBD_CMD_DISC, by phase. Requests in flight are answered first. */
  async disconnect(): Promise<void> {
    if (this.phase === 'options') await this.option(OPT.ABORT, Buffer.alloc(0)).catch(() => undefined);
    else if (this.phase === 'transmission' && this.socket.writable)
      this.socket.write(encodeRequest(CMD.DISC, 0, 0, 0, 0));
    // Not end(): a socket without half-open connections would be closed by it before the last answers came.
    const timer = setTimeout(() => this.socket.destroy(), DISCONNECT_WAIT_MS);
    if (this.socket.readableEnded || this.phase === 'options') this.socket.destroy();
    await this.socketGone;
    clearTimeout(timer);
  }

  /** Drop the connection without a word. */
  destroy(): void {
    this.socket.destroy();
  }

  // --- Options ---

  private async greet(): Promise<void> {
    const greeting = await this.reader.read(GREETING_SIZE);
    if (
      greeting.readUInt32BE(0) !== NBD_MAGIC_HIGH ||
      greeting.readUInt32BE(4) !== NBD_MAGIC_LOW ||
      greeting.readUInt32BE(8) !== OPTION_MAGIC_HIGH ||
      greeting.readUInt32BE(12) !== OPTION_MAGIC_LOW
    ) {
      throw this.protocolError('not a newstyle NBD server');
    }
    const offered = greeting.readUInt16BE(16);
    if ((offered & HANDSHAKE_FLAG.FIXED_NEWSTYLE) === 0) throw this.protocolError('the server is not fixed newstyle');
    const flags = Buffer.alloc(4);
    flags.writeUInt32BE(offered & (HANDSHAKE_FLAG.FIXED_NEWSTYLE | HANDSHAKE_FLAG.NO_ZEROES), 0);
    this.noZeroes = (offered & HANDSHAKE_FLAG.NO_ZEROES) !== 0;
    this.socket.write(flags);
  }

  /** The next bytes are under TLS, or there are none: from the first doubt on nothing more is sent. */
  private async startTls(tls: ClientTls, host: string): Promise<void> {
    const plain = this.socket;
    try {
      await this.option(OPT.STARTTLS, Buffer.alloc(0));
      plain.off('data', this.onOptionData);
      plain.off('end', this.onEnd);
      plain.pause();
      // Nothing may follow the acknowledgement in the clear.
      if (this.reader.unread > 0) throw new Error('bytes in the clear after the acknowledgement of NBD_OPT_STARTTLS');
      this.socket = await connectTls(plain, tls, host);
    } catch (error) {
      plain.destroy();
      const why = `no TLS with the server, which was asked for: ${(error as Error).message}`;
      throw new NbdClientError('TLS_FAILED', why, { cause: error });
    }
    this.reader.moveTo(this.socket);
    this.listen(this.socket);
  }

  /** Send an option; its replies up to the acknowledgement. Throws what an error reply says. */
  private async option(option: number, data: Buffer): Promise<OptionReply[]> {
    if (this.phase !== 'options') throw new NbdClientError('CLOSED', 'options may only be sent before go()');
    this.socket.write(encodeOption(option, data));
    const replies: OptionReply[] = [];
    for (;;) {
      const header = await this.reader.read(OPTION_REPLY_HEADER_SIZE);
      const length = header.readUInt32BE(16);
      if (
        header.readUInt32BE(0) !== OPTION_REPLY_MAGIC_HIGH ||
        header.readUInt32BE(4) !== OPTION_REPLY_MAGIC_LOW ||
        header.readUInt32BE(8) !== option ||
        length > MAX_OPTION_REPLY_BYTES
      ) {
        throw this.protocolError('a malformed option reply');
      }
      const reply = { type: header.readUInt32BE(12), data: await this.reader.read(length) };
      if (reply.type === REP.ACK) return replies;
      if (reply.type >= REP_ERROR_BIT) {
        const message = decodeString(reply.data) || `option ${option} was refused`;
        throw new NbdClientError(OPTION_ERROR_CODES.get(reply.type) ?? 'REFUSED', message);
      }
      replies.push(reply);
    }
  }

  private async exportName(exportName: string): Promise<ExportDetails> {
    this.socket.write(encodeOption(OPT.EXPORT_NAME, Buffer.from(exportName)));
    const reply = await this.reader.read(10 + (this.noZeroes ? 0 : EXPORT_NAME_PADDING));
    return makeDetails(readUInt64(reply, 0), reply.readUInt16BE(8));
  }

  private details(replies: readonly OptionReply[]): ExportDetails {
    let details: ExportDetails | undefined;
    let sizes = {};
    let name: string | undefined;
    let description: string | undefined;
    for (const { type, data } of replies) {
      if (type !== REP.INFO || data.length < 2) continue;
      const info = data.readUInt16BE(0);
      if (info === INFO.EXPORT && data.length === 12) details = makeDetails(readUInt64(data, 2), data.readUInt16BE(10));
      if (info === INFO.NAME) name = decodeString(data.subarray(2));
      if (info === INFO.DESCRIPTION) description = decodeString(data.subarray(2));
      if (info === INFO.BLOCK_SIZE && data.length === 14) {
        sizes = {
          minimumBlockSize: data.readUInt32BE(2),
          preferredBlockSize: data.readUInt32BE(6),
          maximumPayload: data.readUInt32BE(10),
        };
      }
    }
    if (details === undefined) throw this.protocolError('the server did not tell the size of the export');
    return { ...details, ...sizes, name, description };
  }

  private protocolError(message: string): NbdClientError {
    const error = new NbdClientError('PROTOCOL', message);
    this.fail(error);
    this.socket.destroy();
    return error;
  }

  private readonly onOptionData = (chunk: Buffer): void => this.reader.feed(chunk);

  // --- Requests ---

  private request(
    type: number,
    flags: number,
    offset: number,
    length: number,
    verb: string,
    into?: Buffer,
    data?: Buffer,
  ): Promise<void> {
    const what = `${verb} of ${length} bytes at ${offset}`;
    if (this.phase !== 'transmission' || this.failure !== undefined) {
      return Promise.reject(this.failure ?? new NbdClientError('CLOSED', `${what}: no export is open`));
    }
    if (
      !Number.isSafeInteger(offset) ||
      offset < 0 ||
      !Number.isInteger(length) ||
      length < 0 ||
      length > 0xffff_ffff
    ) {
      return Promise.reject(new NbdClientError('EINVAL', `${what}: not a range`));
    }
    return new Promise((resolve, reject) => {
      const cookie = this.takeCookie();
      this.pending.set(cookie, { into, resolve, reject, what });
      const header = encodeRequest(type, flags, cookie, offset, length);
      if (data === undefined || data.length === 0) {
        this.socket.write(header);
        return;
      }
      this.socket.cork();
      this.socket.write(header);
      this.socket.write(data);
      this.socket.uncork();
    });
  }

  /** A number no request in flight has. */
  private takeCookie(): number {
    while (this.pending.has(this.nextCookie)) this.nextCookie = (this.nextCookie + 1) >>> 0;
    const cookie = this.nextCookie;
    this.nextCookie = (cookie + 1) >>> 0;
    return cookie;
  }

  private readonly onReplyData = (chunk: Buffer): void => {
    let at = 0;
    while (at < chunk.length) {
      if (this.filling?.into !== undefined) {
        const { into } = this.filling;
        const taken = chunk.copy(into, this.filled, at);
        this.filled += taken;
        at += taken;
        if (this.filled < into.length) return;
        this.filling.resolve();
        this.filling = undefined;
        continue;
      }
      const taken = chunk.copy(this.replyHeader, this.headerFill, at);
      this.headerFill += taken;
      at += taken;
      if (this.headerFill < SIMPLE_REPLY_SIZE) return;
      this.headerFill = 0;
      if (!this.takeReply()) return;
    }
  };

  /** Act on a complete reply header. False if the server broke the protocol. */
  private takeReply(): boolean {
    const magic = this.replyHeader.readUInt32BE(0);
    const errno = this.replyHeader.readUInt32BE(4);
    const cookie = this.replyHeader.readUInt32BE(12);
    const pending = this.replyHeader.readUInt32BE(8) === 0 ? this.pending.get(cookie) : undefined;
    if (magic !== SIMPLE_REPLY_MAGIC || pending === undefined) {
      this.protocolError('a reply to nothing that was asked');
      return false;
    }
    this.pending.delete(cookie);
    if (errno !== 0) {
      const code = errorName(errno);
      pending.reject(new NbdClientError(code, `${pending.what}: the server answered ${code}`));
    } else if (pending.into !== undefined && pending.into.length > 0) {
      this.filling = pending;
      this.filled = 0;
    } else {
      pending.resolve();
    }
    return true;
  }

  /** The connection is of no use any more: everybody who waits is told why. */
  private fail(error: NbdClientError): void {
    this.failure ??= error;
    this.phase = 'closed';
    this.reader.fail(this.failure);
    this.filling?.reject(this.failure);
    this.filling = undefined;
    for (const { reject } of this.pending.values()) reject(this.failure);
    this.pending.clear();
  }
}

function connectSocket(address: { path: string } | { host: string; port: number }): Promise<net.Socket> {
  return new Promise((resolve, reject) => {
    const socket = net.connect({ ...address, noDelay: true });
    const refuse = (error: Error): void => {
      const where = 'path' in address ? address.path : `${address.host}:${address.port}`;
      reject(new NbdClientError('CLOSED', `cannot connect to ${where}: ${error.message}`, { cause: error }));
    };
    socket.once('error', refuse);
    socket.once('connect', () => {
      socket.off('error', refuse);
      resolve(socket);
    });
  });
}

function infoQuery(exportName: string): Buffer {
  return encodeInfoRequest(exportName, [INFO.NAME, INFO.DESCRIPTION, INFO.BLOCK_SIZE]);
}

/** With the sizes of "Size constraints" for a server that does not tell its own. */
function makeDetails(size: number, flags: number): ExportDetails {
  const has = (flag: number): boolean => (flags & flag) !== 0;
  return {
    size,
    readOnly: has(TRANSMISSION_FLAG.READ_ONLY),
    canFlush: has(TRANSMISSION_FLAG.SEND_FLUSH),
    canFua: has(TRANSMISSION_FLAG.SEND_FUA),
    canTrim: has(TRANSMISSION_FLAG.SEND_TRIM),
    canZero: has(TRANSMISSION_FLAG.SEND_WRITE_ZEROES),
    canFastZero: has(TRANSMISSION_FLAG.SEND_FAST_ZERO),
    canCache: has(TRANSMISSION_FLAG.SEND_CACHE),
    multiConn: has(TRANSMISSION_FLAG.CAN_MULTI_CONN),
    rotational: has(TRANSMISSION_FLAG.ROTATIONAL),
    minimumBlockSize: 1,
    preferredBlockSize: 4096,
    maximumPayload: MAX_PAYLOAD,
    name: undefined,
    description: undefined,
  };
}
