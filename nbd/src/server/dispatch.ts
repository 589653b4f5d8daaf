/**
 * From a valid request to the device and back: which method is called, and how its answer becomes a reply. It owns the requests
 * that the device answers later; it decides neither whether a request may be executed nor when.
 *
 * The path of a request that the device answers synchronously allocates nothing but the view of its data. Requests run
 * concurrently and are answered as they finish.
 */

import type { Awaitable, Transferred, ZeroMode } from '../block-device.js';
import { CMD, CMD_FLAG } from '../protocol/wire.js';
import type { Block } from './buffer-pool.js';
import type { ServedDevice } from './geometry.js';
import type { ReceiveMemory } from './receive-memory.js';
import type { Addressee } from './reply-encoder.js';
import type { Failure, ReplyQueue } from './reply-queue.js';
import type { Request } from './request.js';
import { isPromise, type RequestsInFlight } from './requests-in-flight.js';
import type { SparseReads } from './sparse-reads.js';
import type { StatusRequests } from './status-requests.js';

const ZERO_MODES: readonly ZeroMode[] = Array.from({ length: 8 }, (_, bits) =>
  Object.freeze({ noHole: (bits & 1) !== 0, fua: (bits & 2) !== 0, fastZero: (bits & 4) !== 0 }),
);

/** A request whose device call returned a promise. Objects are reused, and their two handlers with them. */
class PendingRequest {
  type = 0;
  flags = 0;
  cookieHigh = 0;
  cookieLow = 0;
  offsetHigh = 0;
  offsetLow = 0;
  offset = 0;
  length = 0;
  /** The block of a read's reply, or the pooled memory of a write's payload. */
  block: Block | undefined;
  at = 0;
  readonly succeed: () => void;
  readonly fail: (error: unknown) => void;

  constructor(owner: Dispatch) {
    this.succeed = () => owner.finished(this, undefined);
    this.fail = (error) => owner.failed(this, error);
  }
}

export class Dispatch {
  readonly #spare: PendingRequest[] = [];

  readonly #device: ServedDevice;
  readonly #memory: ReceiveMemory;
  readonly #inFlight: RequestsInFlight;
  readonly #replies: ReplyQueue;
  readonly #sparseReads: SparseReads;
  readonly #statuses: StatusRequests;

  constructor(
    device: ServedDevice,
    memory: ReceiveMemory,
    inFlight: RequestsInFlight,
    replies: ReplyQueue,
    sparseReads: SparseReads,
    statuses: StatusRequests,
  ) {
    this.#device = device;
    this.#memory = memory;
    this.#inFlight = inFlight;
    this.#replies = replies;
    this.#sparseReads = sparseReads;
    this.#statuses = statuses;
  }

  /** Call the device. `data` is a write's payload, `block` its pooled memory, if any. */
  execute(request: Request, data: Buffer | undefined, block: Block | undefined): void {
    const device = this.#device;
    const inFlight = this.#inFlight;
    const { type, flags, offset, length } = request;
    const fua = (flags & CMD_FLAG.FUA) !== 0;
    let answer: Awaitable<Transferred>;
    try {
      switch (type) {
        case CMD.READ:
          if (this.#sparseReads.areAllowed && this.#sparseReads.begin(request)) return;
          answer = device.read(offset, this.#replies.beginRead(length));
          break;
        case CMD.WRITE:
          if (data === undefined) throw new Error('dispatch: a write without its payload');
          answer = device.write(offset, data, fua);
          break;
        case CMD.FLUSH:
          answer = device.flush();
          break;
        case CMD.TRIM:
          answer = device.trim(offset, length, fua);
          break;
        case CMD.WRITE_ZEROES:
          answer = device.zero(offset, length, zeroMode(flags));
          break;
        case CMD.CACHE:
          answer = device.cache(offset, length);
          break;
        case CMD.BLOCK_STATUS:
          this.#statuses.begin(request);
          return;
        default:
          throw new Error(`dispatch: command ${type} was not refused`);
      }
    } catch (error) {
      const failure = inFlight.failureOf(error, request);
      inFlight.errors++;
      if (block !== undefined) this.#memory.unpin(block);
      if (type === CMD.READ) this.#replies.failRead(request, failure);
      else this.#replies.error(request, failure);
      return;
    }
    if (answer !== undefined && isPromise(answer)) {
      this.#wait(request, answer, block);
      return;
    }
    if (type === CMD.READ) {
      inFlight.bytesRead += length;
      this.#replies.finishRead(request.cookieHigh, request.cookieLow, offset);
      return;
    }
    if (type === CMD.WRITE) inFlight.bytesWritten += length;
    if (block !== undefined) this.#memory.unpin(block);
    this.succeed(request);
  }

  /** Answer a request with success and no data. */
  succeed({ cookieHigh, cookieLow, offsetHigh, offsetLow }: Addressee): void {
    this.#replies.done(cookieHigh, cookieLow, offsetHigh, offsetLow);
  }

  /** The device answers `request` later. */
  #wait(request: Request, answer: Promise<unknown>, block: Block | undefined): void {
    const inFlight = this.#inFlight;
    const pending = this.#spare.pop() ?? new PendingRequest(this);
    pending.type = request.type;
    pending.flags = request.flags;
    pending.cookieHigh = request.cookieHigh;
    pending.cookieLow = request.cookieLow;
    pending.offsetHigh = request.offsetHigh;
    pending.offsetLow = request.offsetLow;
    pending.offset = request.offset;
    pending.length = request.length;
    pending.block = block;
    if (request.type === CMD.READ) {
      const place = this.#replies.detachRead();
      pending.block = place.block;
      pending.at = place.at;
    }
    inFlight.begin(heldBytes(request));
    answer.then(pending.succeed, pending.fail);
  }

  /** For PendingRequest only: the device has failed. */
  failed(pending: PendingRequest, error: unknown): void {
    this.finished(pending, this.#inFlight.failureOf(error, pending));
  }

  /** For PendingRequest only: the device has answered. */
  finished(pending: PendingRequest, failure: Failure | undefined): void {
    const inFlight = this.#inFlight;
    const { block } = pending;
    pending.block = undefined;
    inFlight.end(heldBytes(pending));
    const { cookieHigh, cookieLow, offset, length } = pending;
    if (failure !== undefined) inFlight.errors++;
    if (pending.type === CMD.READ) {
      if (block === undefined) throw new Error('dispatch: a read without memory');
      if (failure === undefined) {
        inFlight.bytesRead += length;
        this.#replies.completeRead(block, pending.at, cookieHigh, cookieLow, offset, length);
      } else {
        this.#replies.abandonRead(block, pending, failure);
      }
    } else {
      if (block !== undefined) this.#memory.unpin(block);
      if (failure === undefined) {
        if (pending.type === CMD.WRITE) inFlight.bytesWritten += length;
        this.succeed(pending);
      } else {
        this.#replies.error(pending, failure);
      }
    }
    this.#spare.push(pending);
    inFlight.settled();
  }
}

function zeroMode(flags: number): ZeroMode {
  const bits =
    ((flags & CMD_FLAG.NO_HOLE) !== 0 ? 1 : 0) |
    ((flags & CMD_FLAG.FUA) !== 0 ? 2 : 0) |
    ((flags & CMD_FLAG.FAST_ZERO) !== 0 ? 4 : 0);
  const mode = ZERO_MODES[bits];
  if (mode === undefined) throw new Error('dispatch: no such zero mode');
  return mode;
}

/** Bytes of memory that a request holds until its answer. */
function heldBytes({ type, length }: { readonly type: number; readonly length: number }): number {
  return type === CMD.READ || type === CMD.WRITE ? length : 0;
}
