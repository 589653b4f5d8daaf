/**
 * The memory that a connection's socket receives into, and for how long it is needed. It owns the blocks and the decision
 * which one is next: a small one of the connection's own, a larger one of the pool for those that need it, a scratch where
 * there is neither. It never looks at what was received.
 */

import type { Duplex } from 'node:stream';
import { OWN_RECEIVE_BYTES, type Block, type BufferPool, type MemoryAccount } from './buffer-pool.js';

/** With less room than this left a receive would bring too little; of the block that a connection has for itself, less will do. */
const MIN_RECEIVE_BYTES = 64 * 1024;
const MIN_OWN_RECEIVE_BYTES = 8 * 1024;
/** Receives in a row of less than half of its own block after which a connection needs no larger one any more. */
const SMALL_RECEIVES = 64;
/** For what comes while all other memory is in use: enough to learn what is asked for. */
const SCRATCH_BYTES = 4 * 1024;

/** What the socket was told last to receive into. */
type Target = 'payload' | 'block' | 'scratch';

export class ReceiveMemory {
  /** There is nowhere to receive into until a write of `own` is done. The socket is paused. */
  isStarved = false;
  /** What is being parsed lies in this block: a write that goes on after the turn must pin it. */
  parsed: Block | undefined;
  target: Target = 'block';

  /** Where the next bytes are received, unless into a payload. */
  #block: Block | undefined;
  /** The one that is outside of the budget; `block` may be another one. */
  #own: Block | undefined;
  #scratch: Buffer | undefined;
  /** Bytes that the socket may put there, and whether it has used all of them lately. */
  #room = 0;
  #wantsLarge = false;
  #smallReceives = 0;

  readonly #socket: Duplex;
  readonly #pool: BufferPool;
  readonly #account: MemoryAccount;
  /** Called when there is somewhere to receive into again. */
  readonly #onFed: () => void;

  constructor(
    socket: Duplex,
    pool: BufferPool,
    account: MemoryAccount,

    onFed: () => void,
  ) {
    this.#socket = socket;
    this.#pool = pool;
    this.#account = account;
    this.#onFed = onFed;
  }

  /** Where the socket shall put what comes next. */
  next(): Buffer {
    const block = this.#choose();
    if (block === undefined) {
      this.isStarved = true;
      this.#socket.pause();
      return this.forNobody();
    }
    this.target = 'block';
    this.#room = block.buffer.length - block.used;
    return block.buffer.subarray(block.used);
  }

  /** What comes next is this part of a payload. */
  intoPayload(rest: Buffer): Buffer {
    this.target = 'payload';
    return rest;
  }

  /** Memory for what is copied at once, or not looked at. */
  forNobody(): Buffer {
    this.target = 'scratch';
    return (this.#scratch ??= Buffer.allocUnsafeSlow(SCRATCH_BYTES));
  }

  /** The socket has put so many bytes where it was told to, not into a payload: they are the caller's, who parses them now. */
  take(length: number): Buffer {
    if (this.target === 'scratch') {
      if (this.#scratch === undefined) throw new Error('receive-memory: received into nothing');
      // Not often: the scratch is the next one's again.
      return Buffer.from(this.#scratch.subarray(0, length));
    }
    const block = this.#block;
    if (block === undefined) throw new Error('receive-memory: received into nothing');
    if (length === this.#room) this.#wantsLarge = true;
    else if (length >= OWN_RECEIVE_BYTES / 2) this.#smallReceives = 0;
    else this.#smallReceives++;
    const chunk = block.buffer.subarray(block.used, block.used + length);
    block.used += length;
    this.parsed = block;
    return chunk;
  }

  /** One who needed `block` needs it no more. */
  unpin(block: Block): void {
    block.pins--;
    if (block.pins === 0) this.#pool.give(block);
    else if (this.isStarved && block === this.#own && block.pins === 1) {
      this.isStarved = false;
      this.#onFed();
    }
  }

  /** The socket is gone. */
  close(): void {
    const block = this.#block;
    const own = this.#own;
    this.#block = this.#own = undefined;
    if (block !== undefined && block !== own) this.unpin(block);
    if (own !== undefined) this.unpin(own);
  }

  /** A block with room to receive into. Undefined if there is none before a write is done. */
  #choose(): Block | undefined {
    let block = this.#block;
    if (block !== undefined) {
      const isFree = block.pins === 1;
      // Nobody else is busy with any of it: begin again at its front.
      if (isFree) block.used = 0;
      const isOwn = block === this.#own;
      const isWanted = isOwn ? !this.#wantsLarge : !(isFree && this.#smallReceives >= SMALL_RECEIVES);
      const least = isOwn ? MIN_OWN_RECEIVE_BYTES : MIN_RECEIVE_BYTES;
      if (isWanted && block.buffer.length - block.used >= least) return block;
      if (!isOwn) {
        this.#block = undefined;
        if (isFree) this.#wantsLarge = false;
        this.unpin(block);
      }
    }
    let own = this.#own;
    if (own === undefined) {
      this.#own = own = this.#pool.takeOwnReceive();
      own.pins = 1;
    }
    const isOwnFree = own.pins === 1;
    if (isOwnFree) own.used = 0;
    block = this.#wantsLarge || !isOwnFree ? this.#pool.takeReceive(this.#account) : undefined;
    if (block !== undefined) {
      block.pins = 1;
      this.#smallReceives = 0;
    } else {
      if (own.buffer.length - own.used < MIN_OWN_RECEIVE_BYTES) return undefined;
      block = own;
    }
    this.#block = block;
    return block;
  }
}
