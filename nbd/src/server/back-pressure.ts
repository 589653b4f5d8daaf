/**
 * Held input: it waits for room among the requests in flight and the unread replies, for memory, or for its turn of the event
 * loop. Meanwhile the socket is paused, so that TCP slows the client down. It owns the held bytes and the reasons; the
 * transmission decides when to continue.
 */

import { OWN_RECEIVE_BYTES, type Block, type MemoryAccount } from './buffer-pool.js';
import type { LoopTask } from './loop-share.js';
import type { ReceiveMemory } from './receive-memory.js';
import type { ReplyQueue } from './reply-queue.js';
import type { RequestsInFlight } from './requests-in-flight.js';
import type { TransmissionHost } from './transmission-host.js';

/** Held input continues when unread replies are below this share of their limit: so requests are parsed in batches. */
const RESUME_BELOW = 1 / 2;

export class BackPressure {
  /** Input that waits; undefined: none. */
  held: Buffer | undefined;
  /** The block that `held` is a view of, if it is pooled. */
  #heldBlock: Block | undefined;
  /** The request decoded last waits for memory. */
  isShortOfMemory = false;
  /** The connection waits for its turn of the event loop. */
  isQueued = false;

  readonly #host: TransmissionHost;
  readonly #account: MemoryAccount;
  readonly #memory: ReceiveMemory;
  readonly #inFlight: RequestsInFlight;
  readonly #replies: ReplyQueue;
  readonly #task: LoopTask;

  constructor(
    host: TransmissionHost,
    account: MemoryAccount,
    memory: ReceiveMemory,
    inFlight: RequestsInFlight,
    replies: ReplyQueue,
    task: LoopTask,
  ) {
    this.#host = host;
    this.#account = account;
    this.#memory = memory;
    this.#inFlight = inFlight;
    this.#replies = replies;
    this.#task = task;
  }

  /** Called before every request: whether this connection has as much work or as many unread replies as it may have. */
  isSaturated(isRefusing: boolean): boolean {
    const { limits } = this.#host;
    // Refusals need no room at the device. They may go beyond the limit of unread replies, up to twice as much.
    if (isRefusing) return this.#replies.unsentBytes >= 2 * limits.maxUnsentBytes;
    return (
      this.#replies.unsentBytes >= limits.maxUnsentBytes ||
      this.#inFlight.count >= limits.maxInFlightRequests ||
      this.#inFlight.bytes >= limits.maxInFlightBytes
    );
  }

  /** Whether held input may continue. */
  hasRoomAgain(isRefusing: boolean): boolean {
    const isBacklogged = this.#replies.unsentBytes > this.#host.limits.maxUnsentBytes * RESUME_BELOW;
    return !(isBacklogged && !isRefusing) && !this.isSaturated(isRefusing);
  }

  /** Continue later with `rest`, which the transmission owns unless it is lent. */
  hold(rest: Buffer): void {
    const block = this.#memory.parsed;
    if (block === undefined) this.#keep(this.#memory.isLent ? Buffer.from(rest) : rest, undefined);
    // A short rest is copied, so that the block is free for the next input.
    else if (rest.length <= OWN_RECEIVE_BYTES) this.#keep(Buffer.from(rest), undefined);
    else {
      block.pins++;
      this.#keep(rest, block);
    }
    this.#host.socket.pause();
  }

  /** More input has arrived while some is held. */
  append(chunk: Buffer): void {
    const { held } = this;
    this.#keep(held === undefined ? chunk : Buffer.concat([held, chunk]), undefined);
  }

  /** Discard the held input. */
  drop(): void {
    this.#keep(undefined, undefined);
  }

  /** Return the held input to be parsed now. `memory.parsed` is its block, which the caller unpins afterwards. */
  release(): Buffer | undefined {
    const { held } = this;
    const heldBlock = this.#heldBlock;
    this.held = undefined;
    this.#heldBlock = undefined;
    this.#memory.parsed = heldBlock;
    return held;
  }

  /** Queue for a turn of the event loop. */
  waitForTurn(): void {
    if (this.isQueued) return;
    this.isQueued = true;
    this.#host.loop.enqueue(this.#task);
  }

  /** The request just decoded needs `bytes` of memory that others hold. `rest` is the input after its header. */
  waitForMemory(bytes: number, rest: Buffer): void {
    this.askForMemory(bytes);
    this.hold(rest);
  }

  /** The same, when the rest is held already. */
  askForMemory(bytes: number): void {
    this.isShortOfMemory = true;
    this.#host.pool.wait(this.#account, bytes);
  }

  /** Wait neither for a turn nor for memory any more. */
  endWaits(): void {
    this.isShortOfMemory = false;
    this.#host.pool.endWait(this.#account);
    if (this.isQueued) this.#host.loop.leave(this.#task);
    this.isQueued = false;
  }

  #keep(held: Buffer | undefined, block: Block | undefined): void {
    const before = this.#heldBlock;
    this.held = held;
    this.#heldBlock = block;
    if (before !== undefined) this.#memory.unpin(before);
  }
}
