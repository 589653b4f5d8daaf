/**
 * The transmission phase, client side: requests go out, and each promise gets its reply. It owns the sending side of the
 * socket, cookies, the callers' signals and the time-out; reply-reader.ts reads the answers. It checks no arguments and does
 * not close the socket itself.
 */

import type { Duplex } from 'node:stream';
import { CMD, CMD_FLAG, encodeExtendedRequest, encodeRequest, errorName } from '../protocol/wire.js';
import { abortError, offAbort, onAbort } from './aborting.js';
import { NbdClientError } from './client-error.js';
import { ReplyReader, type PendingReply, type ReplyFailure, type ReplyLevel } from './reply-reader.js';
import type { EndConnection } from './option-phase.js';
import { inPieces } from './pieces.js';
import { SilenceWatch } from './silence-watch.js';

/** What is sent; the rest of PendingReply belongs to the channel. */
export type Asked = Omit<PendingReply, 'finish' | 'lose'>;

export class RequestChannel {
  readonly #socket: Duplex;
  readonly #isExtended: boolean;
  readonly #socketGone: Promise<void>;
  readonly #replies: ReplyReader;
  readonly #watch: SilenceWatch | undefined;
  #failure: NbdClientError | undefined;
  /** Operations that have further requests to send; `onAllSent` is called when there are none any more. */
  #sending = 0;
  #onAllSent: (() => void) | undefined;
  #nextCookie = 1;
  /** Bytes given to the socket. */
  #sent = 0;

  /**
   * @param timeoutMs see SilenceWatch; 0: never
   * @param socketGone resolves when the socket is closed and reads no memory any more
   */
  constructor(socket: Duplex, level: ReplyLevel, timeoutMs: number, socketGone: Promise<void>, end: EndConnection) {
    this.#socket = socket;
    this.#isExtended = level === 'extended';
    this.#socketGone = socketGone;
    const replies = new ReplyReader(level, (message) => void end('PROTOCOL', message));
    this.#replies = replies;
    if (timeoutMs > 0) {
      this.#watch = new SilenceWatch(
        timeoutMs,
        () => replies.oldest(),
        () => this.#sent - socket.writableLength,
        () => void end('TIMED_OUT', `the server did not answer for ${timeoutMs} ms`),
      );
    }
  }

  readonly feed = (chunk: Buffer): void => this.#replies.feed(chunk);

  /** The connection is over: everything pending, and everything later, fails with `cause`. */
  fail(cause: NbdClientError): void {
    this.#failure ??= cause;
    this.#watch?.stop();
    this.#replies.abandon(this.#failure);
  }

  /** Resolves when no caller waits for an answer. */
  idle(): Promise<void> {
    const replies = this.#replies;
    return replies.isIdle ? Promise.resolve() : new Promise((resolve) => (replies.onIdle = resolve));
  }

  /** Resolves when every operation has sent all of its requests. */
  allSent(): Promise<void> {
    return this.#sending === 0 ? Promise.resolve() : new Promise((resolve) => (this.#onAllSent = resolve));
  }

  /** NBD_CMD_DISC, which has no answer; requests in flight are answered nevertheless. */
  sayGoodbye(): void {
    if (this.#failure !== undefined || !this.#socket.writable) return;
    this.#socket.write((this.#isExtended ? encodeExtendedRequest : encodeRequest)(CMD.DISC, 0, 0, 0, 0));
  }

  /** As inPieces(); for `idle` the pieces are one request. */
  async sendInPieces(
    length: number,
    pieceBytes: number,
    atOnce: number,
    send: (at: number, length: number) => Promise<void>,
  ): Promise<void> {
    this.#replies.hold();
    this.#sending++;
    try {
      await inPieces(length, pieceBytes, atOnce, send);
    } finally {
      this.#replies.release();
      if (--this.#sending === 0) this.#onAllSent?.();
    }
  }

  /**
   * Send a request; the promise gets its reply. `body` is a write's data, or the filter of a block status, whose length is
   * then in the header.
   * Errors: NbdClientError with the server's error, ABORTED, or why the connection is over; what `onHole` throws.
   */
  send(asked: Asked, signal: AbortSignal | undefined, body?: Uint8Array): Promise<void> {
    const { type, offset, length } = asked;
    if (this.#failure !== undefined) return Promise.reject(this.#failure);
    if (signal?.aborted) return Promise.reject(abortError(describe(type, offset, length), signal));
    // Servers differ about requests of nothing ("unspecified"): nbdkit answers a write with ENOSPC. And extended headers cannot
    // announce an empty payload.
    if (length === 0 && type !== CMD.FLUSH) return Promise.resolve();
    return new Promise((resolve, reject) => {
      const cookie = this.#takeCookie();
      const hasBody = body !== undefined && body.length > 0;
      const caller = signal === undefined ? undefined : this.#listen(asked, cookie, signal, hasBody, reject);
      const finish = (failure: ReplyFailure | undefined, thrown: Error | undefined): void => {
        caller?.stop();
        if (failure !== undefined) reject(requestFailed(describe(type, offset, length), failure));
        else if (thrown !== undefined) reject(thrown);
        else resolve();
      };
      const lose = (cause: Error): void => {
        caller?.stop();
        reject(cause);
      };
      const flags = asked.flags | (this.#isExtended && hasBody ? CMD_FLAG.PAYLOAD_LEN : 0);
      const header = this.#isExtended
        ? encodeExtendedRequest(type, flags, cookie, offset, hasBody ? body.length : length)
        : encodeRequest(type, flags, cookie, offset, length);
      this.#sent += header.length + (hasBody ? body.length : 0);
      this.#replies.expect(cookie, { ...asked, finish, lose }, this.#sent);
      if (hasBody) {
        this.#socket.cork();
        this.#socket.write(header);
        if (caller === undefined) this.#socket.write(body);
        else this.#socket.write(body, caller.onLeft);
        this.#socket.uncork();
      } else {
        this.#socket.write(header);
      }
      this.#watch?.begin();
    });
  }

  /**
   * The caller's signal: its abort rejects at once, or once the socket has read the caller's data. `onLeft` is to be called
   * then.
   */
  #listen(
    { type, offset, length }: Asked,
    cookie: number,
    signal: AbortSignal,
    hasBody: boolean,
    reject: (error: NbdClientError) => void,
  ): { readonly stop: () => void; readonly onLeft: () => void } {
    let hasLeft = !hasBody;
    let aborted: NbdClientError | undefined;
    const abort = (): void => {
      offAbort(signal, abort);
      this.#replies.discard(cookie);
      const error = abortError(describe(type, offset, length), signal);
      aborted = error;
      if (hasLeft) reject(error);
      else void this.#socketGone.then(() => reject(error));
    };
    onAbort(signal, abort);
    return {
      stop: () => offAbort(signal, abort),
      onLeft: () => {
        hasLeft = true;
        if (aborted !== undefined) reject(aborted);
      },
    };
  }

  /** A cookie that no request in flight has. */
  #takeCookie(): number {
    while (this.#replies.has(this.#nextCookie)) this.#nextCookie = (this.#nextCookie + 1) >>> 0;
    const cookie = this.#nextCookie;
    this.#nextCookie = (cookie + 1) >>> 0;
    return cookie;
  }
}

const VERBS: ReadonlyMap<number, string> = new Map([
  [CMD.READ, 'read'],
  [CMD.WRITE, 'write'],
  [CMD.FLUSH, 'flush'],
  [CMD.TRIM, 'trim'],
  [CMD.CACHE, 'cache'],
  [CMD.WRITE_ZEROES, 'zero'],
  [CMD.BLOCK_STATUS, 'block status'],
]);

/** A request in messages. */
export function describe(type: number, offset: number, length: number): string {
  return type === CMD.FLUSH ? 'flush' : `${VERBS.get(type)} of ${length} bytes at ${offset}`;
}

function requestFailed(what: string, { errno, message, offset }: ReplyFailure): NbdClientError {
  const code = errorName(errno);
  const words = message === undefined ? '' : `: ${message}`;
  const place = offset === undefined ? '' : ` for what is at ${offset}`;
  return new NbdClientError(code, `${what}: the server answered ${code}${place}${words}`, { offset });
}
