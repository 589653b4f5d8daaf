/**
 * The transmission phase of one connection: bytes in, requests out to the device, replies back. It owns the phase's
 * start, its pauses and its end; it never closes the socket or the device, but tells its connection why to. Its parts are
 *
 * - receive-memory and incoming-payload: where the bytes from the socket go,
 * - request-parser: from bytes to requests,
 * - request: what a header says, and whether the request may be executed,
 * - back-pressure: input that waits for room, for memory, or for its turn of the event loop,
 * - dispatch, with sparse-reads and status-requests: the calls of the device,
 * - requests-in-flight: what the device works on,
 * - reply-queue: replies on their way to the client.
 *
 * The path of a request that the device answers synchronously allocates nothing but the view of its data. Two limits cause
 * back-pressure: work in flight, and replies that the client has not read.
 */

import { BackPressure } from './back-pressure.js';
import { MemoryAccount } from './buffer-pool.js';
import { Dispatch } from './dispatch.js';
import type { ServedDevice } from './geometry.js';
import { IncomingPayload } from './incoming-payload.js';
import { LoopUser, UNITS_PER_LOOK, type LoopTask } from './loop-share.js';
import { ReceiveMemory } from './receive-memory.js';
import { chooseReplyEncoder } from './reply-encoder.js';
import { ReplyQueue } from './reply-queue.js';
import { RequestParser } from './request-parser.js';
import type { RequestRules } from './request.js';
import { RequestsInFlight } from './requests-in-flight.js';
import { SparseReads } from './sparse-reads.js';
import { StatusRequests } from './status-requests.js';
import type { TransmissionHost } from './transmission-host.js';

/** Under TLS data are in memory twice: in the clear, and encrypted. */
const TLS_COPIES = 2;

/** Shorter payloads are received together with what follows them, bytes. */
const STREAMED_BYTES = 128 * 1024;

/** Held input of no bytes: what is received next waits. */
const NOTHING = Buffer.alloc(0);

export class Transmission implements LoopTask {
  readonly loopUser = new LoopUser();

  readonly #memory: ReceiveMemory;
  readonly #account: MemoryAccount;
  readonly #payload: IncomingPayload;
  readonly #parser: RequestParser;
  readonly #requestsInFlight: RequestsInFlight;
  readonly #replies: ReplyQueue;
  readonly #backPressure: BackPressure;
  /** No request begins until thaw(), which asks again for the memory that a request waited for. */
  #isFrozen = false;
  #wasShortOfMemory = false;
  /** Called when it is frozen and no request is in flight. */
  #whenStill: (() => void) | undefined;
  /** Whether input arrived since the last settling. */
  #isHeard = false;
  #isSettleScheduled = false;
  #whenIdle: (() => void)[] = [];
  #whenSettled: (() => void)[] = [];

  readonly #host: TransmissionHost;

  constructor(
    host: TransmissionHost,
    device: ServedDevice,
    readonly rules: RequestRules,
  ) {
    this.#host = host;
    const { socket, pool } = host;
    const { loopUser } = this;
    const account = new MemoryAccount(() => this.#queue(), 'encrypted' in socket ? TLS_COPIES : 1);
    const encoder = chooseReplyEncoder(rules.negotiated);
    const inFlight = new RequestsInFlight(host, () => this.#scheduleSettle());
    const memory = new ReceiveMemory(pool, account, () => host.receiveElsewhere());
    const payload = new IncomingPayload(pool, account);
    const replies = new ReplyQueue(socket, pool, account, encoder, () => this.#resume());
    const sparseReads = new SparseReads(host, device, rules, account, inFlight, encoder, replies);
    const statuses = new StatusRequests(host, device, rules, account, inFlight, replies, loopUser);
    const dispatch = new Dispatch(host, device, memory, inFlight, replies, sparseReads, statuses);
    const backPressure = new BackPressure(host, account, memory, inFlight, replies, this);
    this.#parser = new RequestParser({
      ...{ host, rules, account, memory, payload, backPressure, inFlight, statuses, dispatch, replies, loopUser },
      stopListening: () => this.stopListening(),
    });
    this.#account = account;
    this.#memory = memory;
    this.#payload = payload;
    this.#requestsInFlight = inFlight;
    this.#replies = replies;
    this.#backPressure = backPressure;
  }

  // --- State and counts ---

  /** Requests received. */
  get requests(): number {
    return this.#parser.requests;
  }

  /** Requests that were answered with an error. */
  get errors(): number {
    return this.#requestsInFlight.errors;
  }

  get bytesRead(): number {
    return this.#requestsInFlight.bytesRead;
  }

  get bytesWritten(): number {
    return this.#requestsInFlight.bytesWritten;
  }

  /** Requests the device is working on. */
  get inFlight(): number {
    return this.#requestsInFlight.count;
  }

  /** Bytes of payloads that arrived in pieces. */
  get payloadBytes(): number {
    return this.#payload.movedBytes;
  }

  /** Whether the input so far ends inside a request. */
  get isMidRequest(): boolean {
    return this.#parser.isMidRequest;
  }

  /** Bytes of the memory budget that this connection holds. */
  get memoryBytes(): number {
    return this.#account.held;
  }

  /** Bytes of replies that the socket has written; each write counts when it is complete. */
  get takenBytes(): number {
    return this.#replies.takenBytes;
  }

  /** Whether the next step is the client's: to read a reply, or to send the rest of a payload. */
  get waitsForClient(): boolean {
    // With held input the client waits for us.
    return this.#replies.unsentBytes > 0 || (this.#payload.left > 0 && this.#backPressure.held === undefined);
  }

  /** No further input is parsed. */
  get #isDeaf(): boolean {
    return this.#parser.isDeaf;
  }

  get hasEnded(): boolean {
    return this.#isDeaf && this.inFlight === 0;
  }

  /** Whether the client waits for the server: not for requests that were answered since their time was up. */
  get isBusy(): boolean {
    return (
      this.#requestsInFlight.unanswered > 0 ||
      this.#isFrozen ||
      this.#backPressure.isQueued ||
      this.#backPressure.isShortOfMemory
    );
  }

  // --- Receiving ---

  /** Parse bytes from the client. The transmission owns `chunk` from now on, unless it is lent (see ReceiveMemory). */
  feed(chunk: Buffer): void {
    if (this.#isDeaf) return;
    this.#isHeard = true;
    const backPressure = this.#backPressure;
    if (backPressure.held !== undefined) {
      backPressure.append(chunk);
      return;
    }
    if (this.#host.loop.isSpent) {
      backPressure.hold(chunk);
      this.#queue();
      return;
    }
    this.#parser.parse(chunk);
    this.#replies.flush();
  }

  /** The memory that the socket receives the next bytes into. */
  nextBuffer(): Buffer {
    const memory = this.#memory;
    const payload = this.#payload;
    if (this.#isDeaf) {
      const { block } = payload;
      payload.block = undefined;
      if (block !== undefined) memory.unpin(block);
      return memory.forNobody();
    }
    // Held input comes first: where the new bytes belong is known only when it is parsed.
    if (payload.isWorthReceivingInPlace && this.#backPressure.held === undefined) {
      // Of a stream of such requests several are received at once: two receives for each take longer than copying the first.
      if (memory.isFull && payload.left < STREAMED_BYTES) return memory.next();
      return memory.intoPayload(payload.rest);
    }
    return memory.next();
  }

  /** The socket has received `length` bytes into the buffer of nextBuffer(). */
  received(length: number): void {
    if (this.#isDeaf) return;
    const memory = this.#memory;
    if (memory.target === 'payload') {
      this.#isHeard = true;
      this.#parser.payloadCame(length);
      this.#replies.flush();
      this.#yieldAfterPayload();
      return;
    }
    this.feed(memory.take(length));
    memory.finish();
  }

  /** The payload of a write has been received in place: the next input may have to wait for its turn of the loop. */
  #yieldAfterPayload(): void {
    const { loop } = this.#host;
    if (this.#payload.left > 0 || this.#isDeaf || this.#backPressure.held !== undefined) return;
    if (loop.mustYield(this.loopUser, UNITS_PER_LOOK)) {
      this.#backPressure.hold(NOTHING);
      this.#queue();
    }
    loop.finish(this.loopUser);
  }

  // --- Continuing with held input ---

  /** Its turn of the event loop has come. */
  serveTurn(): void {
    this.#backPressure.isQueued = false;
    this.#resume();
  }

  /** Whether the socket may bring more. */
  get #mayReceive(): boolean {
    return this.#backPressure.held === undefined && !this.#isDeaf;
  }

  #queue(): void {
    if (!this.#isDeaf) this.#backPressure.waitForTurn();
  }

  /** Continue with held input if there are room, memory and time. */
  #resume(): void {
    const backPressure = this.#backPressure;
    const memory = this.#memory;
    if (backPressure.held === undefined || this.#isDeaf || backPressure.isQueued || this.#isFrozen) return;
    // There was room when the request that waits for memory was decoded: it must not wait while memory is reserved for it.
    if (!backPressure.isShortOfMemory && !backPressure.hasRoomAgain(this.#parser.isRefusing)) return;
    if (this.#host.loop.isSpent) {
      this.#queue();
      return;
    }
    if (backPressure.isShortOfMemory && !this.#parser.beginWaiting()) return;
    const held = backPressure.release();
    // The request that has just begun may have ended the connection.
    if (held === undefined) return;
    const block = memory.parsed;
    this.#parser.parse(held);
    memory.finish();
    if (block !== undefined) memory.unpin(block);
    this.#replies.flush();
    if (this.#mayReceive) this.#host.socket.resume();
    this.#tellIfIdle();
  }

  // --- Stopping between two requests ---

  /**
   * Begin no further request; input is kept, and the socket is paused. `whenStill` is called once no request is in flight and
   * all replies are with the socket: then `unread` and `unsent` are the state of the connection. Must not be called from
   * inside a request.
   */
  freeze(whenStill: () => void): void {
    const backPressure = this.#backPressure;
    this.#isFrozen = true;
    this.#whenStill = whenStill;
    this.#wasShortOfMemory = backPressure.isShortOfMemory;
    backPressure.endWaits();
    if (backPressure.held === undefined) backPressure.hold(NOTHING);
    this.#scheduleSettle();
  }

  /** Continue as if freeze() had not been called. */
  thaw(): void {
    if (!this.#isFrozen) return;
    this.#isFrozen = false;
    this.#scheduleSettle();
    if (this.#wasShortOfMemory) {
      this.#backPressure.askForMemory(this.#parser.memoryNeeded());
    }
    this.#queue();
  }

  /** While it is frozen: all input that was received and not executed, from the start of a request on. */
  get unread(): Buffer {
    return Buffer.concat([this.#parser.begun(this.#wasShortOfMemory), this.#backPressure.held ?? NOTHING]);
  }

  /** While it is frozen: the last `length` bytes of the replies given to the socket. */
  unsent(length: number): Buffer {
    return this.#replies.lastBytes(length);
  }

  /** Send replies of an earlier server that the client has not received; before all others. */
  sendFirst(bytes: Uint8Array): void {
    this.#replies.sendFirst(bytes);
  }

  // --- The end ---

  /** The server is shutting down: every further request is answered ESHUTDOWN (proto.md, "Terminating …"). */
  refuseNewRequests(): void {
    this.#parser.isRefusing = true;
    // Held input is refused, too. Not at once: this may be called from inside a request (see onIdle).
    this.#isHeard = true;
    this.#scheduleSettle();
  }

  /**
   * The server is shutting down: no further request is executed or answered. A client that reconnects repeats unanswered
   * requests, but would pass an error on to its user.
   */
  dropNewRequests(): void {
    // Not at once: this may be called from inside a request (see onIdle).
    setImmediate(() => {
      this.stopListening();
      this.#scheduleSettle();
    });
  }

  /** Discard all further input. */
  stopListening(): void {
    const payload = this.#payload;
    this.#parser.isDeaf = true;
    this.#isFrozen = false;
    this.#backPressure.drop();
    this.#backPressure.endWaits();
    // Memory that the socket still receives into must not be reused until the socket is closed.
    const { block } = payload;
    if (block !== undefined && this.#memory.target !== 'payload') {
      payload.block = undefined;
      this.#memory.unpin(block);
    }
    payload.data = undefined;
    payload.left = 0;
  }

  /** Finish the requests in flight without replies; replies that are complete already leave. */
  dropReplies(): void {
    this.#replies.close();
  }

  /** The socket is closed: the requests in flight are finished without replies. */
  socketClosed(): void {
    this.stopListening();
    this.#memory.close();
    const { block } = this.#payload;
    this.#payload.block = undefined;
    if (block !== undefined) this.#memory.unpin(block);
    this.#replies.close();
  }

  /**
   * `callback` is called once all requests are answered, none is held and all replies are with the socket. Never at once: an
   * observer or a device may close the server in the middle of a request whose reply is being written.
   */
  onIdle(callback: () => void): void {
    this.#whenIdle.push(callback);
    this.#scheduleSettle();
  }

  /** `callback` is called once the device has settled all requests, those whose time was up as well. Never at once. */
  onSettled(callback: () => void): void {
    this.#whenSettled.push(callback);
    this.#scheduleSettle();
  }

  /** Settle after the completions of this turn of the event loop: replies that finish together leave together. */
  #scheduleSettle(): void {
    if (this.#isSettleScheduled) return;
    this.#isSettleScheduled = true;
    setImmediate(this.#settle);
  }

  /** Send what is ready, continue with held input, and call those that wait for idleness. */
  readonly #settle = (): void => {
    this.#isSettleScheduled = false;
    this.#replies.flush();
    this.#resume();
    this.#tellIfIdle();
  };

  #tellIfIdle(): void {
    const isSettled = this.inFlight === 0;
    if (isSettled && this.#whenSettled.length > 0) {
      for (const callback of this.#whenSettled.splice(0)) callback();
    }
    if (this.#requestsInFlight.unanswered > 0) return;
    if (this.#isFrozen) {
      if (isSettled) this.#whenStill?.();
      return;
    }
    if (this.#whenIdle.length === 0) return;
    const backPressure = this.#backPressure;
    // Every request that was received is answered or refused; but a refused client that reads nothing must not delay the
    // shutdown.
    if (backPressure.held !== undefined && !(this.#parser.isRefusing && backPressure.isSaturated(true))) return;
    // During the shutdown requests are refused as long as they keep arriving: until a turn of the loop brings no input.
    if (this.#parser.isRefusing && this.#isHeard && !this.#isDeaf) {
      this.#isHeard = false;
      this.#scheduleSettle();
      return;
    }
    const callbacks = this.#whenIdle;
    this.#whenIdle = [];
    for (const callback of callbacks) callback();
  }
}
