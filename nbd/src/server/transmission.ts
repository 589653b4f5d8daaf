/**
 * The transmission phase of one connection: bytes in, requests out to the device, replies back. It owns the parser's
 * state; it never closes the socket or the device, it tells its connection why it should. Its parts are
 *
 * - receive-memory and incoming-payload: where the bytes from the socket go,
 * - back-pressure: input that has to wait, for room, for memory, or for its turn of the event loop,
 * - request: what a header says, and whether it may be carried out,
 * - dispatch, with sparse-reads and status-requests: the device is asked,
 * - requests-in-flight: what it works on,
 * - reply-queue: what it answered, on its way out.
 *
 * The path of a request that the device answers synchronously allocates nothing but the view of its data. Two bounds hold a
 * client back: work in flight, and replies not taken.
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

/** Under TLS data are in memory twice: as they are, and encrypted. */
const TLS_COPIES = 2;

/** Nothing is held back but the next thing to be received. */
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
  /** Nothing is begun until it is thawed; what was short of memory is asked for again then. */
  #isFrozen = false;
  #wasShortOfMemory = false;
  /** To be told when it is frozen and no request is in flight. */
  #whenStill: (() => void) | undefined;
  /** Whether input came since the last settling. */
  #isHeard = false;
  #isSettleScheduled = false;
  #whenIdle: (() => void)[] = [];

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
    const memory = new ReceiveMemory(socket, pool, account, () => {
      if (this.#mayReceive) socket.resume();
    });
    const payload = new IncomingPayload(pool, account);
    const replies = new ReplyQueue(socket, pool, account, encoder, () => this.#resume());
    const sparseReads = new SparseReads(host, device, rules, account, inFlight, encoder, replies);
    const statuses = new StatusRequests(host, device, rules, account, inFlight, replies, loopUser);
    const dispatch = new Dispatch(device, memory, inFlight, replies, sparseReads, statuses);
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

  // --- How it stands ---

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

  /** Bytes of payloads that came in pieces. */
  get payloadBytes(): number {
    return this.#payload.movedBytes;
  }

  /** Whether the input so far ends inside a request. */
  get isMidRequest(): boolean {
    return this.#parser.isMidRequest;
  }

  /** Bytes of the server's memory that it holds. */
  get memoryBytes(): number {
    return this.#account.held;
  }

  /** Bytes of replies that the socket is done with, each write as a whole. */
  get takenBytes(): number {
    return this.#replies.takenBytes;
  }

  /** Whether the client is the one who has to do something: take a reply, or send the rest of a payload. */
  get waitsForClient(): boolean {
    // Where there is nowhere to receive into, or its turn has not come, it waits for us.
    const isHeard = !this.#memory.isStarved && this.#backPressure.held === undefined;
    return this.#replies.unsentBytes > 0 || (this.#payload.left > 0 && isHeard);
  }

  /** Nothing that comes from now on is looked at. */
  get #isDeaf(): boolean {
    return this.#parser.isDeaf;
  }

  get hasEnded(): boolean {
    return this.#isDeaf && this.inFlight === 0;
  }

  /** Whether the client waits for us. */
  get isBusy(): boolean {
    return this.inFlight > 0 || this.#isFrozen || this.#backPressure.isQueued || this.#backPressure.isShortOfMemory;
  }

  // --- Receiving ---

  /** Bytes from the client, as they came. `chunk` is the transmission's from now on. */
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

  /** Where the socket shall put what comes next. */
  nextBuffer(): Buffer {
    const memory = this.#memory;
    const payload = this.#payload;
    if (this.#isDeaf) {
      const { block } = payload;
      payload.block = undefined;
      if (block !== undefined) memory.unpin(block);
      return memory.forNobody();
    }
    // What is held back comes before it: the place of what is received now is not known before that is parsed.
    if (payload.isWorthReceivingInPlace && this.#backPressure.held === undefined) {
      return memory.intoPayload(payload.rest);
    }
    return memory.next();
  }

  /** The socket has put so many bytes where it was told to. */
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
    memory.parsed = undefined;
  }

  /** The payload of a write has been received where it belongs: what comes next may have to wait for its turn. */
  #yieldAfterPayload(): void {
    const { loop } = this.#host;
    if (this.#payload.left > 0 || this.#isDeaf || this.#backPressure.held !== undefined) return;
    if (loop.mustYield(this.loopUser, UNITS_PER_LOOK)) {
      this.#backPressure.hold(NOTHING);
      this.#queue();
    }
    loop.finish(this.loopUser);
  }

  // --- Going on with what was held back ---

  /** Its turn of the loop has come. */
  serveTurn(): void {
    this.#backPressure.isQueued = false;
    this.#resume();
  }

  /** Whether the socket may bring more. */
  get #mayReceive(): boolean {
    return this.#backPressure.held === undefined && !this.#isDeaf && !this.#memory.isStarved;
  }

  #queue(): void {
    if (!this.#isDeaf) this.#backPressure.waitForTurn();
  }

  /** Go on with held input if there is room again, and memory, and time. */
  #resume(): void {
    const backPressure = this.#backPressure;
    const memory = this.#memory;
    if (backPressure.held === undefined || this.#isDeaf || backPressure.isQueued || this.#isFrozen) return;
    // There was room when the request that is short of memory was decoded. It may not wait with that set aside for it.
    if (!backPressure.isShortOfMemory && !backPressure.hasRoomAgain(this.#parser.isRefusing)) return;
    if (this.#host.loop.isSpent) {
      this.#queue();
      return;
    }
    if (backPressure.isShortOfMemory && !this.#parser.beginWaiting()) return;
    const held = backPressure.release();
    // What has just begun may have ended the connection.
    if (held === undefined) return;
    const block = memory.parsed;
    this.#parser.parse(held);
    memory.parsed = undefined;
    if (block !== undefined) memory.unpin(block);
    this.#replies.flush();
    if (this.#mayReceive) this.#host.socket.resume();
    this.#tellIfIdle();
  }

  // --- Stopping between two requests ---

  /**
   * Begin no further request; what comes is kept, and the socket is paused. `whenStill` is called once no request is in
   * flight and all replies are with the socket: then `unread` and `unsent` are the state of the connection. Not to be called
   * from inside a request.
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

  /** Go on as if nothing had been. */
  thaw(): void {
    if (!this.#isFrozen) return;
    this.#isFrozen = false;
    this.#scheduleSettle();
    if (this.#wasShortOfMemory) {
      this.#backPressure.askForMemory(this.#parser.memoryNeeded());
    }
    this.#queue();
  }

  /** While it is frozen: all that was received and not carried out, from the beginning of a request on. */
  get unread(): Buffer {
    return Buffer.concat([this.#parser.begun(this.#wasShortOfMemory), this.#backPressure.held ?? NOTHING]);
  }

  /** While it is frozen: of the replies given to the socket the last `length` bytes. */
  unsent(length: number): Buffer {
    return this.#replies.lastBytes(length);
  }

  /** What a server before has answered, and the client has not got: it leaves first. */
  sendFirst(bytes: Uint8Array): void {
    this.#replies.sendFirst(bytes);
  }

  // --- Its end ---

  /** The server is shutting down: every further request is answered ESHUTDOWN (proto.md, "Terminating …"). */
  refuseNewRequests(): void {
    this.#parser.isRefusing = true;
    // What is held back is refused, too. Not at once: this may be called from inside a request (see onIdle).
    this.#isHeard = true;
    this.#scheduleSettle();
  }

  /**
   * The server is shutting down: no further request is carried out or answered. A client that connects again repeats them,
   * while an error it would have to hand on.
   */
  dropNewRequests(): void {
    // Not at once: this may be called from inside a request (see onIdle).
    setImmediate(() => {
      this.stopListening();
      this.#scheduleSettle();
    });
  }

  /** Nothing the client sends from now on is looked at. */
  stopListening(): void {
    const payload = this.#payload;
    this.#parser.isDeaf = true;
    this.#isFrozen = false;
    this.#backPressure.drop();
    this.#backPressure.endWaits();
    // What the socket has been told to receive into is no memory for anybody else, until the socket is gone.
    const { block } = payload;
    if (block !== undefined && this.#memory.target !== 'payload') {
      payload.block = undefined;
      this.#memory.unpin(block);
    }
    payload.data = undefined;
    payload.left = 0;
  }

  /** What is in flight is finished, its replies go nowhere; those that are made already leave. */
  dropReplies(): void {
    this.#replies.close();
  }

  /** The socket is gone: what is in flight is finished, its replies go nowhere. */
  socketClosed(): void {
    this.stopListening();
    this.#memory.close();
    const { block } = this.#payload;
    this.#payload.block = undefined;
    if (block !== undefined) this.#memory.unpin(block);
    this.#replies.close();
  }

  /**
   * `callback` is called once no request is in flight or held back and all replies are with the socket. Never at once:
   * an observer or a device may close the server in the middle of a request whose reply is being made.
   */
  onIdle(callback: () => void): void {
    this.#whenIdle.push(callback);
    this.#scheduleSettle();
  }

  /** After the completions of this turn of the event loop: those that finish together leave together. */
  #scheduleSettle(): void {
    if (this.#isSettleScheduled) return;
    this.#isSettleScheduled = true;
    setImmediate(this.#settle);
  }

  /** Send what is ready, take on what was held, and tell who waits for idleness. */
  readonly #settle = (): void => {
    this.#isSettleScheduled = false;
    this.#replies.flush();
    this.#resume();
    this.#tellIfIdle();
  };

  #tellIfIdle(): void {
    if (this.inFlight > 0) return;
    if (this.#isFrozen) {
      this.#whenStill?.();
      return;
    }
    if (this.#whenIdle.length === 0) return;
    const backPressure = this.#backPressure;
    // What was asked is owed an answer, or a refusal; but who is shut out and reads nothing may not hold up the shutdown.
    if (backPressure.held !== undefined && !(this.#parser.isRefusing && backPressure.isSaturated(true))) return;
    // Being shut out, a client is heard as long as it goes on asking: until a turn of the loop brings nothing new.
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
