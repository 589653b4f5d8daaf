/**
 * The replies of one connection on their way to the client. It owns the memory that they are built in, the order in which they
 * are given to the socket, and the count of bytes that the socket has not sent; it uses neither requests nor devices.
 *
 * Replies are built side by side in a slab while requests are executed, and leave in one write per batch. A read whose data
 * arrive later keeps its place in the slab (a pin) while the replies before and after it leave.
 */

import type { Duplex } from 'node:stream';
import { LARGE_BYTES, OWN_BYTES, type Block, type BufferPool, type MemoryAccount } from './buffer-pool.js';
import { encodeString, NBD_ERRNO, REPLY_FLAG_DONE, REPLY_TYPE, writeUInt64 } from '../protocol/wire.js';
import type { Failure } from './failure.js';
import { CHUNK_OFFSET_SIZE, HOLE_PAYLOAD_SIZE, type Addressee, type ReplyEncoder } from './reply-encoder.js';

/** Most slabs of one connection; when slow reads pin so many, each further reply gets a block of its own. */
const MAX_SLABS_PER_CONNECTION = 8;
/** Replies of so many bytes are given to the socket at once, so that the client reads while the next ones are built. */
const FLUSH_AT_BYTES = 256 * 1024;

/** "Conventions": a string "SHOULD be no longer than 256 bytes". */
const MAX_ERROR_MESSAGE_BYTES = 256;
/** In front of an error chunk's message: the error value and the message's length. */
const ERROR_PAYLOAD_HEAD = 6;

/** Bytes [start, end) of a block, ready to leave. Holds one pin of the block. */
interface Piece {
  readonly block: Block;
  readonly start: number;
  end: number;
}

export class ReplyQueue {
  /** Reply bytes that the socket has not sent yet. */
  unsentBytes = 0;
  /** Reply bytes that the socket has sent. */
  takenBytes = 0;

  #current: Block | undefined;
  /** Offset in `current` of the first reply that is not in `ready` yet. */
  #openStart = 0;
  #slabsHeld = 0;
  #ready: Piece[] = [];
  #readyBytes = 0;
  readonly #writing: Piece[] = [];
  #readBlock: Block | undefined;
  #readAt = 0;
  #readLength = 0;
  #isClosed = false;

  readonly #socket: Duplex;
  readonly #pool: BufferPool;
  readonly #account: MemoryAccount;
  readonly #encoder: ReplyEncoder;
  /** Called when the socket has sent replies: there may be room for further requests. */
  readonly #onRoom: () => void;

  constructor(
    socket: Duplex,
    pool: BufferPool,
    account: MemoryAccount,
    encoder: ReplyEncoder,

    onRoom: () => void,
  ) {
    this.#socket = socket;
    this.#pool = pool;
    this.#account = account;
    this.#encoder = encoder;
    this.#onRoom = onRoom;
  }

  /** Success of a request that is not a read. */
  done(cookieHigh: number, cookieLow: number, offsetHigh: number, offsetLow: number): void {
    if (this.#isClosed) return;
    const size = this.#encoder.doneSize;
    const block = this.#reserve(size);
    this.#encoder.writeDone(block.buffer, block.used - size, cookieHigh, cookieLow, offsetHigh, offsetLow);
    this.unsentBytes += size;
  }

  /** Success of a read of no bytes, which must not be a simple reply if replies are structured. */
  doneEmptyRead(to: Addressee): void {
    if (this.#encoder.chunkHeaderSize === 0) this.done(to.cookieHigh, to.cookieLow, to.offsetHigh, to.offsetLow);
    else this.chunk(REPLY_FLAG_DONE, REPLY_TYPE.NONE, to, 0);
  }

  /** A request failed. */
  error(to: Addressee, failure: Failure): void {
    if (this.#isClosed) return;
    const { message, offset } = failure;
    const errno = sentErrno(failure.errno);
    if (this.#encoder.chunkHeaderSize === 0) {
      const size = this.#encoder.doneSize;
      const block = this.#reserve(size);
      this.#encoder.writeError(block.buffer, block.used - size, to.cookieHigh, to.cookieLow, errno);
      this.unsentBytes += size;
      return;
    }
    const text = encodeString(message, MAX_ERROR_MESSAGE_BYTES);
    const type = offset === undefined ? REPLY_TYPE.ERROR : REPLY_TYPE.ERROR_OFFSET;
    const length = ERROR_PAYLOAD_HEAD + text.length + (offset === undefined ? 0 : CHUNK_OFFSET_SIZE);
    const payload = this.chunk(REPLY_FLAG_DONE, type, to, length);
    payload.writeUInt32BE(errno, 0);
    payload.writeUInt16BE(text.length, 4);
    text.copy(payload, ERROR_PAYLOAD_HEAD);
    if (offset !== undefined) writeUInt64(payload, offset, ERROR_PAYLOAD_HEAD + text.length);
  }

  /** A whole read is answered by one hole. */
  hole(to: Addressee, offset: number, length: number): void {
    const payload = this.chunk(REPLY_FLAG_DONE, REPLY_TYPE.OFFSET_HOLE, to, HOLE_PAYLOAD_SIZE);
    writeUInt64(payload, offset, 0);
    payload.writeUInt32BE(length, CHUNK_OFFSET_SIZE);
  }

  /** A chunk. Returns its payload of `length` bytes, which the caller fills before it calls the queue again. */
  chunk(flags: number, type: number, to: Addressee, length: number): Buffer {
    const header = this.#encoder.chunkHeaderSize;
    const total = header + length;
    if (this.#isClosed) return Buffer.allocUnsafe(length);
    let block: Block;
    if (total > LARGE_BYTES) {
      block = this.#pool.takeLarge(this.#account, total);
      block.used = total;
      this.#closeOpenPiece();
      this.#pushReady(block, 0, total);
    } else {
      block = this.#reserve(total);
    }
    const at = block.used - total;
    this.#encoder.writeChunkHeader(block.buffer, at, flags, type, to, length);
    this.unsentBytes += total;
    return block.buffer.subarray(at + header, block.used);
  }

  /** Send replies built by another server, before all others. */
  sendFirst(bytes: Uint8Array): void {
    const block = this.#pool.takeLarge(this.#account, bytes.length);
    block.buffer.set(bytes);
    block.used = bytes.length;
    this.unsentBytes += bytes.length;
    this.#pushReady(block, 0, bytes.length);
    this.flush();
  }

  /** A copy of the last `length` bytes given to the socket, at most `unsentBytes`. */
  lastBytes(length: number): Buffer {
    const given = this.#writing.map(({ block, start, end }) => block.buffer.subarray(start, end));
    const all = Buffer.concat(given);
    return all.subarray(all.length - length);
  }

  /** Memory for a reply of several chunks, laid out by the caller; to be given back with sendParts or dropParts. */
  beginParts(bytes: number): Block {
    const block = this.#pool.takeLarge(this.#account, bytes);
    block.used = bytes;
    block.pins = 1;
    return block;
  }

  sendParts(block: Block, bytes: number): void {
    if (!this.#isClosed) {
      this.#closeOpenPiece();
      this.unsentBytes += bytes;
      this.#pushReady(block, 0, bytes);
    }
    this.#unpin(block);
  }

  dropParts(block: Block): void {
    this.#unpin(block);
  }

  /** Whether there is memory for the reply to a read of `length` bytes; if not, see BufferPool.wait. */
  hasRoomFor(length: number): boolean {
    const total = this.readSize(length);
    return (length <= LARGE_BYTES && this.#makeRoom(total)) || this.#pool.hasRoom(this.#account, total);
  }

  /** Bytes of the reply to a read of `length` bytes. */
  readSize(length: number): number {
    return this.#encoder.readHeaderSize + length;
  }

  /**
   * Memory for the data of a read of `length` bytes, for which there is room (see hasRoomFor). The next call of the queue
   * must be finishRead, failRead or detachRead.
   */
  beginRead(length: number): Buffer {
    const header = this.#encoder.readHeaderSize;
    const total = header + length;
    let block: Block;
    if (length > LARGE_BYTES || !this.#makeRoom(total)) {
      block = this.#pool.takeLarge(this.#account, total);
      block.used = total;
      block.pins = 1;
    } else {
      block = this.#reserve(total);
    }
    this.#readBlock = block;
    this.#readAt = block.used - total;
    this.#readLength = length;
    return block.buffer.subarray(this.#readAt + header, block.used);
  }

  /** The data of the read just begun are in place. */
  finishRead(cookieHigh: number, cookieLow: number, offset: number): void {
    const block = this.#takeReadBlock();
    if (!this.#isClosed) {
      this.#encoder.writeReadHeader(block.buffer, this.#readAt, cookieHigh, cookieLow, offset, this.#readLength);
    }
    this.unsentBytes += this.#encoder.readHeaderSize + this.#readLength;
    if (block === this.#current) {
      if (block.used - this.#openStart >= FLUSH_AT_BYTES) this.flush();
      return;
    }
    this.#closeOpenPiece();
    this.#pushReady(block, this.#readAt, block.used);
    this.#unpin(block);
    if (this.#readyBytes >= FLUSH_AT_BYTES) this.flush();
  }

  /** The read just begun failed: its memory is given back and an error is sent instead. */
  failRead(to: Addressee, failure: Failure): void {
    const block = this.#takeReadBlock();
    if (block === this.#current) block.used = this.#readAt;
    else this.#unpin(block);
    this.error(to, failure);
  }

  /** The read just begun finishes later: the caller owns its memory until completeRead. Other replies overtake it. */
  detachRead(): { readonly block: Block; readonly at: number } {
    const block = this.#takeReadBlock();
    if (block === this.#current) {
      const end = block.used;
      block.used = this.#readAt;
      this.#closeOpenPiece();
      block.used = end;
      this.#openStart = end;
      block.pins++;
    }
    return { block, at: this.#readAt };
  }

  /** A detached read has failed. */
  abandonRead(block: Block, to: Addressee, failure: Failure): void {
    this.error(to, failure);
    this.#unpin(block);
  }

  /** A detached read has ended, and was answered before. */
  dropRead(block: Block): void {
    this.#unpin(block);
  }

  /** A detached read has finished, with its data in place. */
  completeRead(block: Block, at: number, cookieHigh: number, cookieLow: number, offset: number, length: number): void {
    if (!this.#isClosed) {
      this.#encoder.writeReadHeader(block.buffer, at, cookieHigh, cookieLow, offset, length);
      const total = this.#encoder.readHeaderSize + length;
      this.unsentBytes += total;
      this.#pushReady(block, at, at + total);
    }
    this.#unpin(block);
  }

  /** Give everything that is ready to the socket: one write if it is contiguous, else one gathered write. */
  flush(): void {
    this.#closeOpenPiece();
    const pieces = this.#ready;
    if (pieces.length === 0) {
      // A slab was taken for a reply that then did not need it.
      if (this.#current?.pins === 1) this.#leaveCurrent();
      return;
    }
    this.#ready = [];
    this.#readyBytes = 0;
    if (this.#isClosed || !this.#socket.writable) {
      for (const piece of pieces) this.#forget(piece);
      return;
    }
    if (pieces.length > 1) this.#socket.cork();
    for (const piece of pieces) {
      this.#writing.push(piece);
      this.#socket.write(piece.block.buffer.subarray(piece.start, piece.end), this.#onWritten);
    }
    if (pieces.length > 1) this.#socket.uncork();
  }

  /** The socket is closed: nothing is sent any more, and memory is given back as the last reads finish. */
  close(): void {
    this.#isClosed = true;
    this.flush();
    this.#leaveCurrent();
  }

  readonly #onWritten = (error?: Error | null): void => {
    const piece = this.#writing.shift();
    if (piece === undefined) return;
    if (error) {
      // The socket is being destroyed, and the order of its callbacks is undefined: the memory is left to the garbage
      // collector.
      piece.block.isLost = true;
      this.#forget(piece);
      return;
    }
    this.takenBytes += piece.end - piece.start;
    this.#forget(piece);
    this.#onRoom();
  };

  #forget(piece: Piece): void {
    this.unsentBytes -= piece.end - piece.start;
    this.#unpin(piece.block);
  }

  /** `size` bytes at the end of the current block; they lie before the returned block's `used`. */
  #reserve(size: number): Block {
    if (!this.#makeRoom(size)) {
      // Short replies do not wait: a request is answered even without memory in the budget.
      this.#leaveCurrent();
      this.#begin(this.#pool.takeLarge(this.#account, size));
    }
    const current = this.#current as Block;
    current.used += size;
    return current;
  }

  /** Whether there are `size` bytes at the end of the current block, which may be a new one. */
  #makeRoom(size: number): boolean {
    const current = this.#current;
    if (current !== undefined && current.used + size <= current.buffer.length) return true;
    let next: Block | undefined;
    if (this.#slabsHeld < MAX_SLABS_PER_CONNECTION && (next = this.#pool.takeSlab(this.#account)) !== undefined) {
      this.#slabsHeld++;
    } else {
      // `current` may be the connection's own block: leaving it may free it.
      this.#leaveCurrent();
      if (size > OWN_BYTES) return false;
      next = this.#pool.takeOwn(this.#account);
      if (next === undefined) return false;
    }
    this.#leaveCurrent();
    this.#begin(next);
    return true;
  }

  #begin(block: Block): void {
    block.pins = 1;
    block.used = 0;
    this.#openStart = 0;
    this.#current = block;
  }

  #leaveCurrent(): void {
    const current = this.#current;
    if (current === undefined) return;
    this.#closeOpenPiece();
    this.#current = undefined;
    this.#unpin(current);
  }

  #closeOpenPiece(): void {
    const current = this.#current;
    if (current === undefined || current.used === this.#openStart) return;
    this.#pushReady(current, this.#openStart, current.used);
    this.#openStart = current.used;
  }

  #pushReady(block: Block, start: number, end: number): void {
    this.#readyBytes += end - start;
    const last = this.#ready.at(-1);
    if (last !== undefined && last.block === block && last.end === start) {
      last.end = end;
      return;
    }
    block.pins++;
    this.#ready.push({ block, start, end });
  }

  #unpin(block: Block): void {
    block.pins--;
    if (block.pins === 1 && block === this.#current && this.#openStart === block.used) {
      // All of its replies have left: the next one starts at its front, which is still in the processor's cache.
      this.#current = undefined;
      block.pins = 0;
    }
    if (block.pins === 0) {
      if (block.kind === 'slab') this.#slabsHeld--;
      this.#pool.give(block);
    }
  }

  #takeReadBlock(): Block {
    const block = this.#readBlock;
    if (block === undefined) throw new Error('reply-queue: no read was begun');
    this.#readBlock = undefined;
    return block;
  }
}

/** The error value as it is sent: never 0, which would say that the request has succeeded, and nothing that has no 32 bits. */
function sentErrno(errno: number): number {
  return Number.isInteger(errno) && errno > 0 && errno <= 0xffff_ffff ? errno : NBD_ERRNO.EIO;
}
