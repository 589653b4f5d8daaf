/**
 * The memory that a connection's socket receives into. It owns the blocks and chooses the next one: the connection's own small
 * block, a larger one of the pool for clients that send much, or a scratch buffer if there is neither. It never looks at the
 * bytes received.
 */

import type { Duplex } from 'node:stream';
import { OWN_RECEIVE_BYTES, type Block, type BufferPool, type MemoryAccount } from './buffer-pool.js';

/** Least free room in a block for the next receive, bytes; in the connection's own block less is enough. */
const MIN_RECEIVE_BYTES = 64 * 1024;
const MIN_OWN_RECEIVE_BYTES = 8 * 1024;
/** After so many consecutive receives of less than half of its own block a connection gives its larger block back. */
const SMALL_RECEIVES = 64;
/** Scratch for input while all other memory is in use, bytes: enough to decode headers. */
const SCRATCH_BYTES = 4 * 1024;

/** The kind of buffer that the socket received last. */
type Target = 'payload' | 'block' | 'scratch';

export class ReceiveMemory {
  /** There is no memory to receive into until a write in `own` has finished. The socket is paused. */
  isStarved = false;
  /** The block of the bytes being parsed: a write that is still running after the turn must pin it. */
  parsed: Block | undefined;
  target: Target = 'block';

  /** The block for the next bytes, unless they are received into a payload. */
  #block: Block | undefined;
  /** The block outside of the budget; `block` may be another one. */
  #own: Block | undefined;
  #scratch: Buffer | undefined;
  /** Free bytes at the last receive, and whether the socket filled all of them lately. */
  #room = 0;
  #wantsLarge = false;
  #smallReceives = 0;

  readonly #socket: Duplex;
  readonly #pool: BufferPool;
  readonly #account: MemoryAccount;
  /** Called when there is memory to receive into again. */
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

  /** The buffer for the next bytes. */
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

  /** Receive the next bytes into this part of a payload. */
  intoPayload(rest: Buffer): Buffer {
    this.target = 'payload';
    return rest;
  }

  /** Memory for bytes that are copied at once, or discarded. */
  forNobody(): Buffer {
    this.target = 'scratch';
    return (this.#scratch ??= Buffer.allocUnsafeSlow(SCRATCH_BYTES));
  }

  /** The socket has received `length` bytes, not into a payload. Returns them; the caller parses them now. */
  take(length: number): Buffer {
    if (this.target === 'scratch') {
      if (this.#scratch === undefined) throw new Error('receive-memory: received into nothing');
      // Rare. A copy, since the next receive uses the scratch again.
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

  /** One user of `block` has finished with it. */
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

  /** A block with room to receive into. Undefined if there is none until a write has finished. */
  #choose(): Block | undefined {
    let block = this.#block;
    if (block !== undefined) {
      const isFree = block.pins === 1;
      // No write uses it: start at its front again.
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
