/**
 * An NBD client: fixed newstyle, the best kind of replies the server has, block status, requests pipelined as promises.
 * It is for tests, tools and backups inside a program; it keeps no cache and retries nothing. It owns its socket from
 * connect() to the end; what comes in once an export is open, client-replies.ts reads.
 */

import net from 'node:net';
import type { Duplex } from 'node:stream';
import { ALLOCATION_CONTEXT, type DeviceErrorCode, type ExportInfo } from '../block-device.js';
import { ByteReader } from '../protocol/byte-reader.js';
import { ReplyReader, type Extent, type PendingReply, type ReplyFailure, type ReplyLevel } from './reply-reader.js';
import { socketPathProblem } from '../protocol/socket-path.js';
import { connectTls, type ClientTls } from '../protocol/tls.js';
import {
  CMD,
  CMD_FLAG,
  decodeString,
  encodeExtendedRequest,
  encodeInfoRequest,
  encodeMetaQueries,
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
  TRANSMISSION_FLAG,
  writeUInt64,
} from '../protocol/wire.js';

/** The longest read or write. */
export { MAX_PAYLOAD } from '../protocol/wire.js';

/** Where the server is: an address, or a socket somebody else connected (`head`: bytes already received on it). */
export type ClientOptions = (
  | { readonly path: string }
  | { readonly host: string; readonly port: number }
  | { readonly socket: Duplex; readonly head?: Buffer }
) & {
  /** The kind of replies to insist on. By default the best the server has: extended, else structured, else simple. */
  readonly replies?: ReplyLevel;
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
  /** Reads may ask to be answered in one piece. */
  readonly canDf: boolean;
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

/** What went wrong, with the server's words where it said some. */
export class NbdClientError extends Error {
  /** Where in the export a request failed, if the server told. */
  readonly offset: number | undefined;

  constructor(
    readonly code: NbdClientErrorCode,
    message: string,
    options?: ErrorOptions & { readonly offset?: number | undefined },
  ) {
    super(message, options);
    this.name = 'NbdClientError';
    this.offset = options?.offset;
  }
}

/** An option reply of more bytes is not believed. */
const MAX_OPTION_REPLY_BYTES = 64 * 1024;
/** Nor are more replies to one option, or more bytes of them together. */
const MAX_OPTION_REPLIES = 64 * 1024;
const MAX_OPTION_REPLIES_BYTES = 16 * 1024 * 1024;
/** The longest request whose header has 32 bits for the length. */
const MAX_COMPACT_LENGTH = 0xffff_ffff;
/** Longer ones are cut into pieces of this size: a multiple of every block size. */
const PIECE_BYTES = 2 ** 31;
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

/** How a read is to be answered. */
export interface ReadOptions {
  /** Ask for one piece (NBD_CMD_FLAG_DF); only if the export `canDf`. */
  readonly df?: boolean;
  /** Told of each hole the server sent; its zeros are filled in anyway. */
  readonly onHole?: (offset: number, length: number) => void;
}

interface OptionReply {
  readonly type: number;
  readonly data: Buffer;
}

/**
 * A connection to an NBD server: `connect`, then options (`list`, `info`, `listContexts`, `selectContexts`), then `go`, then
 * requests, any number at a time. It retries nothing and has no time-outs of its own: `destroy` fails what is pending.
 */
export class NbdClient {
  private readonly reader: ByteReader;
  private phase: 'options' | 'transmission' | 'closed' = 'options';
  private noZeroes = false;
  private failure: NbdClientError | undefined;
  private nextCookie = 1;
  private wantedLevel: ReplyLevel | undefined;
  private level: ReplyLevel | undefined;
  private replies: ReplyReader | undefined;
  /** The contexts selected, with the ids that stand for them. */
  private readonly contextIds = new Map<string, number>();
  private contextExport: string | undefined;
  private maximumPayload = MAX_PAYLOAD;
  private canFilterContexts = false;
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
    client.wantedLevel = options.replies;
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
    await this.negotiateReplies();
    return this.details(await this.option(OPT.INFO, infoQuery(exportName)));
  }

  /** The kind of replies that was negotiated; undefined before the first option that depends on it. */
  get replyLevel(): ReplyLevel | undefined {
    return this.level;
  }

  /** The meta contexts that blockStatus() can be asked for. */
  get contexts(): readonly string[] {
    return Array.from(this.contextIds.keys());
  }

  /** The meta contexts an export offers, or those that match a query (NBD_OPT_LIST_META_CONTEXT). */
  async listContexts(exportName: string, queries: readonly string[] = []): Promise<string[]> {
    await this.negotiateReplies();
    const replies = await this.option(OPT.LIST_META_CONTEXT, encodeMetaQueries(exportName, queries));
    return this.metaContexts(replies).map(({ name }) => name);
  }

  /** Select the meta contexts for an export that is then opened; replaces what was selected before. @returns those it has */
  async selectContexts(exportName: string, names: readonly string[]): Promise<readonly string[]> {
    await this.negotiateReplies();
    this.contextIds.clear();
    const replies = await this.option(OPT.SET_META_CONTEXT, encodeMetaQueries(exportName, names));
    for (const { id, name } of this.metaContexts(replies)) {
      if (new Set(this.contextIds.values()).has(id)) throw this.protocolError('two meta contexts with the same id');
      // What nobody asked for must be counted with, since it is answered for, but has no name here.
      this.contextIds.set(name, id);
    }
    this.contextExport = exportName;
    return this.contexts;
  }

  /**
   * Open an export (NBD_OPT_GO, or NBD_OPT_EXPORT_NAME with a server that lacks it). Afterwards requests may be made.
   * If no contexts were selected for it, `base:allocation` is, where the server has it.
   */
  async go(exportName: string): Promise<ExportDetails> {
    await this.negotiateReplies();
    if (this.level !== 'simple' && this.contextExport !== exportName) {
      await unlessRefused(this.selectContexts(exportName, [ALLOCATION_CONTEXT]));
    }
    let details: ExportDetails;
    try {
      details = this.details(await this.option(OPT.GO, infoQuery(exportName)));
    } catch (error) {
      if (!(error instanceof NbdClientError) || error.code !== 'UNSUPPORTED' || this.level === 'extended') throw error;
      details = await this.exportName(exportName);
    }
    this.maximumPayload = details.maximumPayload;
    this.replies = new ReplyReader(this.level ?? 'simple', (message) => this.protocolError(message));
    this.phase = 'transmission';
    this.socket.off('data', this.onOptionData);
    this.socket.on('data', this.onReplyData);
    const rest = this.reader.takeRest();
    if (rest.length > 0) this.onReplyData(rest);
    return details;
  }

  /** `length` bytes at `offset`; at most the export's `maximumPayload` at a time. */
  async read(offset: number, length: number, options: ReadOptions = {}): Promise<Buffer> {
    const into = Buffer.allocUnsafe(length);
    await this.readInto(offset, into, options);
    return into;
  }

  /** Fill `into` with the bytes at `offset`. It is the client's until the promise settles. */
  readInto(offset: number, into: Buffer, options: ReadOptions = {}): Promise<void> {
    const flags = options.df ? CMD_FLAG.DF : 0;
    return this.send({ type: CMD.READ, flags, offset, length: into.length, into, onHole: options.onHole }, 'read');
  }

  /** Write `data` at `offset`; it must not change until the promise settles. */
  write(offset: number, data: Buffer, options: { readonly fua?: boolean } = {}): Promise<void> {
    const flags = options.fua ? CMD_FLAG.FUA : 0;
    return this.send({ type: CMD.WRITE, flags, offset, length: data.length }, 'write', data);
  }

  /** Make a range of any length read as zeros. */
  zero(
    offset: number,
    length: number,
    options: { readonly fua?: boolean; readonly noHole?: boolean; readonly fastZero?: boolean } = {},
  ): Promise<void> {
    const flags =
      (options.fua ? CMD_FLAG.FUA : 0) |
      (options.noHole ? CMD_FLAG.NO_HOLE : 0) |
      (options.fastZero ? CMD_FLAG.FAST_ZERO : 0);
    return this.requestInPieces(CMD.WRITE_ZEROES, flags, offset, length, 'zero');
  }

  /** Give a range of any length back. */
  trim(offset: number, length: number, options: { readonly fua?: boolean } = {}): Promise<void> {
    return this.requestInPieces(CMD.TRIM, options.fua ? CMD_FLAG.FUA : 0, offset, length, 'trim');
  }

  /** Have everything durable that was answered before. */
  flush(): Promise<void> {
    return this.request(CMD.FLUSH, 0, 0, 0, 'flush');
  }

  /** Have the server bring a range into its cache: a hint. */
  cache(offset: number, length: number): Promise<void> {
    return this.request(CMD.CACHE, 0, offset, length, 'cache');
  }

  /**
   * What a meta context says of a range (NBD_CMD_BLOCK_STATUS): at least one extent, from `offset` on. They may end
   * before the range does, then ask on from there; never behind it.
   * @param options.one a single extent
   * @throws NbdClientError UNSUPPORTED if the context was not selected
   */
  async blockStatus(
    context: string,
    offset: number,
    length: number,
    options: { readonly one?: boolean } = {},
  ): Promise<Extent[]> {
    const wanted = this.contextIds.get(context);
    if (wanted === undefined) {
      throw (
        this.failure ?? new NbdClientError('UNSUPPORTED', `the server has no meta context ${context} for this export`)
      );
    }
    let found: Extent[] = [];
    const onExtents = (id: number, extents: Extent[]): void => {
      if (id === wanted) found = extents;
    };
    const asked = {
      type: CMD.BLOCK_STATUS,
      flags: options.one ? CMD_FLAG.REQ_ONE : 0,
      offset,
      length: this.level === 'extended' ? length : Math.min(length, PIECE_BYTES),
      onExtents,
    };
    if (this.canFilterContexts && this.contextIds.size > 1) {
      const filter = Buffer.allocUnsafe(12);
      writeUInt64(filter, Math.max(0, Math.min(length, Number.MAX_SAFE_INTEGER)), 0);
      filter.writeUInt32BE(wanted, 8);
      await this.send({ ...asked, contextIds: [wanted] }, 'block status', filter);
    } else {
      await this.send({ ...asked, contextIds: Array.from(this.contextIds.values()) }, 'block status');
    }
    return found;
  }

  /** Say goodbye and close: NBD_OPT_ABORT or NBD_CMD_DISC, by phase. Requests in flight are answered first. */
  async disconnect(): Promise<void> {
    if (this.phase === 'options') await this.option(OPT.ABORT, Buffer.alloc(0)).catch(() => undefined);
    else if (this.phase === 'transmission' && this.socket.writable) {
      const encode = this.level === 'extended' ? encodeExtendedRequest : encodeRequest;
      this.socket.write(encode(CMD.DISC, 0, 0, 0, 0));
    }
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

  /** Once, as late as possible: what was negotiated before TLS would not count. */
  private async negotiateReplies(): Promise<void> {
    if (this.level !== undefined) return;
    const wanted = this.wantedLevel;
    const accepts = (option: number): Promise<boolean> => unlessRefused(this.option(option, Buffer.alloc(0)));
    if ((wanted ?? 'extended') === 'extended' && (await accepts(OPT.EXTENDED_HEADERS))) this.level = 'extended';
    else if ((wanted ?? 'structured') === 'structured' && (await accepts(OPT.STRUCTURED_REPLY)))
      this.level = 'structured';
    else if ((wanted ?? 'simple') === 'simple') this.level = 'simple';
    else throw new NbdClientError('UNSUPPORTED', `the server does not speak with ${wanted} replies`);
  }

  private metaContexts(replies: readonly OptionReply[]): { readonly id: number; readonly name: string }[] {
    return replies.map(({ type, data }) => {
      const name = type === REP.META_CONTEXT && data.length > 4 ? decodeString(data.subarray(4)) : undefined;
      if (name === undefined) throw this.protocolError('a malformed meta context');
      return { id: data.readUInt32BE(0), name };
    });
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
    let bytes = 0;
    for (;;) {
      const header = await this.reader.read(OPTION_REPLY_HEADER_SIZE);
      const length = header.readUInt32BE(16);
      if (
        header.readUInt32BE(0) !== OPTION_REPLY_MAGIC_HIGH ||
        header.readUInt32BE(4) !== OPTION_REPLY_MAGIC_LOW ||
        header.readUInt32BE(8) !== option ||
        length > MAX_OPTION_REPLY_BYTES ||
        replies.length >= MAX_OPTION_REPLIES ||
        (bytes += length) > MAX_OPTION_REPLIES_BYTES
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
    let transmissionFlags = 0;
    let sizes = {};
    let name: string | undefined;
    let description: string | undefined;
    for (const { type, data } of replies) {
      if (type !== REP.INFO || data.length < 2) continue;
      const info = data.readUInt16BE(0);
      if (info === INFO.EXPORT && data.length === 12) {
        transmissionFlags = data.readUInt16BE(10);
        details = makeDetails(readUInt64(data, 2), transmissionFlags);
      }
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
    this.canFilterContexts = (transmissionFlags & TRANSMISSION_FLAG.BLOCK_STATUS_PAYLOAD) !== 0;
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

  private request(type: number, flags: number, offset: number, length: number, verb: string): Promise<void> {
    return this.send({ type, flags, offset, length }, verb);
  }

  /** `body` is a write's data, or the filter of a block status; with the latter, its length is what the header tells. */
  private send(asked: Omit<PendingReply, 'finish' | 'lose'>, verb: string, body?: Buffer): Promise<void> {
    const { type, offset, length } = asked;
    const what = `${verb} of ${length} bytes at ${offset}`;
    const { replies } = this;
    if (this.phase !== 'transmission' || replies === undefined || this.failure !== undefined) {
      return Promise.reject(this.failure ?? new NbdClientError('CLOSED', `${what}: no export is open`));
    }
    const isExtended = this.level === 'extended';
    const most = isExtended ? Number.MAX_SAFE_INTEGER : MAX_COMPACT_LENGTH;
    if (!Number.isSafeInteger(offset) || offset < 0 || !Number.isInteger(length) || length < 0 || length > most) {
      return Promise.reject(new NbdClientError('EINVAL', `${what}: not a range`));
    }
    // Nothing that a server may answer by closing the connection.
    if ((type === CMD.WRITE || type === CMD.READ) && length > this.maximumPayload) {
      return Promise.reject(new NbdClientError('EINVAL', `${what}: the server takes ${this.maximumPayload} at a time`));
    }
    // With extended headers a payload of nothing cannot be announced.
    if (isExtended && type === CMD.WRITE && length === 0) return Promise.resolve();
    return new Promise((resolve, reject) => {
      const cookie = this.takeCookie(replies);
      const finish = (failure: ReplyFailure | undefined): void => {
        if (failure === undefined) resolve();
        else reject(requestFailed(what, failure));
      };
      replies.expect(cookie, { ...asked, finish, lose: reject });
      const hasBody = body !== undefined && body.length > 0;
      const flags = asked.flags | (isExtended && hasBody ? CMD_FLAG.PAYLOAD_LEN : 0);
      const header = isExtended
        ? encodeExtendedRequest(type, flags, cookie, offset, hasBody ? body.length : length)
        : encodeRequest(type, flags, cookie, offset, length);
      if (!hasBody) {
        this.socket.write(header);
        return;
      }
      this.socket.cork();
      this.socket.write(header);
      this.socket.write(body);
      this.socket.uncork();
    });
  }

  /** A request without data, of any length: cut into several if its header has room for 32 bits only. */
  private async requestInPieces(type: number, flags: number, offset: number, length: number, verb: string) {
    if (this.level === 'extended' || !(length > MAX_COMPACT_LENGTH)) {
      await this.request(type, flags, offset, length, verb);
      return;
    }
    for (let done = 0; done < length; done += PIECE_BYTES) {
      await this.request(type, flags, offset + done, Math.min(PIECE_BYTES, length - done), verb);
    }
  }

  /** A number no request in flight has. */
  private takeCookie(replies: ReplyReader): number {
    while (replies.has(this.nextCookie)) this.nextCookie = (this.nextCookie + 1) >>> 0;
    const cookie = this.nextCookie;
    this.nextCookie = (cookie + 1) >>> 0;
    return cookie;
  }

  private readonly onReplyData = (chunk: Buffer): void => this.replies?.feed(chunk);

  /** The connection is of no use any more: everybody who waits is told why. */
  private fail(error: NbdClientError): void {
    this.failure ??= error;
    this.phase = 'closed';
    this.reader.fail(this.failure);
    this.replies?.abandon(this.failure);
  }
}

function connectSocket(address: { path: string } | { host: string; port: number }): Promise<net.Socket> {
  const problem = 'path' in address ? socketPathProblem(address.path) : undefined;
  if (problem !== undefined && 'path' in address) {
    return Promise.reject(new NbdClientError('CLOSED', `cannot connect to ${address.path}: ${problem}`));
  }
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

/** Whether an option was accepted; false if the server refused it and the connection goes on. */
async function unlessRefused(option: Promise<unknown>): Promise<boolean> {
  try {
    await option;
    return true;
  } catch (error) {
    if (!(error instanceof NbdClientError) || error.code === 'PROTOCOL' || error.code === 'CLOSED') throw error;
    return false;
  }
}

function requestFailed(what: string, { errno, message, offset }: ReplyFailure): NbdClientError {
  const code = errorName(errno);
  const words = message === undefined ? '' : `: ${message}`;
  const place = offset === undefined ? '' : ` for what is at ${offset}`;
  return new NbdClientError(code, `${what}: the server answered ${code}${place}${words}`, { offset });
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
    canDf: has(TRANSMISSION_FLAG.SEND_DF),
    multiConn: has(TRANSMISSION_FLAG.CAN_MULTI_CONN),
    rotational: has(TRANSMISSION_FLAG.ROTATIONAL),
    minimumBlockSize: 1,
    preferredBlockSize: 4096,
    maximumPayload: MAX_PAYLOAD,
    name: undefined,
    description: undefined,
  };
}
