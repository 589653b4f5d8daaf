/**
 * An NBD client: fixed newstyle, the best kind of replies that the server has, block status, requests pipelined as
 * promises. It is for tests, tools and backups inside a program; it has no cache and never retries. It owns its socket from
 * connect() to the end; option-phase.ts has what happens before an export is open, request-channel.ts what happens
 * afterwards.
 */

import type { Duplex } from 'node:stream';
import type { ExportInfo } from '../block-device.js';
import { connectTls, type ClientTls } from '../protocol/tls.js';
import { CMD, CMD_FLAG, MAX_PAYLOAD, OPT, writeUInt64 } from '../protocol/wire.js';
import { abortError, offAbort, onAbort, unlessAborted } from './aborting.js';
import { checkObject } from '../kinds.js';
import { asError, checkBytes, checkNumber, checkSignal, checkText, checkTexts } from './argument-checks.js';
import { NbdClientError } from './client-error.js';
import { checkClientOptions, type CheckedOptions, type ClientOptions } from './client-options.js';
import { connectSocket } from './connect-socket.js';
import { requestProblem, type ExportDetails } from './export-details.js';
import { OptionPhase, type EndConnection } from './option-phase.js';
import type { Extent, ReplyLevel } from './reply-reader.js';
import { describe, RequestChannel, type Asked } from './request-channel.js';
import { changedRanges, wholeExtents, type ChangedRange, type StatusOptions } from './status-iteration.js';

/** The longest request whose header has 32 bits for the length. */
const MAX_COMPACT_LENGTH = 0xffff_ffff;
/** Longer requests without data are split into pieces of this size: a multiple of every block size. */
const RANGE_PIECE_BYTES = 2 ** 31;
/** Of a long read or write so many pieces are in flight, and so many bytes. */
const MAX_PIECES_AT_ONCE = 16;
const MAX_PIECES_BYTES = 2 * MAX_PAYLOAD;
/** How long disconnect() waits for the server to close its side, milliseconds. */
const DISCONNECT_WAIT_MS = 2_000;

/** Options of every call. */
export interface CallOptions {
  /**
   * Ends this call with NbdClientError ABORTED; the connection continues. The server may have done, or still do, what was
   * asked. Memory of the caller is not used any more when the promise has rejected: that of a write once its bytes have left.
   */
  readonly signal?: AbortSignal;
}

/** How a read is to be answered. */
export interface ReadOptions extends CallOptions {
  /** Request the data in one piece (NBD_CMD_FLAG_DF); only if the export `canDf`, and not longer than its `maximumPayload`. */
  readonly df?: boolean;
  /** Called for each hole that the server sends; its zeros are filled in anyway. If it throws, the read fails with that error. */
  readonly onHole?: (offset: number, length: number) => void;
}

/** How a write or trim is done. */
export interface WriteOptions extends CallOptions {
  /** Durable before the answer (NBD_CMD_FLAG_FUA); only if the export `canFua`. */
  readonly fua?: boolean;
}

/** How a range is zeroed. */
export interface ZeroOptions extends WriteOptions {
  /** The range stays allocated (NBD_CMD_FLAG_NO_HOLE). */
  readonly noHole?: boolean;
  /** Fail with ENOTSUP rather than be as slow as writing (NBD_CMD_FLAG_FAST_ZERO); only if the export `canFastZero`. */
  readonly fastZero?: boolean;
}

/** How a range's status is asked for. */
export interface BlockStatusOptions extends CallOptions {
  /** A single extent. */
  readonly one?: boolean;
}

/**
 * A connection to an NBD server: `connect`, then options (`list`, `info`, `listContexts`, `selectContexts`), then `go`, then
 * requests, any number at a time. It never retries: see ReconnectingClient. Arguments are checked before anything is sent:
 * one of a wrong type is a TypeError, anything else is an NbdClientError with the code that a server would answer. All
 * methods reject and none throws. Everything that is pending when the connection ends fails with the same error.
 */
export class NbdClient {
  readonly #options: OptionPhase;
  readonly #requestTimeoutMs: number;
  readonly #uriExport: string | undefined;
  readonly #socketGone: Promise<void>;
  #socket: Duplex;
  #phase: 'options' | 'transmission' | 'leaving' | 'closed' = 'options';
  #failure: NbdClientError | undefined;
  #channel: RequestChannel | undefined;
  #leaving: Promise<void> | undefined;
  #details: ExportDetails | undefined;
  #pieceBytes = MAX_PAYLOAD;

  /** Resolves when the connection is over, with the reason: CLOSED after disconnect() or destroy(), too. It never rejects. */
  readonly closed: Promise<NbdClientError>;

  private constructor(socket: Duplex, options: CheckedOptions) {
    this.#socket = socket;
    this.#requestTimeoutMs = options.requestTimeoutMs;
    this.#uriExport = options.exportName;
    this.#options = new OptionPhase(socket, options.replies, options.optionTimeoutMs, this.#end);
    this.#socketGone = new Promise((resolve) => {
      socket.once('close', () => {
        this.#fail(new NbdClientError('CLOSED', 'the connection is closed'));
        resolve();
      });
    });
    this.closed = this.#socketGone.then(
      () => this.#failure ?? new NbdClientError('CLOSED', 'the connection is closed'),
    );
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
   * Errors: TypeError, RangeError (an option); NbdClientError TLS_FAILED (`tls` is given and the TLS handshake failed), CLOSED
   * (no connection), PROTOCOL (the peer is not a fixed-newstyle NBD server), TIMED_OUT, ABORTED.
   */
  static async connect(options: ClientOptions): Promise<NbdClient> {
    const checked = checkClientOptions(options);
    const { address, where, signal, connectTimeoutMs: most } = checked;
    const what = `connect() to ${where}`;
    let socket = 'socket' in address ? address.socket : undefined;
    let client: NbdClient | undefined;
    let givenUp: NbdClientError | undefined;
    const giveUp = (error: NbdClientError): void => {
      givenUp ??= error;
      if (client !== undefined) client.#fail(error);
      socket?.destroy();
    };
    const abort = (): void => {
      if (signal !== undefined) giveUp(abortError(what, signal));
    };
    const onTimeout = (): void => giveUp(new NbdClientError('TIMED_OUT', `${what} took more than ${most} ms`));
    const timer = most === 0 ? undefined : setTimeout(onTimeout, most);
    if (signal !== undefined) onAbort(signal, abort);
    try {
      if (signal?.aborted) throw abortError(what, signal);
      if (!('socket' in address)) socket = await connectSocket(address, where, (made) => (socket = made));
      if (socket === undefined || socket.destroyed) throw new NbdClientError('CLOSED', `${what}: the socket is closed`);
      client = new NbdClient(socket, checked);
      if ('socket' in address && address.head !== undefined) client.#options.feed(address.head);
      await client.#options.greet();
      if (checked.tls !== undefined) await client.#startTls(checked.tls, checked.tlsHost);
      // It may have come in the same turn as the last bytes.
      if (givenUp !== undefined) throw givenUp;
      return client;
    } catch (error) {
      if (client !== undefined) client.#socket.destroy();
      socket?.destroy();
      throw givenUp ?? error;
    } finally {
      clearTimeout(timer);
      if (signal !== undefined) offAbort(signal, abort);
    }
  }

  // --- Options ---

  /** The exports that the server lists (NBD_OPT_LIST). */
  list(options?: CallOptions): Promise<ExportInfo[]> {
    return this.#ask('list()', options, () => this.#options.list());
  }

  /** What go() would return, without opening the export (NBD_OPT_INFO). By default the export of the URI, or ''. */
  info(exportName = this.exportName, options?: CallOptions): Promise<ExportDetails> {
    return this.#ask('info()', options, () => this.#options.info(exportName), exportName);
  }

  /** The kind of replies that was negotiated; undefined before the first option that depends on it. */
  get replyLevel(): ReplyLevel | undefined {
    return this.#options.level;
  }

  /** The meta contexts that blockStatus(), extents() and changed() can query. */
  get contexts(): readonly string[] {
    return Array.from(this.#options.contextIds.keys());
  }

  /** The export that the URI names; '' without one. */
  get exportName(): string {
    return this.#uriExport ?? '';
  }

  /** What go() has returned; undefined before. */
  get details(): ExportDetails | undefined {
    return this.#details;
  }

  /**
   * The meta contexts of an export, by default the one of the URI or '', or those that match a query
   * (NBD_OPT_LIST_META_CONTEXT).
   */
  listContexts(
    exportName = this.exportName,
    queries: readonly string[] = [],
    options?: CallOptions,
  ): Promise<string[]> {
    const list = (): Promise<string[]> => this.#options.listContexts(exportName, queries);
    return this.#ask('listContexts()', options, list, exportName, queries);
  }

  /**
   * Select meta contexts for an export that is opened next; replaces an earlier selection, also if it fails. Without any
   * `names` none is selected.
   * @returns those that the export has
   */
  selectContexts(
    exportName = this.exportName,
    names: readonly string[],
    options?: CallOptions,
  ): Promise<readonly string[]> {
    const select = async (): Promise<readonly string[]> => {
      await this.#options.selectContexts(exportName, names);
      return this.contexts;
    };
    return this.#ask('selectContexts()', options, select, exportName, names);
  }

  /**
   * Open an export (NBD_OPT_GO, or NBD_OPT_EXPORT_NAME if the server lacks it); by default the one of the URI, or ''.
   * Afterwards requests may be made. If no contexts were selected for it, `base:allocation` is selected, if the server has it.
   * If `signal` is aborted when the server has been asked, the connection is closed: the export may be open then.
   */
  go(exportName = this.exportName, options?: CallOptions): Promise<ExportDetails> {
    let hasBegun = false;
    const open = async (): Promise<ExportDetails> => {
      hasBegun = true;
      const details = await this.#options.open(exportName);
      if (this.#failure !== undefined) throw this.#failure;
      this.#begin(details);
      return details;
    };
    const onEarlyEnd = (): void => {
      if (hasBegun) this.#close(new NbdClientError('CLOSED', 'go() was aborted'));
    };
    return this.#ask('go()', options, open, exportName, [], onEarlyEnd);
  }

  /** Options in their turn: one that was aborted before its turn is not sent, the answer to a later one is dropped. */
  async #ask<T>(
    what: string,
    options: CallOptions | undefined,
    work: () => Promise<T>,
    exportName = '',
    contexts: readonly string[] = [],
    onEarlyEnd?: () => void,
  ): Promise<T> {
    if (options !== undefined) checkObject(options, `the options of ${what}`);
    const signal = options?.signal;
    checkSignal(signal);
    checkText(exportName, 'the name of the export');
    checkTexts(contexts, 'the meta contexts');
    if (signal?.aborted) throw abortError(what, signal);
    const result = this.#options.inTurn(() => {
      if (signal?.aborted) throw abortError(what, signal);
      return work();
    });
    return unlessAborted(result, signal, what, onEarlyEnd);
  }

  #begin(details: ExportDetails): void {
    const options = this.#options;
    const level = options.level ?? 'simple';
    const channel = new RequestChannel(this.#socket, level, this.#requestTimeoutMs, this.#socketGone, this.#end);
    this.#channel = channel;
    this.#details = details;
    const block = details.minimumBlockSize;
    this.#pieceBytes = Math.max(block, Math.floor(Math.min(details.maximumPayload, MAX_PAYLOAD) / block) * block);
    this.#phase = 'transmission';
    this.#socket.off('data', options.feed);
    this.#socket.on('data', channel.feed);
    const rest = options.end();
    if (rest.length > 0) channel.feed(rest);
  }

  // --- Requests ---

  /** `length` bytes at `offset`. More than the server's `maximumPayload` are read in several requests. */
  async read(offset: number, length: number, options?: ReadOptions): Promise<Buffer> {
    const flags = options?.df ? CMD_FLAG.DF : 0;
    this.#check(CMD.READ, flags, offset, length, options);
    const into = this.#allocate(length);
    await this.#readInto(offset, into, flags, options);
    return into;
  }

  /** Fill `into` with the bytes at `offset`. Do not touch it until the promise settles. */
  readInto(offset: number, into: Uint8Array, options?: ReadOptions): Promise<void> {
    try {
      checkBytes(into, 'into');
      const flags = options?.df ? CMD_FLAG.DF : 0;
      this.#check(CMD.READ, flags, offset, into.length, options);
      return this.#readInto(offset, into, flags, options);
    } catch (error) {
      return Promise.reject(asError(error));
    }
  }

  #readInto(offset: number, into: Uint8Array, flags: number, options: ReadOptions | undefined): Promise<void> {
    const { length } = into;
    const onHole = options?.onHole;
    const signal = options?.signal;
    if (length <= this.#pieceBytes) {
      return this.#send({ type: CMD.READ, flags, offset, length, into, onHole }, signal);
    }
    if (flags !== 0) {
      const what = `a read of ${length} bytes at ${offset} with df`;
      throw new NbdClientError('EINVAL', `${what} cannot be split, and the server takes ${this.#pieceBytes}`);
    }
    return this.#sendPayload(length, (at, count) => {
      const part = into.subarray(at, at + count);
      return this.#send({ type: CMD.READ, flags, offset: offset + at, length: count, into: part, onHole }, signal);
    });
  }

  /**
   * Write `data` at `offset`; it must not change until the promise settles. More than the server's `maximumPayload` are
   * written in several requests, in any order: after a failure any of them may have been done.
   */
  write(offset: number, data: Uint8Array, options?: WriteOptions): Promise<void> {
    try {
      checkBytes(data, 'data');
      const { length } = data;
      const flags = options?.fua ? CMD_FLAG.FUA : 0;
      this.#check(CMD.WRITE, flags, offset, length, options);
      const signal = options?.signal;
      if (length <= this.#pieceBytes) return this.#send({ type: CMD.WRITE, flags, offset, length }, signal, data);
      return this.#sendPayload(length, (at, count) => {
        const part = data.subarray(at, at + count);
        return this.#send({ type: CMD.WRITE, flags, offset: offset + at, length: count }, signal, part);
      });
    } catch (error) {
      return Promise.reject(asError(error));
    }
  }

  /** Make a range of any length read as zeros. */
  async zero(offset: number, length: number, options?: ZeroOptions): Promise<void> {
    const flags =
      (options?.fua ? CMD_FLAG.FUA : 0) |
      (options?.noHole ? CMD_FLAG.NO_HOLE : 0) |
      (options?.fastZero ? CMD_FLAG.FAST_ZERO : 0);
    await this.#sendRange(CMD.WRITE_ZEROES, flags, offset, length, options);
  }

  /** Discard a range of any length: it may read as anything afterwards. */
  async trim(offset: number, length: number, options?: WriteOptions): Promise<void> {
    await this.#sendRange(CMD.TRIM, options?.fua ? CMD_FLAG.FUA : 0, offset, length, options);
  }

  /** Make all writes durable that were answered before. */
  async flush(options?: CallOptions): Promise<void> {
    this.#check(CMD.FLUSH, 0, 0, 0, options);
    await this.#send({ type: CMD.FLUSH, flags: 0, offset: 0, length: 0 }, options?.signal);
  }

  /** Ask the server to bring a range into its cache: a hint. */
  async cache(offset: number, length: number, options?: CallOptions): Promise<void> {
    await this.#sendRange(CMD.CACHE, 0, offset, length, options);
  }

  /**
   * The extents of a range in a meta context (NBD_CMD_BLOCK_STATUS): at least one, from `offset` on. They may end before
   * the range does (continue from there, or use extents()), never after it.
   * Errors: NbdClientError UNSUPPORTED (the context was not selected).
   */
  async blockStatus(context: string, offset: number, length: number, options?: BlockStatusOptions): Promise<Extent[]> {
    checkText(context, 'the meta context');
    const flags = options?.one ? CMD_FLAG.REQ_ONE : 0;
    this.#check(CMD.BLOCK_STATUS, flags, offset, length, options);
    const { contextIds, canFilterContexts, level } = this.#options;
    const wanted = contextIds.get(context);
    if (wanted === undefined) {
      throw new NbdClientError('UNSUPPORTED', `the server has no meta context ${context} for this export`);
    }
    let found: Extent[] = [];
    const onExtents = (id: number, extents: Extent[]): void => {
      if (id === wanted) found = extents;
    };
    const asked = {
      type: CMD.BLOCK_STATUS,
      flags,
      offset,
      length: level === 'extended' ? length : Math.min(length, RANGE_PIECE_BYTES),
      onExtents,
    };
    if (canFilterContexts && contextIds.size > 1) {
      const filter = Buffer.allocUnsafe(12);
      writeUInt64(filter, length, 0);
      filter.writeUInt32BE(wanted, 8);
      await this.#send({ ...asked, contextIds: [wanted] }, options?.signal, filter);
    } else {
      await this.#send({ ...asked, contextIds: Array.from(contextIds.values()) }, options?.signal);
    }
    return found;
  }

  /**
   * All extents of a range, by default of the whole export, in ascending order; neighbours with the same flags are one. The
   * server is asked as they are consumed, one block status at a time: the caller may stop at any time.
   * Errors: as blockStatus().
   */
  extents(context?: string, options?: StatusOptions): AsyncGenerator<Extent, void, undefined> {
    return wholeExtents(this, context, options);
  }

  /**
   * The changed ranges of a context that marks changes with its lowest flag, such as `qemu:dirty-bitmap:NAME`; neighbours are
   * one. Otherwise as extents().
   */
  changed(context: string, options?: StatusOptions): AsyncGenerator<ChangedRange, void, undefined> {
    return changedRanges(this, context, options);
  }

  // --- Its end ---

  /**
   * Disconnect and close: NBD_OPT_ABORT or NBD_CMD_DISC, by phase. Requests in flight are answered first, and new ones are
   * refused. `signal`: close at once.
   */
  async disconnect(options?: CallOptions): Promise<void> {
    const signal = options?.signal;
    checkSignal(signal);
    this.#leaving ??= this.#leave();
    await unlessAborted(this.#leaving, signal, 'disconnect()', () => this.destroy());
  }

  async #leave(): Promise<void> {
    const farewell = new NbdClientError('CLOSED', 'this client has disconnected');
    const channel = this.#channel;
    let timer: NodeJS.Timeout | undefined;
    const startTimer = (): void => {
      timer = setTimeout(() => this.#socket.destroy(), DISCONNECT_WAIT_MS);
    };
    if (this.#phase === 'transmission' && channel !== undefined) {
      this.#phase = 'leaving';
      await channel.allSent();
      channel.sayGoodbye();
      await channel.idle();
      startTimer();
      this.#fail(farewell);
      // Not end(): it would close a socket without half-open connections before the server has read everything.
      if (this.#socket.readableEnded) this.#socket.destroy();
    } else {
      startTimer();
      if (this.#phase === 'options') {
        await this.#options.inTurn(() => this.#options.ask(OPT.ABORT, Buffer.alloc(0))).catch(() => undefined);
        this.#fail(farewell);
        this.#socket.destroy();
      }
    }
    await this.#socketGone;
    clearTimeout(timer);
  }

  /** Close the connection at once, without a disconnect. */
  destroy(): void {
    this.#close(new NbdClientError('CLOSED', 'this client has closed the connection'));
  }

  /** disconnect(), for `await using`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.disconnect();
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

  readonly #end: EndConnection = (code, message) => this.#close(new NbdClientError(code, message));

  /** @returns what everything fails with: `error`, or what has ended the connection before */
  #close(error: NbdClientError): NbdClientError {
    this.#fail(error);
    this.#socket.destroy();
    return this.#failure ?? error;
  }

  /** The connection is unusable: everything pending fails with `error`. */
  #fail(error: NbdClientError): void {
    this.#failure ??= error;
    this.#phase = 'closed';
    this.#options.fail(this.#failure);
    this.#channel?.fail(this.#failure);
  }

  // --- Sending ---

  /**
   * Never send what a server may answer by closing the connection, nor what it can only refuse.
   * Errors: TypeError; NbdClientError with the code that proto.md has for the server ("Error values"), or the reason why the
   * connection is over.
   */
  #check(type: number, flags: number, offset: number, length: number, options: CallOptions | undefined): void {
    if (options !== undefined) checkObject(options, 'the options of a call');
    const signal = options?.signal;
    if (signal !== undefined) checkSignal(signal);
    checkNumber(offset, 'offset');
    checkNumber(length, 'length');
    if (this.#failure !== undefined) throw this.#failure;
    const details = this.#details;
    if (this.#phase !== 'transmission' || details === undefined) {
      const why = this.#phase === 'leaving' ? 'the client is disconnecting' : 'no export is open';
      throw new NbdClientError('CLOSED', `${describe(type, offset, length)}: ${why}`);
    }
    const isChange = type === CMD.WRITE || type === CMD.WRITE_ZEROES || type === CMD.TRIM;
    if (!Number.isSafeInteger(offset) || offset < 0 || !Number.isSafeInteger(length) || length < 0) {
      throw new NbdClientError('EINVAL', `${describe(type, offset, length)}: not a range`);
    }
    if (isChange && details.readOnly) {
      throw new NbdClientError('EPERM', `${describe(type, offset, length)}: the export is read-only`);
    }
    const problem = requestProblem(type, flags, length, details);
    if (problem !== undefined) throw new NbdClientError('EINVAL', `${describe(type, offset, length)}: ${problem}`);
    // Never offset + length: the sum may be larger than a number can hold exactly.
    if (length > details.size || offset > details.size - length) {
      const code = type === CMD.WRITE || type === CMD.WRITE_ZEROES ? 'ENOSPC' : 'EINVAL';
      throw new NbdClientError(
        code,
        `${describe(type, offset, length)}: the range reaches beyond the end of the export, at ${details.size}`,
      );
    }
    if (signal?.aborted) throw abortError(describe(type, offset, length), signal);
  }

  /** A request without data, of any length: split into several if its header has only 32 bits for the length. */
  async #sendRange(type: number, flags: number, offset: number, length: number, options: CallOptions | undefined) {
    this.#check(type, flags, offset, length, options);
    const signal = options?.signal;
    // Servers limit what one CACHE may ask for, whatever its header could.
    const isWhole = this.#options.level === 'extended' && type !== CMD.CACHE;
    if (isWhole || length <= MAX_COMPACT_LENGTH) return this.#send({ type, flags, offset, length }, signal);
    return this.#channel?.sendInPieces(length, RANGE_PIECE_BYTES, 1, (at, count) =>
      this.#send({ type, flags, offset: offset + at, length: count }, signal),
    );
  }

  /** A long read or write, in pieces. */
  async #sendPayload(length: number, send: (at: number, length: number) => Promise<void>): Promise<void> {
    const pieceBytes = this.#pieceBytes;
    const atOnce = Math.max(2, Math.min(MAX_PIECES_AT_ONCE, Math.floor(MAX_PIECES_BYTES / pieceBytes)));
    await this.#channel?.sendInPieces(length, pieceBytes, atOnce, send);
  }

  #send(asked: Asked, signal: AbortSignal | undefined, body?: Uint8Array): Promise<void> {
    // `check` has found an open export.
    if (this.#channel === undefined) throw new Error('nbd-client: a request before go()');
    return this.#channel.send(asked, signal, body);
  }

  #allocate(length: number): Buffer {
    try {
      return Buffer.allocUnsafe(length);
    } catch (error) {
      throw new NbdClientError('ENOMEM', `no buffer of ${length} bytes: ${(error as Error).message}`, { cause: error });
    }
  }
}
