/**
 * Memory for replies and payloads, shared by all connections of a server: slabs in which many small replies lie side by
 * side, and large buffers for one request each. It owns what is kept for reuse and bounds it; it never decides when
 * memory is free, whoever took a block counts its pins.
 *
 * Few long-lived slabs instead of a buffer per reply: a batch of replies leaves in one write, the memory stays warm in
 * the cache, and a device that looks up the address of an ArrayBuffer may remember it.
 */

/** Bytes of a slab: several batches of 32 replies of 4 KiB. */
export const SLAB_BYTES = 512 * 1024;
/** Requests with more data than this get a buffer of their own. */
export const LARGE_BYTES = SLAB_BYTES / 4;
/** Slabs kept for reuse, for all connections together: 8 MiB. */
const KEPT_SLABS = 16;
/** Bytes of large buffers kept for reuse, for all connections together. */
const KEPT_LARGE_BYTES = 64 * 1024 * 1024;
/** Large buffers come in steps of this size, so that requests of one size find each other's. */
const LARGE_STEP = 64 * 1024;
/** Room in a large buffer beyond its step: a reply header, so that a request of exactly 1 MiB takes 1 MiB and a bit. */
const LARGE_HEADROOM = 64;

/** A piece of memory with a count of who still needs it. */
export class Block {
  /** Bytes handed out from the front. */
  used = 0;
  pins = 0;

  constructor(
    readonly buffer: Buffer,
    readonly isSlab: boolean,
  ) {}
}

export class BufferPool {
  private readonly slabs: Block[] = [];
  private readonly large: Block[] = [];
  private keptLargeBytes = 0;

  /** A slab, empty. */
  takeSlab(): Block {
    return this.slabs.pop() ?? new Block(Buffer.allocUnsafeSlow(SLAB_BYTES), true);
  }

  /** A block of at least `length` bytes for one request. */
  takeLarge(length: number): Block {
    const capacity = Math.ceil(Math.max(0, length - LARGE_HEADROOM) / LARGE_STEP) * LARGE_STEP + LARGE_HEADROOM;
    for (let i = this.large.length - 1; i >= 0; i--) {
      const block = this.large[i];
      if (block !== undefined && block.buffer.length === capacity) {
        this.large.splice(i, 1);
        this.keptLargeBytes -= capacity;
        return block;
      }
    }
    return new Block(Buffer.allocUnsafeSlow(capacity), false);
  }

  /** A block for one small reply, of exactly `length` bytes: when a connection holds all the slabs it may. */
  takePrivate(length: number): Block {
    return new Block(Buffer.allocUnsafeSlow(length), false);
  }

  /** Nobody needs `block` any more. */
  give(block: Block): void {
    block.used = 0;
    block.pins = 0;
    if (block.isSlab) {
      if (this.slabs.length < KEPT_SLABS) this.slabs.push(block);
      return;
    }
    const capacity = block.buffer.length;
    if (capacity < LARGE_STEP) return;
    // The oldest go first: a size that nobody asks for any more does not block the list.
    while (this.keptLargeBytes + capacity > KEPT_LARGE_BYTES) {
      const oldest = this.large.shift();
      if (oldest === undefined) return;
      this.keptLargeBytes -= oldest.buffer.length;
    }
    this.large.push(block);
    this.keptLargeBytes += capacity;
  }
}
