/**
 * The replies of one connection on their way out. It owns the memory they are built in, the order in which they are
 * handed to the socket, and the count of bytes the socket has not taken; it knows neither requests nor devices.
 *
 * Replies are laid side by side in a slab while requests are executed, and leave in one write per batch. A read whose
 * data comes later keeps its place in the slab (a pin) while the replies before and after it go on without it.
 */

import type { Duplex } from 'node:stream';
import { LARGE_BYTES, type Block, type BufferPool } from './buffer-pool.js';
import type { ReplyEncoder } from './reply-encoder.js';

/** Slabs one connection may hold at a time; with more pinned by slow reads, replies get memory of their own. */
const MAX_SLABS_PER_CONNECTION = 8;
/** Replies of this many bytes are handed to the socket at once, so that the client reads while the next are made. */
const FLUSH_AT_BYTES = 256 * 1024;

/** Bytes [start, end) of a block, ready to leave. Holds one pin of the block. */
interface Piece {
  readonly block: Block;
  readonly start: number;
  end: number;
}

export class ReplyQueue {
  /** Reply bytes made and not yet taken by the socket. */
  unsentBytes = 0;

  private current: Block | undefined;
  /** Where in `current` the replies begin that are not yet in `ready`. */
  private openStart = 0;
  private slabsHeld = 0;
  private ready: Piece[] = [];
  private readyBytes = 0;
  private readonly writing: Piece[] = [];
  private readBlock: Block | undefined;
  private readAt = 0;
  private readLength = 0;
  private isClosed = false;

  constructor(
    private readonly socket: Duplex,
    private readonly pool: BufferPool,
    private readonly encoder: ReplyEncoder,
    /** Called when the socket took something: there may be room for further requests. */
    private readonly onRoom: () => void,
  ) {}

  /** A reply without data; `errno` 0 means success. */
  status(cookieHigh: number, cookieLow: number, errno: number): void {
    if (this.isClosed) return;
    const size = this.encoder.statusSize;
    const block = this.reserve(size);
    this.encoder.writeStatus(block.buffer, block.used - size, cookieHigh, cookieLow, errno);
    this.unsentBytes += size;
  }

  /**
   * Memory for the data of a read of `length` bytes. Must be followed, before anything else is asked of the queue, by
   * finishRead, failRead or detachRead.
   */
  beginRead(length: number): Buffer {
    const header = this.encoder.readHeaderSize;
    const total = header + length;
    let block: Block;
    if (length > LARGE_BYTES) {
      block = this.pool.takeLarge(total);
      block.used = total;
      block.pins = 1;
    } else {
      block = this.reserve(total);
    }
    this.readBlock = block;
    this.readAt = block.used - total;
    this.readLength = length;
    return block.buffer.subarray(this.readAt + header, block.used);
  }

  /** The data of the read just begun is in place. */
  finishRead(cookieHigh: number, cookieLow: number, offset: number): void {
    const block = this.takeReadBlock();
    this.encoder.writeReadHeader(block.buffer, this.readAt, cookieHigh, cookieLow, offset, this.readLength);
    this.unsentBytes += this.encoder.readHeaderSize + this.readLength;
    if (block === this.current) {
      if (block.used - this.openStart >= FLUSH_AT_BYTES) this.flush();
      return;
    }
    this.closeOpenPiece();
    this.pushReady(block, this.readAt, block.used);
    this.unpin(block);
    if (this.readyBytes >= FLUSH_AT_BYTES) this.flush();
  }

  /** The read just begun failed: its memory is given back and an error takes its place. */
  failRead(cookieHigh: number, cookieLow: number, errno: number): void {
    const block = this.takeReadBlock();
    if (block === this.current) block.used = this.readAt;
    else this.unpin(block);
    this.status(cookieHigh, cookieLow, errno);
  }

  /** The read just begun finishes later: its memory is the caller's until completeRead. Others overtake it. */
  detachRead(): { readonly block: Block; readonly at: number } {
    const block = this.takeReadBlock();
    if (block === this.current) {
      const end = block.used;
      block.used = this.readAt;
      this.closeOpenPiece();
      block.used = end;
      this.openStart = end;
      block.pins++;
    }
    return { block, at: this.readAt };
  }

  /** A detached read has finished, with its data in place or with an error. */
  completeRead(
    block: Block,
    at: number,
    cookieHigh: number,
    cookieLow: number,
    offset: number,
    length: number,
    errno: number,
  ): void {
    if (this.isClosed) {
      this.unpin(block);
      return;
    }
    if (errno === 0) {
      this.encoder.writeReadHeader(block.buffer, at, cookieHigh, cookieLow, offset, length);
      const total = this.encoder.readHeaderSize + length;
      this.unsentBytes += total;
      this.pushReady(block, at, at + total);
    } else {
      this.status(cookieHigh, cookieLow, errno);
    }
    this.unpin(block);
  }

  /** Hand everything that is ready to the socket: one write if it lies side by side, one gathered write if not. */
  flush(): void {
    this.closeOpenPiece();
    const pieces = this.ready;
    if (pieces.length === 0) return;
    this.ready = [];
    this.readyBytes = 0;
    if (this.isClosed || !this.socket.writable) {
      for (const piece of pieces) this.forget(piece);
      return;
    }
    if (pieces.length > 1) this.socket.cork();
    for (const piece of pieces) {
      this.writing.push(piece);
      this.socket.write(piece.block.buffer.subarray(piece.start, piece.end), this.onWritten);
    }
    if (pieces.length > 1) this.socket.uncork();
  }

  /** The socket is gone: nothing leaves any more, memory goes back as the last reads finish. */
  close(): void {
    this.isClosed = true;
    this.flush();
    const { current } = this;
    this.current = undefined;
    if (current !== undefined) this.unpin(current);
  }

  private readonly onWritten = (error?: Error | null): void => {
    const piece = this.writing.shift();
    if (piece === undefined) return;
    if (error) {
      // The socket is being destroyed and calls back in no certain order: the memory is left to the collector.
      this.unsentBytes -= piece.end - piece.start;
      return;
    }
    this.forget(piece);
    this.onRoom();
  };

  private forget(piece: Piece): void {
    this.unsentBytes -= piece.end - piece.start;
    this.unpin(piece.block);
  }

  /** `size` bytes at the end of the current slab; they lie before the returned block's `used`. */
  private reserve(size: number): Block {
    const { current } = this;
    if (current !== undefined && current.used + size <= current.buffer.length) {
      current.used += size;
      return current;
    }
    if (current !== undefined) {
      this.closeOpenPiece();
      this.current = undefined;
      this.unpin(current);
    }
    let next: Block;
    if (this.slabsHeld < MAX_SLABS_PER_CONNECTION) {
      next = this.pool.takeSlab();
      this.slabsHeld++;
    } else {
      next = this.pool.takePrivate(size);
    }
    next.pins = 1;
    next.used = size;
    this.openStart = 0;
    this.current = next;
    return next;
  }

  private closeOpenPiece(): void {
    const { current } = this;
    if (current === undefined || current.used === this.openStart) return;
    this.pushReady(current, this.openStart, current.used);
    this.openStart = current.used;
  }

  private pushReady(block: Block, start: number, end: number): void {
    this.readyBytes += end - start;
    const last = this.ready.at(-1);
    if (last !== undefined && last.block === block && last.end === start) {
      last.end = end;
      return;
    }
    block.pins++;
    this.ready.push({ block, start, end });
  }

  private unpin(block: Block): void {
    block.pins--;
    if (block.pins === 0) {
      if (block.isSlab) this.slabsHeld--;
      this.pool.give(block);
    } else if (block.pins === 1 && block === this.current && this.openStart === block.used) {
      // Everything in it has left: begin again at its front, which is still in the processor's cache.
      block.used = 0;
      this.openStart = 0;
    }
  }

  private takeReadBlock(): Block {
    const block = this.readBlock;
    if (block === undefined) throw new Error('reply-queue: no read was begun');
    this.readBlock = undefined;
    return block;
  }
}
