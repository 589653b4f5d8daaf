/**
 * The payload of one request that comes in pieces: data to be written, the filter of a block status, or what belongs to a
 * refused request and is thrown away. It owns the memory that it is collected in; what happens with it when it is complete
 * is the transmission's affair.
 */

import { MAX_PAYLOAD } from '../protocol/wire.js';
import { OWN_BYTES, type Block, type BufferPool, type MemoryAccount } from './buffer-pool.js';
import type { Refusal } from './request.js';

/** What must be missing of a payload for it to be received where it belongs; less comes along with what follows. */
const IN_PLACE_BYTES = 16 * 1024;

export class IncomingPayload {
  /** Bytes still to come, or to be skipped if there is no `data`. */
  left = 0;
  /** All of it, with room for what is still to come. */
  data: Buffer | undefined;
  /** The pooled memory that `data` lies in. */
  block: Block | undefined;
  /** What its request is refused with when it has been skipped. */
  refusal: Refusal | undefined;
  /** Bytes of all payloads so far. */
  movedBytes = 0;

  readonly #pool: BufferPool;
  readonly #account: MemoryAccount;

  constructor(pool: BufferPool, account: MemoryAccount) {
    this.#pool = pool;
    this.#account = account;
  }

  /** A payload of `length` bytes begins. False if there is no memory for it. */
  begin(length: number): boolean {
    // requestError() has seen to it that it is at most MAX_PAYLOAD.
    if (length > MAX_PAYLOAD) throw new Error('incoming-payload: an unchecked length');
    let block: Block | undefined;
    if (this.#pool.hasRoom(this.#account, length)) block = this.#pool.takeLarge(this.#account, length);
    else if (length <= OWN_BYTES) block = this.#pool.takeOwn(this.#account);
    if (block === undefined) return false;
    block.pins = 1;
    this.block = block;
    this.data = block.buffer.subarray(0, length);
    this.left = length;
    return true;
  }

  /** A payload of `length` bytes begins that is not looked at; its request is refused when it has passed. */
  skip(length: number, refusal: Refusal): void {
    this.refusal = refusal;
    this.data = undefined;
    this.left = length;
  }

  /** Whether enough of it is missing to be received where it belongs. */
  get isWorthReceivingInPlace(): boolean {
    return this.data !== undefined && this.left >= IN_PLACE_BYTES;
  }

  /** Where the next of it belongs. */
  get rest(): Buffer {
    if (this.data === undefined) throw new Error('incoming-payload: there is none');
    return this.data.subarray(this.data.length - this.left);
  }

  /** Take what belongs to it from `chunk`, from `at` on: so many bytes. To be followed by `came`. */
  copyFrom(chunk: Buffer, at: number): number {
    const taken = Math.min(this.left, chunk.length - at);
    if (this.data !== undefined) chunk.copy(this.data, this.data.length - this.left, at, at + taken);
    return taken;
  }

  /** So many bytes of it are where they belong. Whether it is complete. */
  came(length: number): boolean {
    this.left -= length;
    this.movedBytes += length;
    return this.left === 0;
  }

  /** It is complete, and somebody else's. */
  clear(): void {
    this.data = undefined;
    this.block = undefined;
    this.refusal = undefined;
  }

  /** What has come of one that has `length` bytes in all; zeros in the place of what was skipped. */
  arrived(length: number): Buffer {
    const came = length - this.left;
    return this.data?.subarray(0, came) ?? Buffer.alloc(came);
  }
}
