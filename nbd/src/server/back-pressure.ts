/**
 * Input that waits: for room among the requests in flight and the replies not taken, for memory, or for its turn of the event
 * loop. While there is any the socket is not read, so that the client is held back. It owns what waits and why; when it goes
 * on is asked by the transmission.
 */

import { OWN_RECEIVE_BYTES, type Block, type MemoryAccount } from './buffer-pool.js';
import type { LoopTask } from './loop-share.js';
import type { ReceiveMemory } from './receive-memory.js';
import type { ReplyQueue } from './reply-queue.js';
import type { RequestsInFlight } from './requests-in-flight.js';
import type { TransmissionHost } from './transmission-host.js';

/** Replies below this share of the bound before a held client is heard again, so that it is heard in batches. */
const RESUME_BELOW = 1 / 2;

export class BackPressure {
  /** Undefined: nothing waits. */
  held: Buffer | undefined;
  /** `held` lies in it. */
  #heldBlock: Block | undefined;
  /** The request that was decoded last waits for memory. */
  isShortOfMemory = false;
  /** It waits for its turn of the loop. */
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

  /** Asked before every request: whether this connection has all the work and all the unread replies it may have. */
  isSaturated(isRefusing: boolean): boolean {
    const { limits } = this.#host;
    // Refusals need no room with the device; and they reach also who had too many replies unread, up to twice as many.
    if (isRefusing) return this.#replies.unsentBytes >= 2 * limits.maxUnsentBytes;
    return (
      this.#replies.unsentBytes >= limits.maxUnsentBytes ||
      this.#inFlight.count >= limits.maxInFlightRequests ||
      this.#inFlight.bytes >= limits.maxInFlightBytes
    );
  }

  /** Whether the client, having been held back, is to be heard again. */
  hasRoomAgain(isRefusing: boolean): boolean {
    const isBacklogged = this.#replies.unsentBytes > this.#host.limits.maxUnsentBytes * RESUME_BELOW;
    return !(isBacklogged && !isRefusing) && !this.isSaturated(isRefusing);
  }

  /** Go on later with `rest`, which is the transmission's. */
  hold(rest: Buffer): void {
    const block = this.#memory.parsed;
    if (block === undefined) this.#keep(rest, undefined);
    // The rest of its own block is not worth keeping it from what comes.
    else if (rest.length <= OWN_RECEIVE_BYTES) this.#keep(Buffer.from(rest), undefined);
    else {
      block.pins++;
      this.#keep(rest, block);
    }
    this.#host.socket.pause();
  }

  /** More has come, though something waits already. */
  append(chunk: Buffer): void {
    const { held } = this;
    this.#keep(held === undefined ? chunk : Buffer.concat([held, chunk]), undefined);
  }

  /** What waits is not wanted any more. */
  drop(): void {
    this.#keep(undefined, undefined);
  }

  /** What waits is to be parsed now; `memory.parsed` is the block that it lies in, to be unpinned afterwards. */
  release(): Buffer | undefined {
    const { held } = this;
    const heldBlock = this.#heldBlock;
    this.held = undefined;
    this.#heldBlock = undefined;
    this.#memory.parsed = heldBlock;
    return held;
  }

  /** It is served when its turn of the loop comes. */
  waitForTurn(): void {
    if (this.isQueued) return;
    this.isQueued = true;
    this.#host.loop.enqueue(this.#task);
  }

  /** The request just decoded needs `bytes` of memory that others have. `rest` is what came behind its header. */
  waitForMemory(bytes: number, rest: Buffer): void {
    this.askForMemory(bytes);
    this.hold(rest);
  }

  /** The same, with the rest held already. */
  askForMemory(bytes: number): void {
    this.isShortOfMemory = true;
    this.#host.pool.wait(this.#account, bytes);
  }

  /** It waits neither for its turn nor for memory any more. */
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
