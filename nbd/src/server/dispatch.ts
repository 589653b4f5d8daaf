/**
 * From a valid request to the device and back: which method is called, and how its answer becomes a reply. It owns the requests
 * that the device answers later; it decides neither whether a request may be executed nor when.
 *
 * The path of a request that the device answers synchronously allocates nothing but the view of its data. Requests run
 * concurrently and are answered as they finish.
 */

import type { DeviceError, ZeroMode } from '../block-device.js';
import { CMD, CMD_FLAG, NBD_ERRNO } from '../protocol/wire.js';
import { DETACHED, isDetached, readShortfall, writeShortfall } from '../transferred.js';
import type { Block } from './buffer-pool.js';
import type { Asked, Failure } from './failure.js';
import { fillsBuffer, type ServedDevice } from './geometry.js';
import { isChange, TimedRequest, type OverdueRequests } from './overdue-requests.js';
import { promiseOf } from '../promised.js';
import type { ReceiveMemory } from './receive-memory.js';
import type { Addressee } from './reply-encoder.js';
import type { ReplyQueue } from './reply-queue.js';
import type { Request } from './request.js';
import type { RequestsInFlight } from './requests-in-flight.js';
import type { SparseReads } from './sparse-reads.js';
import type { StatusRequests } from './status-requests.js';
import type { TransmissionHost } from './transmission-host.js';

const RANGE_TAKEN: Failure = Object.freeze({
  errno: NBD_ERRNO.EIO,
  message: 'an earlier change of this range was not answered by the export, and may still happen',
});

const ZERO_MODES: readonly ZeroMode[] = Array.from({ length: 8 }, (_, bits) =>
  Object.freeze({ noHole: (bits & 1) !== 0, fua: (bits & 2) !== 0, fastZero: (bits & 4) !== 0 }),
);

/** A request whose device call returned a promise. Objects are reused, and their two handlers with them. */
class PendingRequest extends TimedRequest {
  type = 0;
  flags = 0;
  cookieHigh = 0;
  cookieLow = 0;
  offsetHigh = 0;
  offsetLow = 0;
  offset = 0;
  length = 0;
  /** When the device was called, if somebody wants to know. */
  startedAt = 0;
  /** The block of a read's reply, or the pooled memory of a write's payload. */
  block: Block | undefined;
  at = 0;
  /** What a read is to fill. */
  into: Buffer | undefined;
  readonly succeed: (result: unknown) => void;
  readonly fail: (error: unknown) => void;

  readonly #owner: Dispatch;

  constructor(owner: Dispatch) {
    super();
    this.#owner = owner;
    this.succeed = (result) => owner.succeeded(this, result);
    this.fail = (error) => owner.failed(this, error);
  }

  overdue(error: DeviceError): void {
    this.#owner.timeUp(this, error);
  }
}

export class Dispatch {
  readonly #spare: PendingRequest[] = [];

  readonly #host: Pick<TransmissionHost, 'disconnect'>;
  readonly #device: ServedDevice;
  readonly #signal: AbortSignal;
  readonly #overdue: OverdueRequests;
  readonly #exportKey: string;
  /** The memory of a read is cleared first: a device that fills too little of it shows what another client has read. */
  readonly #clearsFirst: boolean;
  readonly #memory: ReceiveMemory;
  readonly #inFlight: RequestsInFlight;
  readonly #replies: ReplyQueue;
  readonly #sparseReads: SparseReads;
  readonly #statuses: StatusRequests;

  constructor(
    host: Pick<TransmissionHost, 'clientSignal' | 'overdue' | 'exportKey' | 'disconnect'>,
    device: ServedDevice,
    memory: ReceiveMemory,
    inFlight: RequestsInFlight,
    replies: ReplyQueue,
    sparseReads: SparseReads,
    statuses: StatusRequests,
  ) {
    this.#host = host;
    this.#device = device;
    this.#signal = host.clientSignal.signal;
    this.#overdue = host.overdue;
    this.#exportKey = host.exportKey;
    this.#clearsFirst = !fillsBuffer(device);
    this.#memory = memory;
    this.#inFlight = inFlight;
    this.#replies = replies;
    this.#sparseReads = sparseReads;
    this.#statuses = statuses;
  }

  /** Call the device. `data` is a write's payload, `block` its pooled memory, if any. */
  execute(request: Request, data: Buffer | undefined, block: Block | undefined): void {
    const device = this.#device;
    const signal = this.#signal;
    const inFlight = this.#inFlight;
    const { type, flags, offset, length } = request;
    const fua = (flags & CMD_FLAG.FUA) !== 0;
    if (this.#overdue.takenRanges > 0 && this.#isRangeTaken(request)) {
      if (block !== undefined) this.#memory.unpin(block);
      this.#replies.error(request, RANGE_TAKEN);
      inFlight.answered(request, RANGE_TAKEN.errno);
      return;
    }
    const startedAt = inFlight.now;
    let into: Buffer | undefined;
    let later: Promise<unknown> | undefined;
    try {
      let answer: unknown;
      switch (type) {
        case CMD.READ:
          if (this.#sparseReads.areAllowed && this.#sparseReads.begin(request)) return;
          into = this.#replies.beginRead(length);
          if (this.#clearsFirst) into.fill(0);
          answer = device.read(offset, into, signal);
          break;
        case CMD.WRITE:
          if (data === undefined) throw new Error('dispatch: a write without its payload');
          answer = device.write(offset, data, fua, signal);
          break;
        case CMD.FLUSH:
          answer = device.flush(signal);
          break;
        case CMD.TRIM:
          answer = device.trim(offset, length, fua, signal);
          break;
        case CMD.WRITE_ZEROES:
          answer = device.zero(offset, length, zeroMode(flags), signal);
          break;
        case CMD.CACHE:
          answer = device.cache(offset, length, signal);
          break;
        case CMD.BLOCK_STATUS:
          this.#statuses.begin(request);
          return;
        default:
          throw new Error(`dispatch: command ${type} was not refused`);
      }
      if (isGone(into ?? data, length)) this.#memoryIsGone(request);
      // Nothing, or the number of bytes, is what most devices return.
      if (answer !== undefined && answer !== length) {
        later = promiseOf(answer);
        if (later === undefined) mustBeWhole(type, answer, into, length);
      }
    } catch (error) {
      const failure = inFlight.failureOf(error, request);
      inFlight.errors++;
      if (isGone(into ?? data, length)) this.#memoryIsGone(request);
      if (block !== undefined) this.#memory.unpin(block);
      if (into !== undefined) this.#replies.failRead(request, failure);
      else this.#replies.error(request, failure);
      if (inFlight.areObserved) inFlight.done(request, startedAt, failure.errno);
      return;
    }
    if (later !== undefined) {
      this.#wait(request, later, into, block, startedAt);
      return;
    }
    if (type === CMD.READ) {
      inFlight.bytesRead += length;
      this.#replies.finishRead(request.cookieHigh, request.cookieLow, offset);
    } else {
      if (type === CMD.WRITE) inFlight.bytesWritten += length;
      if (block !== undefined) this.#memory.unpin(block);
      this.succeed(request);
    }
    if (inFlight.areObserved) inFlight.done(request, startedAt, 0);
  }

  /**
   * The device has given the memory of a request away, as postMessage can. It held other requests and replies of this connection
   * as well: the connection cannot continue.
   */
  #memoryIsGone(asked: Asked): void {
    this.#inFlight.failureOf(new Error(DETACHED), asked);
    this.#replies.close();
    this.#host.disconnect(DETACHED);
  }

  /** Whether it would change what an overdue request may still change. */
  #isRangeTaken({ type, offset, length }: Request): boolean {
    return isChange(type) && this.#overdue.isTaken(this.#exportKey, offset, length);
  }

  /** Answer a request with success and no data. */
  succeed({ cookieHigh, cookieLow, offsetHigh, offsetLow }: Addressee): void {
    this.#replies.done(cookieHigh, cookieLow, offsetHigh, offsetLow);
  }

  /** The device answers `request` later. */
  #wait(
    request: Request,
    answer: Promise<unknown>,
    into: Buffer | undefined,
    block: Block | undefined,
    startedAt: number,
  ): void {
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
    pending.startedAt = startedAt;
    pending.block = block;
    pending.into = into;
    if (request.type === CMD.READ) {
      const place = this.#replies.detachRead();
      pending.block = place.block;
      pending.at = place.at;
    }
    inFlight.begin(heldBytes(request));
    if (this.#overdue.isOn) this.#overdue.begin(pending);
    try {
      answer.then(pending.succeed, pending.fail);
    } catch (error) {
      // Its constructor is the program's: nothing will call back.
      this.failed(pending, error);
    }
  }

  /** For PendingRequest only: the promise of the device is fulfilled. */
  succeeded(pending: PendingRequest, result: unknown): void {
    const { length } = pending;
    if (result !== undefined && result !== length) {
      try {
        mustBeWhole(pending.type, result, pending.into, length);
      } catch (error) {
        this.failed(pending, error);
        return;
      }
    }
    this.finished(pending, undefined);
  }

  /** For PendingRequest only: the device has failed. */
  failed(pending: PendingRequest, error: unknown): void {
    this.finished(pending, this.#inFlight.failureOf(error, pending));
  }

  /** For PendingRequest only: its time is up. Its memory stays as it is, since the device may still use it. */
  timeUp(pending: PendingRequest, error: DeviceError): void {
    const inFlight = this.#inFlight;
    const failure = inFlight.timeUp(pending, error);
    this.#replies.error(pending, failure);
    if (inFlight.areObserved) inFlight.done(pending, pending.startedAt, failure.errno);
    inFlight.settled();
  }

  /** For PendingRequest only: the device has answered. */
  finished(pending: PendingRequest, failure: Failure | undefined): void {
    const inFlight = this.#inFlight;
    const { block } = pending;
    if (block?.buffer.length === 0) this.#memoryIsGone(pending);
    pending.block = undefined;
    pending.into = undefined;
    if (pending.isOverdue) {
      // It was answered when its time was up.
      inFlight.settledLate(pending, heldBytes(pending));
      if (block !== undefined) {
        if (pending.type === CMD.READ) this.#replies.dropRead(block);
        else this.#memory.unpin(block);
      }
      this.#spare.push(pending);
      inFlight.settled();
      return;
    }
    if (this.#overdue.isOn) this.#overdue.end(pending);
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
    if (inFlight.areObserved) inFlight.done(pending, pending.startedAt, failure?.errno ?? 0);
    this.#spare.push(pending);
    inFlight.settled();
  }
}

function isGone(view: Buffer | undefined, length: number): boolean {
  return view !== undefined && isDetached(view, length);
}

/** Errors: Error if the device has transferred less than it was asked to, by what it returned. */
function mustBeWhole(type: number, result: unknown, into: Buffer | undefined, length: number): void {
  let shortfall: string | undefined;
  if (into !== undefined) shortfall = readShortfall(result, into);
  else if (type === CMD.WRITE) shortfall = writeShortfall(result, length);
  if (shortfall !== undefined) throw new Error(shortfall);
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
