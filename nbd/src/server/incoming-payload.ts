/**
 * The payload of one request that arrives in pieces: data of a write, the filter of a block status, or the payload of a refused
 * request, which is discarded. It owns the memory that collects it; the parser uses it when it is complete.
 */

import { MAX_PAYLOAD } from '../protocol/wire.js';
import { OWN_BYTES, type Block, type BufferPool, type MemoryAccount } from './buffer-pool.js';
import type { Refusal } from './request.js';

/** With at least this much missing a payload is received in place; less arrives together with the next requests. */
const IN_PLACE_BYTES = 16 * 1024;

export class IncomingPayload {
  /** Bytes still to arrive; discarded if there is no `data`. */
  left = 0;
  /** The whole payload, with room for the bytes still to arrive. */
  data: Buffer | undefined;
  /** The pooled memory of `data`. */
  block: Block | undefined;
  /** The refusal of its request, sent when the payload has been skipped. */
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
    // requestError() has refused longer ones.
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

  /** A payload of `length` bytes begins that is discarded; its request is refused afterwards. */
  skip(length: number, refusal: Refusal): void {
    this.refusal = refusal;
    this.data = undefined;
    this.left = length;
  }

  /** Whether enough of it is missing to receive it in place. */
  get isWorthReceivingInPlace(): boolean {
    return this.data !== undefined && this.left >= IN_PLACE_BYTES;
  }

  /** The part of `data` that is still to arrive. */
  get rest(): Buffer {
    if (this.data === undefined) throw new Error('incoming-payload: there is none');
    return this.data.subarray(this.data.length - this.left);
  }

  /** Copy its bytes from `chunk`, starting at `at`. Returns how many; the caller passes that to `came`. */
  copyFrom(chunk: Buffer, at: number): number {
    const taken = Math.min(this.left, chunk.length - at);
    if (this.data !== undefined) chunk.copy(this.data, this.data.length - this.left, at, at + taken);
    return taken;
  }

  /** `length` more bytes of it are in `data` or discarded. Returns whether it is complete. */
  came(length: number): boolean {
    this.left -= length;
    this.movedBytes += length;
    return this.left === 0;
  }

  /** It is complete and was passed on. */
  clear(): void {
    this.data = undefined;
    this.block = undefined;
    this.refusal = undefined;
  }

  /** What has arrived of a payload of `length` bytes; zeros in place of discarded bytes. */
  arrived(length: number): Buffer {
    const came = length - this.left;
    return this.data?.subarray(0, came) ?? Buffer.alloc(came);
  }
}
