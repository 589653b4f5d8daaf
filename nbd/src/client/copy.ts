/**
 * Copies a whole disk: between two servers, a server and a device of this process, or two devices. It owns the plan (what
 * is data and what zeros), how much is in flight, and the progress; copy-ends.ts knows what the ends are.
 */

import { STATE_ZERO } from '../block-device.js';
import type { AnyDevice } from '../device.js';
import { abortError, offAbort, onAbort } from './aborting.js';
import { checkFunction, checkObject } from '../kinds.js';
import { checkedCount, checkSignal } from './argument-checks.js';
import { NbdClientError } from './client-error.js';
import { copyEnd, type CopyClient, type CopyEnd } from './copy-ends.js';
import type { Extent } from './reply-reader.js';

const DEFAULT_PARALLEL = 8;
const DEFAULT_REQUEST_BYTES = 1024 * 1024;
/** A longer range of zeros is zeroed in several requests, so that there is progress to report, bytes. */
const ZERO_BYTES = 128 * 1024 * 1024;

/** How far a copy is, in bytes. */
export interface CopyProgress {
  /** Read and written. */
  readonly copied: number;
  /** Zeroed at the destination, or left as the zeros that were there. */
  readonly zeroed: number;
  /** The size of the source: `copied` and `zeroed` are as much in the end. */
  readonly total: number;
}

/** How a copy is done. */
export interface CopyOptions {
  /** Requests in flight at each end; by default 8. Memory: `parallel` times `requestBytes`. */
  readonly parallel?: number;
  /** The size of a request, bytes; by default 1 MiB. It is rounded up to the block size of both ends, and not more than the source. */
  readonly requestBytes?: number;
  /** The destination reads as zeros: nothing is sent for ranges that are zeros at the source. */
  readonly destinationIsZero?: boolean;
  /** Called after every request. If it throws, the copy fails with that error. */
  readonly onProgress?: (progress: CopyProgress) => void;
  /** Ends the copy with NbdClientError ABORTED; what has been written stays. */
  readonly signal?: AbortSignal;
}

type CheckedCopyOptions = CopyOptions & { readonly parallel: number; readonly requestBytes: number };

interface Piece {
  readonly offset: number;
  readonly length: number;
  readonly isZero: boolean;
}

/**
 * Copy all of `from` to the beginning of `to`, and flush. Each is a client with an open export (NbdClient, ReconnectingClient)
 * or a device. Ranges that the source reports as zeros (`base:allocation`) are not read, but zeroed at the destination. What
 * a larger destination has beyond the source's size stays as it is. When the promise settles nothing is in flight any more.
 *
 * Errors: those of either end; NbdClientError ENOSPC (the destination is smaller), EPERM (it is read-only), EIO (a device
 * transferred less than it was asked to, or reports no extents in order), ABORTED; TypeError, RangeError.
 */
export async function copy(
  from: CopyClient | AnyDevice,
  to: CopyClient | AnyDevice,
  options: CopyOptions = {},
): Promise<CopyProgress> {
  checkObject(options, 'the options of copy()');
  checkFunction(options.onProgress, 'onProgress');
  const source = copyEnd(from, 'the source');
  const target = copyEnd(to, 'the destination');
  const parallel = checkedCount(options.parallel, 'parallel', DEFAULT_PARALLEL);
  const wanted = checkedCount(options.requestBytes, 'requestBytes', DEFAULT_REQUEST_BYTES);
  checkSignal(options.signal);
  if (!Number.isSafeInteger(source.size))
    throw new NbdClientError('EOVERFLOW', 'copy: the source has more than 2^53 bytes');
  if (target.readOnly) throw new NbdClientError('EPERM', 'copy: the destination is read-only');
  if (source.size > target.size) {
    const sizes = `the source has ${source.size} bytes, the destination ${target.size}`;
    throw new NbdClientError('ENOSPC', `copy: the destination is too small: ${sizes}`);
  }
  // Powers of two: the larger one is a multiple of the smaller one.
  const block = Math.max(source.blockSize, target.blockSize);
  const requestBytes = Math.ceil(Math.min(wanted, Math.max(source.size, 1)) / block) * block;
  return new Copy(source, target, { ...options, parallel, requestBytes }, block).run();
}

class Copy {
  readonly #source: CopyEnd;
  readonly #target: CopyEnd;
  readonly #options: CheckedCopyOptions;
  readonly #block: number;
  /** Ends what is in flight when anything fails. */
  readonly #stop = new AbortController();
  readonly #failures: unknown[] = [];
  #copied = 0;
  #zeroed = 0;

  constructor(source: CopyEnd, target: CopyEnd, options: CheckedCopyOptions, block: number) {
    this.#source = source;
    this.#target = target;
    this.#options = options;
    this.#block = block;
  }

  async run(): Promise<CopyProgress> {
    const { signal, parallel, requestBytes } = this.#options;
    const abort = (): void => {
      if (signal !== undefined) this.#fail(abortError('copy()', signal));
    };
    if (signal?.aborted) throw abortError('copy()', signal);
    if (signal !== undefined) onAbort(signal, abort);
    try {
      const zeroBytes = this.#target.zero === undefined ? requestBytes : Math.max(requestBytes, ZERO_BYTES);
      const pieces = planPieces(this.#source, this.#block, requestBytes, zeroBytes, this.#stop.signal);
      const lanes = Math.min(parallel, Math.ceil(this.#source.size / requestBytes));
      await Promise.all(Array.from({ length: lanes }, () => this.#lane(pieces)));
      // After a failure it has not ended by itself.
      await pieces.return();
      if (this.#failures.length === 0) {
        await this.#guarded(async () => {
          await this.#target.flush(this.#stop.signal);
          return true;
        });
      }
    } finally {
      if (signal !== undefined) offAbort(signal, abort);
    }
    if (this.#failures.length > 0) throw this.#failures[0];
    return this.#progress();
  }

  /** One request at a time, with memory of its own. */
  async #lane(pieces: AsyncGenerator<Piece, void, undefined>): Promise<void> {
    let memory: Buffer | undefined;
    let hasMore = true;
    while (hasMore && this.#failures.length === 0) {
      hasMore = await this.#guarded(async () => {
        const { value: piece, done } = await pieces.next();
        if (done === true) return false;
        if (!piece.isZero) await this.#copyPiece(piece, (memory ??= Buffer.alloc(this.#options.requestBytes)));
        else await this.#zeroPiece(piece);
        this.#options.onProgress?.(this.#progress());
        return true;
      });
    }
  }

  async #copyPiece({ offset, length }: Piece, memory: Buffer): Promise<void> {
    const data = memory.subarray(0, length);
    await this.#source.read(offset, data, this.#stop.signal);
    await this.#write(offset, data);
    this.#copied += length;
  }

  async #zeroPiece({ offset, length }: Piece): Promise<void> {
    const { zero } = this.#target;
    if (this.#options.destinationIsZero !== true) {
      if (zero === undefined) await this.#write(offset, Buffer.alloc(length));
      else await zero(offset, length, this.#stop.signal);
    }
    this.#zeroed += length;
  }

  /** The last block of the source may end within a block of the destination: the rest of that block is kept. */
  async #write(offset: number, data: Buffer): Promise<void> {
    const { signal } = this.#stop;
    const beyond = data.length % this.#target.blockSize;
    const whole = data.length - beyond;
    if (whole > 0) await this.#target.write(offset, data.subarray(0, whole), signal);
    if (beyond === 0) return;
    const last = Buffer.alloc(this.#target.blockSize);
    await this.#target.read(offset + whole, last, signal);
    data.copy(last, 0, whole);
    await this.#target.write(offset + whole, last, signal);
  }

  #progress(): CopyProgress {
    return { copied: this.#copied, zeroed: this.#zeroed, total: this.#source.size };
  }

  /** What `work` resolves with; false if it fails. */
  async #guarded(work: () => Promise<boolean>): Promise<boolean> {
    try {
      return await work();
    } catch (error) {
      this.#fail(error);
      return false;
    }
  }

  /** The first failure counts: the others are its consequences. */
  #fail(error: unknown): void {
    this.#failures.push(error);
    this.#stop.abort(error);
  }
}

/**
 * The whole source in pieces that begin and end at multiples of `block` (the last one ends with the source): data of up to
 * `dataBytes`, zeros of up to `zeroBytes`. Zeros that fill no block belong to the data around them.
 */
async function* planPieces(
  source: CopyEnd,
  block: number,
  dataBytes: number,
  zeroBytes: number,
  signal: AbortSignal,
): AsyncGenerator<Piece, void, undefined> {
  /** All before it is planned. */
  let at = 0;
  const upTo = function* (end: number, isZero: boolean): Generator<Piece, void, undefined> {
    const most = isZero ? zeroBytes : dataBytes;
    while (at < end) {
      const length = Math.min(end - at, most - (at % most));
      yield { offset: at, length, isZero };
      at += length;
    }
  };
  let zeros: Extent | undefined;
  const zerosUpTo = function* (): Generator<Piece, void, undefined> {
    if (zeros === undefined) return;
    const start = Math.ceil(zeros.offset / block) * block;
    const end = Math.floor((zeros.offset + zeros.length) / block) * block;
    zeros = undefined;
    if (end <= start) return;
    yield* upTo(start, false);
    yield* upTo(end, true);
  };
  if (source.extents !== undefined) {
    for await (const extent of source.extents(signal)) {
      if ((extent.flags & STATE_ZERO) !== 0) {
        zeros = zeros === undefined ? extent : { ...zeros, length: zeros.length + extent.length };
        if (zeros.length >= zeroBytes) yield* zerosUpTo();
      } else {
        yield* zerosUpTo();
        // Only whole requests yet: the next extent may be data too.
        yield* upTo(Math.floor((extent.offset + extent.length) / dataBytes) * dataBytes, false);
      }
    }
    yield* zerosUpTo();
  }
  yield* upTo(source.size, false);
}
