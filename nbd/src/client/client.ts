/**
 * An NBD client: fixed newstyle, the best kind of replies that the server has, block status, requests pipelined as
 * promises. It is for tests, tools and backups inside a program; it has no cache and never retries. It owns its socket from
 * connect() to the end; option-phase.ts reads what arrives before an export is open, reply-reader.ts what arrives
 * afterwards.
 */

import type { Duplex } from 'node:stream';
import type { ExportInfo } from '../block-device.js';
import { connectTls, type ClientTls } from '../protocol/tls.js';
import {
  CMD,
  CMD_FLAG,
  encodeExtendedRequest,
  encodeRequest,
  errorName,
  MAX_PAYLOAD,
  OPT,
  writeUInt64,
} from '../protocol/wire.js';
import { NbdClientError } from './client-error.js';
import { connectSocket } from './connect-socket.js';
import type { ExportDetails } from './export-details.js';
import { OptionPhase } from './option-phase.js';
import { ReplyReader, type Extent, type PendingReply, type ReplyFailure, type ReplyLevel } from './reply-reader.js';

export { NbdClientError, type NbdClientErrorCode } from './client-error.js';
export type { ExportDetails } from './export-details.js';
/** The longest read or write. */
export { MAX_PAYLOAD } from '../protocol/wire.js';

/** Where the server is: an address, or a connected socket (`head`: bytes already received on it). */
export type ClientOptions = (
  | { readonly path: string }
  | { readonly host: string; readonly port: number }
  | { readonly socket: Duplex; readonly head?: Buffer }
) & {
  /** The required kind of replies. By default the best that the server has: extended, else structured, else simple. */
  readonly replies?: ReplyLevel;
  /** Require TLS: connect() fails if the server has none or does not prove itself. */
  readonly tls?: ClientTls;
};

/** The longest request whose header has 32 bits for the length. */
const MAX_COMPACT_LENGTH = 0xffff_ffff;
/** Longer requests are split into pieces of this size: a multiple of every block size. */
const PIECE_BYTES = 2 ** 31;
/** How long disconnect() waits for the server to close its side, milliseconds. */
const DISCONNECT_WAIT_MS = 2_000;

/** How a read is to be answered. */
export interface ReadOptions {
  /** Request the data in one piece (NBD_CMD_FLAG_DF); only if the export `canDf`. */
  readonly df?: boolean;
  /** Called for each hole that the server sends; its zeros are filled in anyway. */
  readonly onHole?: (offset: number, length: number) => void;
}

/**
 * A connection to an NBD server: `connect`, then options (`list`, `info`, `listContexts`, `selectContexts`), then `go`, then
 * requests, any number at a time. It never retries and has no time-outs: `destroy` fails what is pending.
 */
export class NbdClient {
  readonly #options: OptionPhase;
  readonly #socketGone: Promise<void>;
  #socket: Duplex;
  #phase: 'options' | 'transmission' | 'closed' = 'options';
  #failure: NbdClientError | undefined;
  #replies: ReplyReader | undefined;
  #nextCookie = 1;
  #maximumPayload = MAX_PAYLOAD;

  private constructor(socket: Duplex, wantedLevel: ReplyLevel | undefined) {
    this.#socket = socket;
    this.#options = new OptionPhase(socket, wantedLevel, (message) => this.#protocolError(message));
    this.#socketGone = new Promise((resolve) => {
      socket.once('close', () => {
        this.#fail(new NbdClientError('CLOSED', 'the connection is closed'));
        resolve();
      });
    });
    this.#listen(socket);
  }

  #listen(socket: Duplex): void {
    socket.on('data', this.#options.feed);
    socket.on('error', (error) => {
      this.#fail(new NbdClientError('CLOSED', `the connection failed: ${error.message}`, { cause: error }));
    });
    socket.on('end', this.#onEnd);
    // The program that connected it may have paused it.
    socket.resume();
  }

  readonly #onEnd = (): void => {
    const socket = this.#socket;
    this.#fail(new NbdClientError('CLOSED', 'the server closed the connection'));
    // A socket of the program may allow half-open connections and would stay open.
    socket.end(() => socket.destroy());
  };

  /**
   * Connect and exchange greetings; next is list(), info() or go().
   * Errors: NbdClientError TLS_FAILED (`tls` is given and the TLS handshake failed), CLOSED (no connection), PROTOCOL (the
   * peer is not a fixed-newstyle NBD server).
   */
  static async connect(options: ClientOptions): Promise<NbdClient> {
    const socket = 'socket' in options ? options.socket : await connectSocket(options);
    const client = new NbdClient(socket, options.replies);
    if ('socket' in options && options.head !== undefined) client.#options.feed(options.head);
    try {
      await client.#options.greet();
      if (options.tls !== undefined)
        await client.#startTls(options.tls, 'host' in options ? options.host : 'localhost');
    } catch (error) {
      client.#socket.destroy();
      throw error;
    }
    return client;
  }

  /** The exports that the server lists (NBD_OPT_LIST). */
  list(): Promise<ExportInfo[]> {
    return this.#options.list();
  }

  /** What go() would return, without opening the export (NBD_OPT_INFO). */
  info(exportName: string): Promise<ExportDetails> {
    return this.#options.info(exportName);
  }

  /** The kind of replies that was negotiated; undefined before the first option that depends on it. */
  get replyLevel(): ReplyLevel | undefined {
    return this.#options.level;
  }

  /** The meta contexts that blockStatus() can query. */
  get contexts(): readonly string[] {
    return Array.from(this.#options.contextIds.keys());
  }

  /** The meta contexts of an export, or those that match a query (NBD_OPT_LIST_META_CONTEXT). */
  listContexts(exportName: string, queries: readonly string[] = []): Promise<string[]> {
    return this.#options.listContexts(exportName, queries);
  }

  /**
   * Select meta contexts for an export that is opened next; replaces an earlier selection.
   * @returns those that the export has
   */
  async selectContexts(exportName: string, names: readonly string[]): Promise<readonly string[]> {
    await this.#options.selectContexts(exportName, names);
    return this.contexts;
  }

  /**
   * Open an export (NBD_OPT_GO, or NBD_OPT_EXPORT_NAME if the server lacks it). Afterwards requests may be made. If no contexts
   * were selected for it, `base:allocation` is selected, if the server has it.
   */
  async go(exportName: string): Promise<ExportDetails> {
    const options = this.#options;
    const details = await options.open(exportName);
    this.#maximumPayload = details.maximumPayload;
    this.#replies = new ReplyReader(options.level ?? 'simple', (message) => this.#protocolError(message));
    this.#phase = 'transmission';
    this.#socket.off('data', options.feed);
    this.#socket.on('data', this.#onReplyData);
    const rest = options.end();
    if (rest.length > 0) this.#onReplyData(rest);
    return details;
  }

  /** `length` bytes at `offset`; at most the export's `maximumPayload` at a time. */
  async read(offset: number, length: number, options: ReadOptions = {}): Promise<Buffer> {
    const into = Buffer.allocUnsafe(length);
    await this.readInto(offset, into, options);
    return into;
  }

  /** Fill `into` with the bytes at `offset`. Do not touch it until the promise settles. */
  readInto(offset: number, into: Buffer, options: ReadOptions = {}): Promise<void> {
    const flags = options.df ? CMD_FLAG.DF : 0;
    return this.#send({ type: CMD.READ, flags, offset, length: into.length, into, onHole: options.onHole }, 'read');
  }

  /** Write `data` at `offset`; it must not change until the promise settles. */
  write(offset: number, data: Buffer, options: { readonly fua?: boolean } = {}): Promise<void> {
    const flags = options.fua ? CMD_FLAG.FUA : 0;
    return this.#send({ type: CMD.WRITE, flags, offset, length: data.length }, 'write', data);
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
    return this.#requestInPieces(CMD.WRITE_ZEROES, flags, offset, length, 'zero');
  }

  /** Discard a range of any length: it may read as anything afterwards. */
  trim(offset: number, length: number, options: { readonly fua?: boolean } = {}): Promise<void> {
    return this.#requestInPieces(CMD.TRIM, options.fua ? CMD_FLAG.FUA : 0, offset, length, 'trim');
  }

  /** Make all writes durable that were answered before. */
  flush(): Promise<void> {
    return this.#request(CMD.FLUSH, 0, 0, 0, 'flush');
  }

  /** Ask the server to bring a range into its cache: a hint. */
  cache(offset: number, length: number): Promise<void> {
    return this.#request(CMD.CACHE, 0, offset, length, 'cache');
  }

  /**
   * The extents of a range in a meta context (NBD_CMD_BLOCK_STATUS): at least one, from `offset` on. They may end before
   * the range does (continue from there), never after it.
   * @param options.one a single extent
   * Errors: NbdClientError UNSUPPORTED (the context was not selected).
   */
  async blockStatus(
    context: string,
    offset: number,
    length: number,
    options: { readonly one?: boolean } = {},
  ): Promise<Extent[]> {
    const { contextIds, canFilterContexts, level } = this.#options;
    const wanted = contextIds.get(context);
    if (wanted === undefined) {
      throw (
        this.#failure ?? new NbdClientError('UNSUPPORTED', `the server has no meta context ${context} for this export`)
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
      length: level === 'extended' ? length : Math.min(length, PIECE_BYTES),
      onExtents,
    };
    if (canFilterContexts && contextIds.size > 1) {
      const filter = Buffer.allocUnsafe(12);
      writeUInt64(filter, Math.max(0, Math.min(length, Number.MAX_SAFE_INTEGER)), 0);
      filter.writeUInt32BE(wanted, 8);
      await this.#send({ ...asked, contextIds: [wanted] }, 'block status', filter);
    } else {
      await this.#send({ ...asked, contextIds: Array.from(contextIds.values()) }, 'block status');
    }
    return found;
  }

  /** Disconnect and close: NBD_OPT_ABORT or NBD_CMD_DISC, by phase. Requests in flight are answered first. */
  async disconnect(): Promise<void> {
    if (this.#phase === 'options') await this.#options.ask(OPT.ABORT, Buffer.alloc(0)).catch(() => undefined);
    else if (this.#phase === 'transmission' && this.#socket.writable) {
      const encode = this.#options.level === 'extended' ? encodeExtendedRequest : encodeRequest;
      this.#socket.write(encode(CMD.DISC, 0, 0, 0, 0));
    }
    // Not end(): it would close a socket without half-open connections before the last answers arrive.
    const timer = setTimeout(() => this.#socket.destroy(), DISCONNECT_WAIT_MS);
    if (this.#socket.readableEnded || this.#phase === 'options') this.#socket.destroy();
    await this.#socketGone;
    clearTimeout(timer);
  }

  /** Close the connection at once, without a disconnect. */
  destroy(): void {
    this.#socket.destroy();
  }

  // --- Its socket ---

  /** Move to TLS. If anything is wrong the connection is closed, and nothing more is sent. */
  async #startTls(tls: ClientTls, host: string): Promise<void> {
    const plain = this.#socket;
    try {
      await this.#options.ask(OPT.STARTTLS, Buffer.alloc(0));
      plain.off('data', this.#options.feed);
      plain.off('end', this.#onEnd);
      plain.pause();
      // Nothing may follow the acknowledgement in the clear.
      if (this.#options.unread > 0) throw new Error('bytes in the clear after the acknowledgement of NBD_OPT_STARTTLS');
      this.#socket = await connectTls(plain, tls, host);
    } catch (error) {
      plain.destroy();
      const why = `TLS is required, but the server did not complete it: ${(error as Error).message}`;
      throw new NbdClientError('TLS_FAILED', why, { cause: error });
    }
    this.#options.moveTo(this.#socket);
    this.#listen(this.#socket);
  }

  #protocolError(message: string): NbdClientError {
    const error = new NbdClientError('PROTOCOL', message);
    this.#fail(error);
    this.#socket.destroy();
    return error;
  }

  // --- Requests ---

  #request(type: number, flags: number, offset: number, length: number, verb: string): Promise<void> {
    return this.#send({ type, flags, offset, length }, verb);
  }

  /** `body` is a write's data, or the filter of a block status, whose length is then in the header. */
  #send(asked: Omit<PendingReply, 'finish' | 'lose'>, verb: string, body?: Buffer): Promise<void> {
    const { type, offset, length } = asked;
    const what = `${verb} of ${length} bytes at ${offset}`;
    const replies = this.#replies;
    if (this.#phase !== 'transmission' || replies === undefined || this.#failure !== undefined) {
      return Promise.reject(this.#failure ?? new NbdClientError('CLOSED', `${what}: no export is open`));
    }
    const isExtended = this.#options.level === 'extended';
    const most = isExtended ? Number.MAX_SAFE_INTEGER : MAX_COMPACT_LENGTH;
    if (!Number.isSafeInteger(offset) || offset < 0 || !Number.isInteger(length) || length < 0 || length > most) {
      return Promise.reject(new NbdClientError('EINVAL', `${what}: not a range`));
    }
    // Never send what a server may answer by closing the connection.
    if ((type === CMD.WRITE || type === CMD.READ) && length > this.#maximumPayload) {
      return Promise.reject(
        new NbdClientError('EINVAL', `${what}: the server takes ${this.#maximumPayload} at a time`),
      );
    }
    // Extended headers cannot announce an empty payload.
    if (isExtended && type === CMD.WRITE && length === 0) return Promise.resolve();
    return new Promise((resolve, reject) => {
      const cookie = this.#takeCookie(replies);
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
        this.#socket.write(header);
        return;
      }
      this.#socket.cork();
      this.#socket.write(header);
      this.#socket.write(body);
      this.#socket.uncork();
    });
  }

  /** A request without data, of any length: split into several if its header has only 32 bits for the length. */
  async #requestInPieces(type: number, flags: number, offset: number, length: number, verb: string) {
    if (this.#options.level === 'extended' || !(length > MAX_COMPACT_LENGTH)) {
      await this.#request(type, flags, offset, length, verb);
      return;
    }
    for (let done = 0; done < length; done += PIECE_BYTES) {
      await this.#request(type, flags, offset + done, Math.min(PIECE_BYTES, length - done), verb);
    }
  }

  /** A cookie that no request in flight has. */
  #takeCookie(replies: ReplyReader): number {
    while (replies.has(this.#nextCookie)) this.#nextCookie = (this.#nextCookie + 1) >>> 0;
    const cookie = this.#nextCookie;
    this.#nextCookie = (cookie + 1) >>> 0;
    return cookie;
  }

  readonly #onReplyData = (chunk: Buffer): void => this.#replies?.feed(chunk);

  /** The connection is unusable: everything pending fails with `error`. */
  #fail(error: NbdClientError): void {
    this.#failure ??= error;
    this.#phase = 'closed';
    this.#options.fail(this.#failure);
    this.#replies?.abandon(this.#failure);
  }
}

function requestFailed(what: string, { errno, message, offset }: ReplyFailure): NbdClientError {
  const code = errorName(errno);
  const words = message === undefined ? '' : `: ${message}`;
  const place = offset === undefined ? '' : ` for what is at ${offset}`;
  return new NbdClientError(code, `${what}: the server answered ${code}${place}${words}`, { offset });
}
