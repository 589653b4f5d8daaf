/**
 * The transmission phase of one connection: bytes in, requests out to the device, replies back. It owns the parser's
 * state and the requests in flight; it never closes the socket or the device, it tells its connection why it should.
 *
 * The path of a request that the device answers synchronously allocates nothing but the view of its data. Requests run
 * concurrently and are answered as they finish. Two bounds hold a client back: work in flight, and replies not taken.
 */

import type { Duplex } from 'node:stream';
import { DeviceError, type Awaitable, type BlockDevice, type ZeroMode } from './block-device.js';
import { LARGE_BYTES, type Block, type BufferPool } from './buffer-pool.js';
import type { Limits } from './limits.js';
import type { ServerObserver } from './observer.js';
import { CMD, CMD_FLAG, MAX_PAYLOAD, NBD_ERRNO, REQUEST_HEADER_SIZE, type Negotiated } from './protocol.js';
import { chooseReplyEncoder } from './reply-encoder.js';
import { ReplyQueue } from './reply-queue.js';
import { decodeRequest, Request, requestError, type RequestRules } from './request.js';

/** What a transmission needs of its connection. */
export interface TransmissionHost {
  readonly id: number;
  readonly exportName: string | undefined;
  readonly socket: Duplex;
  readonly pool: BufferPool;
  readonly limits: Limits;
  readonly observer: ServerObserver;
  /** The client said goodbye: answer what is in flight, then close. */
  disconnectRequested(): void;
  /** The client broke the protocol: close now. */
  protocolViolated(reason: string): void;
}

/** Replies below this share of the bound before a held client is heard again, so that it is heard in batches. */
const RESUME_BELOW = 1 / 2;

const ZERO_MODES: readonly ZeroMode[] = Array.from({ length: 8 }, (_, bits) =>
  Object.freeze({ noHole: (bits & 1) !== 0, fua: (bits & 2) !== 0, fastZero: (bits & 4) !== 0 }),
);

/** A request whose device call returned a promise. Reused, with its two handlers made once. */
class PendingRequest {
  type = 0;
  flags = 0;
  cookieHigh = 0;
  cookieLow = 0;
  offset = 0;
  length = 0;
  /** Where a read's reply is being made, or the pooled memory of a write's payload. */
  block: Block | undefined;
  at = 0;
  readonly succeed: () => void;
  readonly fail: (error: unknown) => void;

  constructor(owner: Transmission) {
    this.succeed = () => owner.finished(this, 0);
    this.fail = (error) => owner.finished(this, owner.errnoOf(error, this.flags));
  }
}

export class Transmission {
  requests = 0;
  errors = 0;
  bytesRead = 0;
  bytesWritten = 0;
  /** Requests the device is working on. */
  inFlight = 0;

  private readonly rules: RequestRules;
  private readonly replies: ReplyQueue;
  private readonly request = new Request();
  private readonly headerBytes = Buffer.alloc(REQUEST_HEADER_SIZE);
  private headerFill = 0;
  /** Bytes of the current write's payload still to come, or to be skipped if `payload` is undefined. */
  private payloadLeft = 0;
  private payload: Buffer | undefined;
  private payloadBlock: Block | undefined;
  private refusedWith = 0;
  /** Input that waits for room. The socket is paused while there is any. */
  private held: Buffer | undefined;
  private inFlightBytes = 0;
  private isDeaf = false;
  private isRefusing = false;
  /** Whether input came since the last settling. */
  private isHeard = false;
  private isSettleScheduled = false;
  private whenIdle: (() => void)[] = [];
  private readonly spare: PendingRequest[] = [];

  constructor(
    private readonly host: TransmissionHost,
    private readonly device: BlockDevice,
    negotiated: Negotiated,
  ) {
    this.rules = { geometry: Object.freeze({ ...device.geometry }), negotiated };
    this.replies = new ReplyQueue(host.socket, host.pool, chooseReplyEncoder(negotiated), () => this.resume());
  }

  /** Whether the input so far ends inside a request. */
  get isMidRequest(): boolean {
    return this.headerFill > 0 || this.payloadLeft > 0;
  }

  /** Bytes from the client, as they came. `chunk` is the transmission's from now on. */
  feed(chunk: Buffer): void {
    if (this.isDeaf) return;
    this.isHeard = true;
    if (this.held !== undefined) {
      this.held = Buffer.concat([this.held, chunk]);
      return;
    }
    this.parse(chunk);
    this.replies.flush();
  }

  /** The server is shutting down: every further request is answered ESHUTDOWN (proto.md, "Terminating …"). */
  refuseNewRequests(): void {
    this.isRefusing = true;
    // What is held back is refused, too. Not at once: this may be called from inside a request (see onIdle).
    this.isHeard = true;
    this.scheduleSettle();
  }

  /** Nothing the client sends from now on is looked at. */
  stopListening(): void {
    this.isDeaf = true;
    this.held = undefined;
    if (this.payloadBlock !== undefined) this.host.pool.give(this.payloadBlock);
    this.payloadBlock = undefined;
    this.payload = undefined;
  }

  /** The socket is gone: what is in flight is finished, its replies go nowhere. */
  socketClosed(): void {
    this.stopListening();
    this.replies.close();
  }

  /**
   * `callback` is called once no request is in flight or held back and all replies are with the socket. Never at once:
   * an observer or a device may close the server in the middle of a request whose reply is being made.
   */
  onIdle(callback: () => void): void {
    this.whenIdle.push(callback);
    this.scheduleSettle();
  }

  private parse(chunk: Buffer): void {
    const { request } = this;
    const end = chunk.length;
    let at = 0;
    while (at < end) {
      if (this.payloadLeft > 0) {
        at += this.takePayload(chunk, at);
        continue;
      }
      if (this.isSaturated()) {
        this.held = at === 0 ? chunk : chunk.subarray(at);
        this.host.socket.pause();
        return;
      }
      let isRequest: boolean;
      if (this.headerFill === 0 && end - at >= REQUEST_HEADER_SIZE) {
        isRequest = decodeRequest(chunk, at, request);
        at += REQUEST_HEADER_SIZE;
      } else {
        const taken = chunk.copy(this.headerBytes, this.headerFill, at);
        this.headerFill += taken;
        at += taken;
        if (this.headerFill < REQUEST_HEADER_SIZE) return;
        this.headerFill = 0;
        isRequest = decodeRequest(this.headerBytes, 0, request);
      }
      if (!isRequest) {
        this.violation(`bad request magic 0x${request.magic.toString(16)}`);
        return;
      }
      if (request.type === CMD.DISC) {
        this.stopListening();
        this.replies.flush();
        this.host.disconnectRequested();
        return;
      }

      this.requests++;
      const errno = this.isRefusing ? NBD_ERRNO.ESHUTDOWN : requestError(request, this.rules);
      if (this.host.observer.onRequest !== undefined) this.report(errno);

      if (request.type === CMD.WRITE && request.length > 0) {
        if (errno === 0 && end - at >= request.length) {
          const data = chunk.subarray(at, at + request.length);
          at += request.length;
          this.execute(data, undefined);
        } else if (!this.expectPayload(errno)) {
          return;
        }
      } else if (errno !== 0) {
        this.refuse(errno);
      } else if (request.length === 0 && request.type !== CMD.FLUSH) {
        this.replies.status(request.cookieHigh, request.cookieLow, 0);
      } else {
        this.execute(undefined, undefined);
      }
    }
  }

  /** The payload of the write just decoded comes in pieces, or is to be skipped. False if it is too long for that. */
  private expectPayload(errno: number): boolean {
    const { length } = this.request;
    if (errno !== 0) {
      if (length > this.host.limits.maxDrainedPayloadBytes) {
        this.violation(`refused write with a payload of ${length} bytes, more than is drained`);
        return false;
      }
      this.refusedWith = errno;
      this.payload = undefined;
    } else {
      // requestError() has seen to it that it is at most MAX_PAYLOAD.
      if (length > MAX_PAYLOAD) throw new Error('transmission: an unchecked payload length');
      if (length > LARGE_BYTES) {
        this.payloadBlock = this.host.pool.takeLarge(length);
        this.payload = this.payloadBlock.buffer.subarray(0, length);
      } else {
        this.payload = Buffer.allocUnsafe(length);
      }
    }
    this.payloadLeft = length;
    return true;
  }

  /** Returns how many bytes of `chunk` from `at` belonged to the payload. */
  private takePayload(chunk: Buffer, at: number): number {
    const taken = Math.min(this.payloadLeft, chunk.length - at);
    if (this.payload !== undefined) {
      chunk.copy(this.payload, this.payload.length - this.payloadLeft, at, at + taken);
    }
    this.payloadLeft -= taken;
    if (this.payloadLeft === 0) {
      const { payload, payloadBlock } = this;
      this.payload = undefined;
      this.payloadBlock = undefined;
      if (payload === undefined) this.refuse(this.refusedWith);
      else this.execute(payload, payloadBlock);
    }
    return taken;
  }

  /** Ask the device. `data` is a write's payload, `block` the pooled memory it lies in, if any. */
  private execute(data: Buffer | undefined, block: Block | undefined): void {
    const { request, device } = this;
    const { type, flags, offset, length } = request;
    const fua = (flags & CMD_FLAG.FUA) !== 0;
    let answer: Awaitable<void> | undefined;
    try {
      switch (type) {
        case CMD.READ:
          answer = device.read(offset, this.replies.beginRead(length));
          break;
        case CMD.WRITE:
          if (data === undefined) throw new Error('transmission: a write without its payload');
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
        default:
          throw new Error(`transmission: command ${type} was not refused`);
      }
    } catch (error) {
      const errno = this.errnoOf(error, flags);
      this.errors++;
      if (block !== undefined) this.host.pool.give(block);
      if (type === CMD.READ) this.replies.failRead(request.cookieHigh, request.cookieLow, errno);
      else this.replies.status(request.cookieHigh, request.cookieLow, errno);
      return;
    }
    if (answer !== undefined && isPromise(answer)) {
      this.wait(answer, block);
      return;
    }
    if (type === CMD.READ) {
      this.bytesRead += length;
      this.replies.finishRead(request.cookieHigh, request.cookieLow, offset);
      return;
    }
    if (type === CMD.WRITE) this.bytesWritten += length;
    if (block !== undefined) this.host.pool.give(block);
    this.replies.status(request.cookieHigh, request.cookieLow, 0);
  }

  /** The device answers the current request later. */
  private wait(answer: Promise<void>, block: Block | undefined): void {
    const { request } = this;
    const pending = this.spare.pop() ?? new PendingRequest(this);
    pending.type = request.type;
    pending.flags = request.flags;
    pending.cookieHigh = request.cookieHigh;
    pending.cookieLow = request.cookieLow;
    pending.offset = request.offset;
    pending.length = request.length;
    pending.block = block;
    if (request.type === CMD.READ) {
      const place = this.replies.detachRead();
      pending.block = place.block;
      pending.at = place.at;
    }
    this.inFlight++;
    if (holdsMemory(request.type)) this.inFlightBytes += request.length;
    answer.then(pending.succeed, pending.fail);
  }

  /** For PendingRequest only: the device has answered. */
  finished(pending: PendingRequest, errno: number): void {
    const { block } = pending;
    pending.block = undefined;
    this.inFlight--;
    if (holdsMemory(pending.type)) this.inFlightBytes -= pending.length;
    if (errno !== 0) this.errors++;
    if (pending.type === CMD.READ) {
      if (block === undefined) throw new Error('transmission: a read without memory');
      if (errno === 0) this.bytesRead += pending.length;
      const { at, cookieHigh, cookieLow, offset, length } = pending;
      this.replies.completeRead(block, at, cookieHigh, cookieLow, offset, length, errno);
    } else {
      if (pending.type === CMD.WRITE && errno === 0) this.bytesWritten += pending.length;
      if (block !== undefined) this.host.pool.give(block);
      this.replies.status(pending.cookieHigh, pending.cookieLow, errno);
    }
    this.spare.push(pending);
    this.scheduleSettle();
  }

  /** The error value for what a device threw. What is not a DeviceError is a bug of the device, and reported. */
  errnoOf(error: unknown, flags: number): number {
    if (!(error instanceof DeviceError)) {
      this.host.observer.onDeviceError?.(error, { id: this.host.id, exportName: this.host.exportName });
      return NBD_ERRNO.EIO;
    }
    // "The server SHOULD NOT return ENOTSUP except … when FAST_ZERO is supported"; "MUST NOT" without the flag.
    if (error.code === 'ENOTSUP' && (flags & CMD_FLAG.FAST_ZERO) === 0) return NBD_ERRNO.EINVAL;
    return NBD_ERRNO[error.code];
  }

  private refuse(errno: number): void {
    this.errors++;
    this.replies.status(this.request.cookieHigh, this.request.cookieLow, errno);
  }

  private violation(reason: string): void {
    this.stopListening();
    this.replies.flush();
    this.host.protocolViolated(reason);
  }

  /** Asked before every request: whether this connection has all the work and all the unread replies it may have. */
  private isSaturated(): boolean {
    const { limits } = this.host;
    // Refusals need no room with the device; and they reach also who had too many replies unread, up to twice as many.
    if (this.isRefusing) return this.replies.unsentBytes >= 2 * limits.maxUnsentBytes;
    return (
      this.replies.unsentBytes >= limits.maxUnsentBytes ||
      this.inFlight >= limits.maxInFlightRequests ||
      this.inFlightBytes >= limits.maxInFlightBytes
    );
  }

  /** Go on with held input if there is room again. */
  private resume(): void {
    const { held } = this;
    if (held === undefined || this.isDeaf) return;
    const isBacklogged = this.replies.unsentBytes > this.host.limits.maxUnsentBytes * RESUME_BELOW;
    if ((isBacklogged && !this.isRefusing) || this.isSaturated()) return;
    this.held = undefined;
    this.parse(held);
    this.replies.flush();
    if (this.held === undefined && !this.isDeaf) this.host.socket.resume();
    this.tellIfIdle();
  }

  /** After the completions of this turn of the event loop: those that finish together leave together. */
  private scheduleSettle(): void {
    if (this.isSettleScheduled) return;
    this.isSettleScheduled = true;
    setImmediate(this.settle);
  }

  /** Send what is ready, take on what was held, and tell who waits for idleness. */
  private readonly settle = (): void => {
    this.isSettleScheduled = false;
    this.replies.flush();
    this.resume();
    this.tellIfIdle();
  };

  private tellIfIdle(): void {
    if (this.inFlight > 0 || this.whenIdle.length === 0) return;
    // What was asked is owed an answer, or a refusal; but who is shut out and reads nothing may not hold up the shutdown.
    if (this.held !== undefined && !(this.isRefusing && this.isSaturated())) return;
    // Being shut out, a client is heard as long as it goes on asking: until a turn of the loop brings nothing new.
    if (this.isRefusing && this.isHeard && !this.isDeaf) {
      this.isHeard = false;
      this.scheduleSettle();
      return;
    }
    const callbacks = this.whenIdle;
    this.whenIdle = [];
    for (const callback of callbacks) callback();
  }

  private report(refusedWith: number): void {
    const { type, flags, offset, length } = this.request;
    this.host.observer.onRequest?.({ id: this.host.id, type, flags, offset, length, refusedWith });
  }
}

function zeroMode(flags: number): ZeroMode {
  const bits =
    ((flags & CMD_FLAG.NO_HOLE) !== 0 ? 1 : 0) |
    ((flags & CMD_FLAG.FUA) !== 0 ? 2 : 0) |
    ((flags & CMD_FLAG.FAST_ZERO) !== 0 ? 4 : 0);
  const mode = ZERO_MODES[bits];
  if (mode === undefined) throw new Error('transmission: no such zero mode');
  return mode;
}

/** Commands whose length is memory held until they are answered. */
function holdsMemory(type: number): boolean {
  return type === CMD.READ || type === CMD.WRITE;
}

function isPromise(answer: unknown): answer is Promise<void> {
  return answer instanceof Promise || (typeof answer === 'object' && answer !== null && 'then' in answer);
}
