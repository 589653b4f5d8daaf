/**
 * Memory for replies and payloads, shared by all connections of an event loop, and its bound: slabs in which many small replies
 * lie side by side, blocks that requests are received into, and large blocks for one request each. It owns what is kept for
 * reuse, the budget, and the queue of those that wait for a share of it; it never decides when memory is free, whoever took a
 * block counts its pins.
 *
 * Few long-lived slabs instead of a buffer per reply: a batch of replies leaves in one write, the memory stays warm in
 * the cache, and a device that looks up the address of an ArrayBuffer may remember it.
 *
 * Nobody waits while holding memory for what it waits to do: a request gets all it needs at once, before its payload is
 * read, or nothing. A quarter of the budget is for small requests, so that large ones do not hold them up; and with nothing
 * left there every connection still has OWN_BYTES, beside what it is received into, and goes on with that.
 */

import { releaseMemory } from './release-memory.js';

/** Bytes of a slab: several batches of 32 replies of 4 KiB. */
export const SLAB_BYTES = 512 * 1024;
/** Requests with more data than this get a buffer of their own. */
export const LARGE_BYTES = SLAB_BYTES / 4;
/**
 * Memory that small requests are received into, one after the other; room for several batches of 32 writes of 4 KiB. What
 * a write of it is still busy with is left alone, so with `maxInFlightRequests` slow writes it is at most as many of these.
 */
const RECEIVE_BYTES = 256 * 1024;
/** Beside the data, in a block for one request: a reply header, so that a request of exactly 1 MiB takes 1 MiB and a bit. */
const HEADROOM = 64;
/** What each connection may use whatever others do, for replies or for a payload. */
export const OWN_BYTES = 64 * 1024 + HEADROOM;
/** Likewise, to receive requests into. What waits to be parsed is a copy of at most as much: 128 KiB in all. */
export const OWN_RECEIVE_BYTES = 32 * 1024;
/** Large buffers come in steps of this size, so that requests of one size find each other's. */
const LARGE_STEP = 64 * 1024;
/** The share of the budget that is for small requests: slabs and receive blocks, those kept for reuse included. */
const SMALL_SHARE = 1 / 4;
/** Of that, what is kept for reuse at most. */
const KEPT_SMALL_SHARE = 1 / 4;
/** Slabs and receive blocks kept for reuse, for all connections together. */
const KEPT_SMALL_BYTES = 12 * 1024 * 1024;
/** Own blocks kept for reuse: 2 MiB. */
const KEPT_OWN = 32;
/** What nobody has used for so long is given back to the system, milliseconds. */
const KEEP_MS = 5_000;
/** How often is looked for it, and how much goes at a time: the system takes a millisecond for 5 MiB. */
const TICK_MS = 100;
const BYTES_PER_TICK = 4 * 1024 * 1024;
/**
 * Requests of up to so much do not wait behind longer ones: what guests and kernels ask for. Without it some dozen clients that
 * send the header of a write of 32 MiB and nothing more keep everybody's writes of 128 KiB waiting, as long as they come back.
 */
const MEDIUM_BYTES = 1024 * 1024 + HEADROOM;
/** The share of what is not for small requests that longer ones never have. */
const MEDIUM_SHARE = 1 / 10;
/** After somebody got no slab the small share counts as used up for so long, milliseconds. */
const SHORTAGE_MS = 2_000;

type BlockKind = 'slab' | 'receive' | 'large' | 'own' | 'ownReceive';

/** A piece of memory with a count of who still needs it. */
export class Block {
  /** Bytes handed out from the front. */
  used = 0;
  pins = 0;
  /** Who has it, and what it has taken of the budget for it, bytes. */
  account: MemoryAccount | undefined;
  charge = 0;
  /** Somebody may still be busy with it when its last pin is gone: it is not used again. */
  isLost = false;
  /** performance.now() when it was given back. */
  keptSince = 0;

  constructor(
    readonly buffer: Buffer,
    readonly kind: BlockKind,
  ) {}
}

/** The share of one connection. */
export class MemoryAccount {
  /** Bytes of the budget that it holds. */
  held = 0;
  isOwnTaken = false;
  /** Bytes that it waits for, or that are set aside for it; 0: neither. */
  wanted = 0;
  isGranted = false;
  /**
   * What waits is being begun: what is taken now is what it waited for. At other times that is for a reply to something else, which
   * must not end the wait.
   */
  isBeginning = false;

  /**
   * @param granted called, in a turn of its own, when what it waits for is set aside for it
   * @param copies how often its data lie in memory at the same time: twice under TLS, which makes a second copy
   */
  constructor(
    readonly granted: () => void,
    readonly copies: number,
  ) {}
}

/** How the memory of a server, or of one of its event loops, is used, bytes. */
export interface MemoryUse {
  /** Held for requests and replies, and how much that may be. */
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
  /** Of that, what is kept for those of MEDIUM_BYTES at most, and what they use. */
  #mediumMin = 0;
  #mediumUsed = 0;
  #smallUsed = 0;
  /** Blocks for one request, and what is promised for some. */
  #largeUsed = 0;
  #keptSmall = 0;
  #keptLarge = 0;
  readonly #slabs: Block[] = [];
  readonly #receives: Block[] = [];
  readonly #own: Block[] = [];
  /** The one that was given back last is at the end. */
  readonly #large: Block[] = [];
  /** Those that wait for more than MEDIUM_BYTES, and for less. */
  readonly #queue: MemoryAccount[] = [];
  readonly #mediumQueue: MemoryAccount[] = [];
  #isGrantScheduled = false;
  #refusedSlabAt = -Infinity;
  #timer: NodeJS.Timeout | undefined;

  /** @param maxBytes the budget; a request that needs more than all of it gets its memory when nobody else has any */
  constructor(maxBytes: number) {
    this.maxBytes = maxBytes;
  }

  /** The budget. With a smaller one than is in use nobody gets more until enough was given back. */
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

  /** What whoever is first in the queue waits for, or a slab if there was none lately; 0: nobody lacks memory. */
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
    const block = this.#own.pop() ?? new Block(Buffer.allocUnsafeSlow(OWN_BYTES), 'own');
    block.account = account;
    return block;
  }

  /** The same, to receive requests into. A connection asks for it once. */
  takeOwnReceive(): Block {
    return new Block(Buffer.allocUnsafeSlow(OWN_RECEIVE_BYTES), 'ownReceive');
  }

  /** Whether there is memory for a request of `length` bytes; if not, see `wait`. */
  hasRoom(account: MemoryAccount, length: number): boolean {
    const charge = capacityFor(length) * account.copies;
    if (account.isGranted) return charge <= account.wanted || this.#largeUsed === account.wanted;
    return this.#queueFor(account, charge).length === 0 && this.#fits(account, charge);
  }

  /**
   * A block of at least `length` bytes for one request. Whoever has asked `hasRoom` before stays within the budget; it is
   * for the few bytes of a reply that one need not ask.
   */
  takeLarge(account: MemoryAccount, length: number): Block {
    if (account.isBeginning) this.endWait(account);
    const capacity = capacityFor(length);
    const block = this.#findKept(capacity) ?? this.#allocateLarge(capacity);
    this.#charge(block, account, capacity * account.copies);
    this.#take(account, block.charge);
    return block;
  }

  /** `bytes` are needed that are no block of the pool, or will be one later. To be given back with `unclaim`. */
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

  /** `account.granted` is called when there is memory for `length` bytes, after all who wait already. */
  wait(account: MemoryAccount, length: number): void {
    if (account.wanted > 0) return;
    account.wanted = capacityFor(length) * account.copies;
    this.#queueFor(account, account.wanted).push(account);
    // What is free may be what others were kept from.
    this.#scheduleGrant();
  }

  /** `account` does not want what it waits for, or has got it. */
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

  /** Nobody needs `block` any more. */
  give(block: Block): void {
    const { account, kind } = block;
    block.used = 0;
    block.pins = 0;
    block.account = undefined;
    if (kind === 'slab' || kind === 'receive') {
      this.#smallUsed -= block.charge;
      if (account !== undefined) account.held -= block.charge;
      const size = block.buffer.length;
      if (block.isLost || this.#keptSmall + size > this.#keptSmallMax) return;
      this.#keptSmall += size;
      (kind === 'slab' ? this.#slabs : this.#receives).push(block);
    } else if (kind === 'large') {
      if (account !== undefined) {
        this.#unuse(account, block.charge);
        account.held -= block.charge;
      }
      if (!block.isLost && block.buffer.length >= LARGE_STEP) this.#keep(block);
      this.#scheduleGrant();
    } else if (kind === 'own') {
      if (account !== undefined) account.isOwnTaken = false;
      if (!block.isLost && this.#own.length < KEPT_OWN) this.#own.push(block);
    }
  }

  #takeSmall(account: MemoryAccount, kept: Block[], kind: BlockKind, size: number): Block | undefined {
    const charge = size * account.copies;
    if (this.#smallUsed + charge > this.#smallMax) return undefined;
    let block = kept.pop();
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
      // What longer ones wait for is not taken from them.
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
    // What is kept has other sizes: it makes room.
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

  /** Give back what was not used for longest. */
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

  /** Not at once: memory is given back in the middle of somebody's work. */
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
        // Set aside: whoever comes in between does not get it.
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

/** Short ones are as long as they have to be, and are not kept. */
function capacityFor(length: number): number {
  if (length <= LARGE_STEP / 2) return length;
  return Math.ceil(Math.max(0, length - HEADROOM) / LARGE_STEP) * LARGE_STEP + HEADROOM;
}
