/**
 * The memory that a connection's socket receives into. It owns the connection's block and chooses where the next bytes go: into
 * memory that all connections of the thread share, or, while more bytes are known to wait, into a block of the pool. It never
 * looks at the bytes received.
 *
 * A socket must have memory before anything arrives, and most clients are quiet most of the time. So a quiet connection has none
 * of its own: what it receives is parsed before another socket is read, and what is needed longer (the data of a write) is
 * copied. Only a client that sends more than fits, or much data, is given a block, and what arrives there stays there. It keeps
 * the block from one request to the next for as long as it goes on sending.
 */

import type { Block, BufferPool, MemoryAccount } from './buffer-pool.js';

/**
 * Bytes of the shared memory, which a write's data are copied from: few, so that little is copied before a block is taken. Odd,
 * since requests and blocks have even lengths: so a client is rarely silent after having filled exactly this much, or this
 * much and some blocks, which would leave it with a block that it does not use.
 */
const SHARED_BYTES = 16 * 1024 + 1;
/** Least free room in a block for the next receive, bytes. */
const MIN_RECEIVE_BYTES = 64 * 1024;
/** A client that writes more than this between two looks, in requests that are received whole, has a block until it writes less. */
const STREAM_BYTES = 64 * 1024;
const LOOK_MS = 1_000;

/** One per event loop: each thread has its own. Its bytes are parsed or copied before anything else is received. */
const shared = Buffer.allocUnsafeSlow(SHARED_BYTES);

/** The memories, of this event loop, whose clients send much. */
const streaming = new Set<ReceiveMemory>();
let looking: NodeJS.Timeout | undefined;

function look(): void {
  for (const memory of streaming) memory.look();
  if (streaming.size > 0) return;
  clearInterval(looking);
  looking = undefined;
}

/** The kind of buffer that the socket receives into. */
type Target = 'payload' | 'block' | 'shared';

export class ReceiveMemory {
  /** The block of the bytes being parsed: a write that is still running after the turn must pin it. */
  parsed: Block | undefined;
  /** The bytes being parsed are in shared memory: what outlives the turn must be copied (see `keep`). */
  isLent = false;
  target: Target = 'shared';
  /** The block of the bytes that `keep` returned last, pinned for its caller. */
  keptIn: Block | undefined;

  /** What is received or kept goes here; pinned once for that. */
  #block: Block | undefined;
  /** Free bytes of the block at the last receive, and whether the socket filled all memory that it was given. */
  #room = 0;
  #isFull = false;

  /** Bytes of data of writes since the last look. */
  #streamed = 0;
  #isStreaming = false;

  readonly #pool: BufferPool;
  readonly #account: MemoryAccount;
  /** Let the socket ask for its next buffer again. */
  readonly #onQuiet: () => void;

  /** `onQuiet`: called when the client sends less than before; the buffer that `next` has returned last should be replaced. */
  constructor(pool: BufferPool, account: MemoryAccount, onQuiet: () => void) {
    this.#pool = pool;
    this.#account = account;
    this.#onQuiet = onQuiet;
  }

  /** The last receive filled all memory that it was given: more is waiting. */
  get isFull(): boolean {
    return this.#isFull;
  }

  /** The buffer for the next bytes. */
  next(): Buffer {
    const block = this.#isFull || this.#isStreaming ? this.#roomyBlock() : undefined;
    if (block === undefined) return this.forNobody();
    this.target = 'block';
    this.#room = block.buffer.length - block.used;
    return block.buffer.subarray(block.used);
  }

  /** Receive the next bytes into this part of a payload. */
  intoPayload(rest: Buffer): Buffer {
    this.#moveTo('payload');
    this.#isFull = false;
    return rest;
  }

  /** Memory for bytes that are parsed or copied at once, or discarded. */
  forNobody(): Buffer {
    this.#moveTo('shared');
    return shared;
  }

  /** The socket has received `length` bytes, not into a payload. Returns them; the caller parses them, then calls `finish`. */
  take(length: number): Buffer {
    if (this.target === 'shared') {
      this.#isFull = length === SHARED_BYTES;
      this.isLent = true;
      return shared.subarray(0, length);
    }
    const block = this.#block;
    if (block === undefined) throw new Error('receive-memory: received into nothing');
    this.#isFull = length === this.#room;
    const chunk = block.buffer.subarray(block.used, block.used + length);
    block.used += length;
    this.parsed = block;
    return chunk;
  }

  /** What was taken has been parsed. */
  finish(): void {
    this.parsed = undefined;
    this.isLent = false;
    if (this.#streamed > STREAM_BYTES && !this.#isStreaming) this.#stream();
  }

  /** `length` bytes of the bytes being parsed are data of a write. */
  countData(length: number): void {
    this.#streamed += length;
  }

  /** Whether the client still sends much. */
  look(): void {
    const isQuiet = this.#streamed <= STREAM_BYTES;
    this.#streamed = 0;
    if (!isQuiet) return;
    this.#isStreaming = false;
    streaming.delete(this);
    if (this.target === 'block' && !this.#isFull) this.#onQuiet();
  }

  /**
   * Copy `length` bytes of `chunk`, which is lent, from `at` on. Undefined if there is no memory for it; else `keptIn` is its
   * block, with a pin for the caller.
   */
  keep(chunk: Buffer, at: number, length: number): Buffer | undefined {
    let block = this.#block;
    if (block === undefined || block.buffer.length - block.used < length) {
      block = this.#pool.takeReceive(this.#account) ?? this.#pool.takeOwnReceive(this.#account);
      if (block === undefined || block.buffer.length < length) {
        if (block !== undefined) this.#pool.give(block);
        return undefined;
      }
      this.#replaceBlock(block);
    }
    const start = block.used;
    chunk.copy(block.buffer, start, at, at + length);
    block.used += length;
    block.pins++;
    this.keptIn = block;
    return block.buffer.subarray(start, block.used);
  }

  /** One user of `block` has finished with it. */
  unpin(block: Block): void {
    block.pins--;
    if (block.pins === 1 && block === this.#block && this.target !== 'block') {
      this.#block = undefined;
      block.pins = 0;
    }
    if (block.pins === 0) this.#pool.give(block);
  }

  /** The socket is gone. */
  close(): void {
    streaming.delete(this);
    this.#moveTo('shared');
    this.#replaceBlock(undefined);
  }

  /** The next bytes go elsewhere than into the block: without users it is given back. */
  #moveTo(target: Target): void {
    this.target = target;
    if (this.#block?.pins === 1) this.#replaceBlock(undefined);
  }

  /** A block with much room to receive into. Undefined if there is no memory. */
  #roomyBlock(): Block | undefined {
    let block = this.#block;
    if (block !== undefined) {
      // No write uses it: start at its front again.
      if (block.pins === 1) block.used = 0;
      if (block.buffer.length - block.used >= MIN_RECEIVE_BYTES) return block;
    }
    block = this.#pool.takeReceive(this.#account);
    if (block !== undefined) this.#replaceBlock(block);
    return block;
  }

  #stream(): void {
    this.#isStreaming = true;
    streaming.add(this);
    looking ??= setInterval(look, LOOK_MS).unref();
  }

  #replaceBlock(next: Block | undefined): void {
    const before = this.#block;
    this.#block = next;
    if (next !== undefined) next.pins = 1;
    if (before !== undefined) this.unpin(before);
  }
}
