/**
 * Memory for replies and payloads, shared by all connections of an event loop, and its limit: slabs that hold many small
 * replies side by side, blocks that requests are received into, and large blocks for one request each. It owns the blocks
 * kept for reuse, the budget, and the queue of connections that wait for memory. It never decides when a block is free: its
 * user counts the pins.
 *
 * Few long-lived slabs instead of a buffer per reply: a batch of replies leaves in one write, the memory stays warm in
 * the cache, and a device that resolves the address of an ArrayBuffer may remember it.
 *
 * No request waits while it holds memory: it gets all that it needs at once, before its payload is read, or nothing; so
 * there is no deadlock. A quarter of the budget is for small requests, so that large ones do not delay them. When that is
 * used up, every connection may still have OWN_BYTES and OWN_RECEIVE_BYTES, and makes progress with these. It has them while
 * it uses them: a quiet connection has no memory.
 */

import { releaseMemory } from './release-memory.js';

/** Bytes of a slab: several batches of 32 replies of 4 KiB. */
export const SLAB_BYTES = 512 * 1024;
/** Requests with more data than this get a buffer of their own. */
export const LARGE_BYTES = SLAB_BYTES / 4;
/**
 * Memory that small requests are received into, one after the other; room for several batches of 32 writes of 4 KiB. A block
 * that a write still uses is not reused, so `maxInFlightRequests` slow writes hold at most as many of these.
 */
const RECEIVE_BYTES = 256 * 1024;
/**
 * Room for a reply header beside the data in a block for one request: so a request of exactly 1 MiB needs little more than
 * 1 MiB.
 */
const HEADROOM = 64;
/** Memory that each connection may have beside the budget, for replies or for a payload. */
export const OWN_BYTES = 64 * 1024 + HEADROOM;
/** The same, for the data of small writes. Held input is a copy of at most as much: 128 KiB in all. */
export const OWN_RECEIVE_BYTES = 32 * 1024;
/** Large buffers have multiples of this size, so that requests of similar sizes reuse them. */
const LARGE_STEP = 64 * 1024;
/** The share of the budget for small requests: slabs and receive blocks, those kept for reuse included. */
const SMALL_SHARE = 1 / 4;
/** At most this share of it is kept for reuse. */
const KEPT_SMALL_SHARE = 1 / 4;
/** Slabs and receive blocks kept for reuse, for all connections together. */
const KEPT_SMALL_BYTES = 12 * 1024 * 1024;
/** Own blocks of each kind kept for reuse: 3 MiB. */
const KEPT_OWN = 32;
/** Blocks unused for so long are given back to the system, milliseconds; small ones after at most twice as long. */
const KEEP_MS = 5_000;
/** How often that is checked, and how much is given back at a time: the system needs a millisecond for 5 MiB. */
const TICK_MS = 100;
const BYTES_PER_TICK = 4 * 1024 * 1024;
/**
 * Requests of up to this size, which guests and kernels send, do not wait behind longer ones. Otherwise a dozen clients
 * that send the header of a write of 32 MiB and nothing more could delay the writes of 128 KiB of all others for as long as
 * they reconnect.
 */
const MEDIUM_BYTES = 1024 * 1024 + HEADROOM;
/** The share of the memory for large requests that requests above MEDIUM_BYTES never get. */
const MEDIUM_SHARE = 1 / 10;
/** After a slab was refused the small share counts as used up for so long, milliseconds. */
const SHORTAGE_MS = 2_000;

/** Blocks of one kind, kept for reuse: the one given back last is taken first. */
class KeptBlocks {
  readonly #blocks: Block[] = [];
  /** The fewest that there were since the last look: so many were not needed. */
  #fewest = 0;

  get count(): number {
    return this.#blocks.length;
  }

  put(block: Block): void {
    this.#blocks.push(block);
  }

  take(): Block | undefined {
    const block = this.#blocks.pop();
    if (this.#blocks.length < this.#fewest) this.#fewest = this.#blocks.length;
    return block;
  }

  /** Give those that were not needed since the last call back to the system. Returns their bytes. */
  releaseUnneeded(): number {
    let bytes = 0;
    for (const block of this.#blocks.splice(0, this.#fewest)) {
      bytes += block.buffer.length;
      releaseMemory(block.buffer);
    }
    this.#fewest = this.#blocks.length;
    return bytes;
  }
}

type BlockKind = 'slab' | 'receive' | 'large' | 'own' | 'ownReceive';

/** A piece of memory with a count of its users. */
export class Block {
  /** Bytes handed out from the front. */
  used = 0;
  pins = 0;
  /** The account that holds it, and what it is charged for it, bytes. */
  account: MemoryAccount | undefined;
  charge = 0;
  /** It may still be in use when its last pin is released: it must not be reused. */
  isLost = false;
  /** performance.now() when it was given back. */
  keptSince = 0;

  constructor(
    readonly buffer: Buffer,
    readonly kind: BlockKind,
  ) {}
}

/** The memory of one connection. */
export class MemoryAccount {
  /** Bytes of the budget that it holds. */
  held = 0;
  isOwnTaken = false;
  isOwnReceiveTaken = false;
  /** Bytes that it waits for, or that are reserved for it; 0: neither. */
  wanted = 0;
  isGranted = false;
  /**
   * The waiting request is beginning: memory taken now is what it waited for. At other times memory is taken for another reply,
   * which must not end the wait.
   */
  isBeginning = false;

  /**
   * @param granted called, in a turn of its own, when the memory that it waits for is reserved
   * @param copies copies of its data in memory at the same time: two under TLS
   */
  constructor(
    readonly granted: () => void,
    readonly copies: number,
  ) {}
}

/** How the memory of a server, or of one of its event loops, is used, bytes. */
export interface MemoryUse {
  /** Held for requests and replies, and the limit. */
  readonly usedBytes: number;
  readonly maxBytes: number;
  /** Kept for reuse. */
  readonly keptBytes: number;
  /** Connections that wait for memory. */
  readonly waiting: number;
}

export class BufferPool {
  #max = 0;
  #smallMax = 0;
  #keptSmallMax = 0;
  #largeMax = 0;
  /** The part of it reserved for requests of at most MEDIUM_BYTES, and what they use. */
  #mediumMin = 0;
  #mediumUsed = 0;
  #smallUsed = 0;
  /** Bytes of large blocks and of reservations. */
  #largeUsed = 0;
  #keptSmall = 0;
  #keptLarge = 0;
  readonly #slabs = new KeptBlocks();
  readonly #receives = new KeptBlocks();
  readonly #own = new KeptBlocks();
  readonly #ownReceives = new KeptBlocks();
  /** In the order in which they were given back. */
  readonly #large: Block[] = [];
  /** Accounts that wait for more than MEDIUM_BYTES, and for at most that. */
  readonly #queue: MemoryAccount[] = [];
  readonly #mediumQueue: MemoryAccount[] = [];
  #isGrantScheduled = false;
  #refusedSlabAt = -Infinity;
  #timer: NodeJS.Timeout | undefined;
  #smallTimer: NodeJS.Timeout | undefined;

  /** @param maxBytes the budget; a request that needs more than all of it gets its memory when no other holds any */
  constructor(maxBytes: number) {
    this.maxBytes = maxBytes;
  }

  /** The budget. If it is lowered below what is in use, no more is given until enough was given back. */
  set maxBytes(bytes: number) {
    const small = bytes * SMALL_SHARE;
    this.#max = bytes;
    this.#keptSmallMax = Math.min(KEPT_SMALL_BYTES, small * KEPT_SMALL_SHARE);
    this.#smallMax = small - this.#keptSmallMax;
    this.#largeMax = bytes - small;
    this.#mediumMin = this.#largeMax * MEDIUM_SHARE;
    this.#scheduleGrant();
  }

  get use(): MemoryUse {
    return {
      usedBytes: this.#smallUsed + this.#largeUsed,
      maxBytes: this.#max,
      keptBytes: this.#keptSmall + this.#keptLarge,
      waiting: this.#queue.length + this.#mediumQueue.length,
    };
  }

  /** Bytes that the first account of each queue waits for, or a slab if one was refused lately; 0: there is no shortage. */
  get missingBytes(): number {
    const wanted = (this.#queue[0]?.wanted ?? 0) + (this.#mediumQueue[0]?.wanted ?? 0);
    if (wanted > 0) return wanted;
    return performance.now() - this.#refusedSlabAt < SHORTAGE_MS ? SLAB_BYTES : 0;
  }

  /** A slab, empty; undefined if there is none left. */
  takeSlab(account: MemoryAccount): Block | undefined {
    const block = this.#takeSmall(account, this.#slabs, 'slab', SLAB_BYTES);
    if (block === undefined) this.#refusedSlabAt = performance.now();
    return block;
  }

  /** A block to receive requests into; undefined if there is none left. */
  takeReceive(account: MemoryAccount): Block | undefined {
    return this.#takeSmall(account, this.#receives, 'receive', RECEIVE_BYTES);
  }

  /** What the connection has for itself; undefined if it is taken. */
  takeOwn(account: MemoryAccount): Block | undefined {
    if (account.isOwnTaken) return undefined;
    account.isOwnTaken = true;
    const block = this.#own.take() ?? new Block(Buffer.allocUnsafeSlow(OWN_BYTES), 'own');
    block.account = account;
    return block;
  }

  /** The same, for the data of small writes. */
  takeOwnReceive(account: MemoryAccount): Block | undefined {
    if (account.isOwnReceiveTaken) return undefined;
    account.isOwnReceiveTaken = true;
    const block = this.#ownReceives.take() ?? new Block(Buffer.allocUnsafeSlow(OWN_RECEIVE_BYTES), 'ownReceive');
    block.account = account;
    return block;
  }

  /** Whether there is memory for a request of `length` bytes; if not, see `wait`. */
  hasRoom(account: MemoryAccount, length: number): boolean {
    const charge = capacityFor(length) * account.copies;
    if (account.isGranted) return charge <= account.wanted || this.#largeUsed === account.wanted;
    return this.#queueFor(account, charge).length === 0 && this.#fits(account, charge);
  }

  /**
   * A block of at least `length` bytes for one request. After `hasRoom` it is within the budget; only short replies are taken
   * without that check.
   */
  takeLarge(account: MemoryAccount, length: number): Block {
    if (account.isBeginning) this.endWait(account);
    const capacity = capacityFor(length);
    const block = this.#findKept(capacity) ?? this.#allocateLarge(capacity);
    this.#charge(block, account, capacity * account.copies);
    this.#take(account, block.charge);
    return block;
  }

  /** Charge `bytes` that are not a block of the pool, or become one later. Undone by `unclaim`. */
  claim(account: MemoryAccount, bytes: number): void {
    if (account.isBeginning) this.endWait(account);
    this.#take(account, bytes * account.copies);
    account.held += bytes * account.copies;
  }

  unclaim(account: MemoryAccount, bytes: number): void {
    this.#unuse(account, bytes * account.copies);
    account.held -= bytes * account.copies;
    this.#scheduleGrant();
  }

  /** Call `account.granted` when there is memory for `length` bytes, after the accounts that wait already. */
  wait(account: MemoryAccount, length: number): void {
    if (account.wanted > 0) return;
    account.wanted = capacityFor(length) * account.copies;
    this.#queueFor(account, account.wanted).push(account);
    // Free memory may be reserved for this queue.
    this.#scheduleGrant();
  }

  /** `account` no longer waits: it has the memory, or does not need it. */
  endWait(account: MemoryAccount): void {
    if (account.wanted === 0) return;
    if (account.isGranted) {
      this.#unuse(account, account.wanted);
      account.isGranted = false;
    } else {
      const queue = this.#queueFor(account, account.wanted);
      queue.splice(queue.indexOf(account), 1);
    }
    account.wanted = 0;
    this.#scheduleGrant();
  }

  /** `block` has no users any more. */
  give(block: Block): void {
    const { account, kind } = block;
    // A device has transferred its memory to somebody else.
    if (block.buffer.length === 0) block.isLost = true;
    block.used = 0;
    block.pins = 0;
    block.account = undefined;
    if (kind === 'slab' || kind === 'receive') {
      this.#smallUsed -= block.charge;
      if (account !== undefined) account.held -= block.charge;
      const size = block.buffer.length;
      if (block.isLost || this.#keptSmall + size > this.#keptSmallMax) return;
      this.#keptSmall += size;
      this.#keepSmall(block, kind === 'slab' ? this.#slabs : this.#receives);
    } else if (kind === 'large') {
      if (account !== undefined) {
        this.#unuse(account, block.charge);
        account.held -= block.charge;
      }
      if (!block.isLost && block.buffer.length >= LARGE_STEP) this.#keep(block);
      this.#scheduleGrant();
    } else if (kind === 'own') {
      if (account !== undefined) account.isOwnTaken = false;
      if (!block.isLost && this.#own.count < KEPT_OWN) this.#keepSmall(block, this.#own);
    } else {
      if (account !== undefined) account.isOwnReceiveTaken = false;
      if (!block.isLost && this.#ownReceives.count < KEPT_OWN) this.#keepSmall(block, this.#ownReceives);
    }
  }

  #keepSmall(block: Block, among: KeptBlocks): void {
    among.put(block);
    this.#smallTimer ??= setInterval(this.#releaseSmall, KEEP_MS).unref();
  }

  /** No clock is read when a small block is taken or given back: that happens for every batch of requests. */
  readonly #releaseSmall = (): void => {
    this.#keptSmall -= this.#slabs.releaseUnneeded() + this.#receives.releaseUnneeded();
    this.#own.releaseUnneeded();
    this.#ownReceives.releaseUnneeded();
    if (this.#slabs.count + this.#receives.count + this.#own.count + this.#ownReceives.count > 0) return;
    clearInterval(this.#smallTimer);
    this.#smallTimer = undefined;
  };

  #takeSmall(account: MemoryAccount, kept: KeptBlocks, kind: BlockKind, size: number): Block | undefined {
    const charge = size * account.copies;
    if (this.#smallUsed + charge > this.#smallMax) return undefined;
    let block = kept.take();
    if (block === undefined) block = new Block(Buffer.allocUnsafeSlow(size), kind);
    else this.#keptSmall -= size;
    this.#charge(block, account, charge);
    this.#smallUsed += charge;
    return block;
  }

  #charge(block: Block, account: MemoryAccount, bytes: number): void {
    block.account = account;
    block.charge = bytes;
    account.held += bytes;
  }

  #queueFor(account: MemoryAccount, charge: number): MemoryAccount[] {
    return isMedium(account, charge) ? this.#mediumQueue : this.#queue;
  }

  #take(account: MemoryAccount, charge: number): void {
    this.#largeUsed += charge;
    if (isMedium(account, charge)) this.#mediumUsed += charge;
  }

  #unuse(account: MemoryAccount, charge: number): void {
    this.#largeUsed -= charge;
    if (isMedium(account, charge)) this.#mediumUsed -= charge;
  }

  #fits(account: MemoryAccount, charge: number): boolean {
    if (this.#largeUsed === 0) return true;
    const fitsAtAll = this.#largeUsed + charge <= this.#largeMax;
    if (isMedium(account, charge)) {
      // Memory that longer requests wait for is not taken from them.
      const isTheirs = this.#queue.length > 0 && this.#mediumUsed > 0;
      return fitsAtAll && !(isTheirs && this.#mediumUsed + charge > this.#mediumMin);
    }
    return fitsAtAll && this.#largeUsed - this.#mediumUsed + charge <= this.#largeMax - this.#mediumMin;
  }

  #findKept(capacity: number): Block | undefined {
    for (let i = this.#large.length - 1; i >= 0; i--) {
      const block = this.#large[i];
      if (block !== undefined && block.buffer.length === capacity) {
        this.#large.splice(i, 1);
        this.#keptLarge -= capacity;
        return block;
      }
    }
    return undefined;
  }

  #allocateLarge(capacity: number): Block {
    // Kept blocks have other sizes: they make room.
    while (this.#large.length > 0 && this.#largeUsed + this.#keptLarge + capacity > this.#largeMax) this.#release();
    return new Block(Buffer.allocUnsafeSlow(capacity), 'large');
  }

  #keep(block: Block): void {
    const size = block.buffer.length;
    while (this.#large.length > 0 && this.#largeUsed + this.#keptLarge + size > this.#largeMax) this.#release();
    block.keptSince = performance.now();
    this.#large.push(block);
    this.#keptLarge += size;
    this.#timer ??= setInterval(this.#tick, TICK_MS).unref();
  }

  /** Give the blocks unused for longest back to the system. */
  readonly #tick = (): void => {
    const before = performance.now() - KEEP_MS;
    let left = BYTES_PER_TICK;
    for (let oldest = this.#large[0]; oldest !== undefined; oldest = this.#large[0]) {
      if (left <= 0 || oldest.keptSince > before) return;
      left -= oldest.buffer.length;
      this.#release();
    }
    clearInterval(this.#timer);
    this.#timer = undefined;
  };

  #release(): void {
    const block = this.#large.shift();
    if (block === undefined) return;
    this.#keptLarge -= block.buffer.length;
    releaseMemory(block.buffer);
  }

  /** Not at once: memory is given back in the middle of other work. */
  #scheduleGrant(): void {
    if (this.#isGrantScheduled || this.#queue.length + this.#mediumQueue.length === 0) return;
    this.#isGrantScheduled = true;
    setImmediate(this.#grant);
  }

  readonly #grant = (): void => {
    this.#isGrantScheduled = false;
    for (const queue of [this.#mediumQueue, this.#queue]) {
      for (;;) {
        const [first] = queue;
        if (first === undefined || !this.#fits(first, first.wanted)) break;
        queue.shift();
        // Reserved: other requests do not get it in between.
        first.isGranted = true;
        this.#take(first, first.wanted);
        first.granted();
      }
    }
  };
}

function isMedium(account: MemoryAccount, charge: number): boolean {
  return charge <= MEDIUM_BYTES * account.copies;
}

/** The size of a block for `length` bytes. Short blocks have the exact size, and are not kept. */
function capacityFor(length: number): number {
  if (length <= LARGE_STEP / 2) return length;
  return Math.ceil(Math.max(0, length - HEADROOM) / LARGE_STEP) * LARGE_STEP + HEADROOM;
}
