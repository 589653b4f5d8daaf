/**
 * Reads that are answered with holes: zeros that the device reports as holes are not sent. It owns the decision when to ask the
 * device for holes, and the reads of the data parts; read-plan.ts lays out the reply.
 */

import { ALLOCATION_CONTEXT, type DeviceError } from '../block-device.js';
import { CMD, CMD_FLAG } from '../protocol/wire.js';
import { DETACHED, isDetached, readShortfall } from '../transferred.js';
import type { MemoryAccount } from './buffer-pool.js';
import type { Asked, Failure } from './failure.js';
import { fillsBuffer, type ServedDevice } from './geometry.js';
import { TimedRequest } from './overdue-requests.js';
import { promiseOf } from '../promised.js';
import { layParts, ReadPlan, sizeOfParts, SPARSE_READ_BYTES, type Part } from './read-plan.js';
import { addresseeOf, type Addressee, type ReplyEncoder } from './reply-encoder.js';
import type { ReplyQueue } from './reply-queue.js';
import type { Request, RequestRules } from './request.js';
import type { RequestsInFlight } from './requests-in-flight.js';
import type { TransmissionHost } from './transmission-host.js';

/**
 * A device whose answer comes later and reports data only is asked less and less often: up to this many long reads are then
 * read without asking. Asking before each of them cost a quarter of the speed of sequential reads of 1 MiB
 * from a full disk (1.4 to 1.8 GB/s with it, 1.9 to 2.0 without).
 */
const MAX_ASK_INTERVAL = 31;

/** A read in parts that is in flight. */
class SparseRead extends TimedRequest implements Asked {
  readonly type = CMD.READ;
  readonly flags: number;
  readonly offset: number;
  readonly length: number;

  readonly #owner: SparseReads;

  constructor(
    owner: SparseReads,
    readonly to: Addressee,
    { flags, offset, length }: Request,
    /** When it began, if somebody wants to know. */
    readonly startedAt: number,
  ) {
    super();
    this.#owner = owner;
    this.flags = flags;
    this.offset = offset;
    this.length = length;
  }

  overdue(error: DeviceError): void {
    this.#owner.timeUp(this, error);
  }
}

export class SparseReads {
  /** Whether the client takes holes, and whether the device reports them. */
  readonly areAllowed: boolean;
  readonly #knowsHoles: boolean;
  readonly #clearsFirst: boolean;
  /** Until its isHole answers with something else than true or false. */
  #asksIsHole = true;
  /** Long reads until the device is asked for holes again, and the interval used last. */
  #readsNotToAsk = 0;
  #askInterval = 0;

  readonly #host: TransmissionHost;
  readonly #device: ServedDevice;
  readonly #account: MemoryAccount;
  readonly #inFlight: RequestsInFlight;
  readonly #encoder: ReplyEncoder;
  readonly #replies: ReplyQueue;

  constructor(
    host: TransmissionHost,
    device: ServedDevice,
    { geometry, negotiated }: RequestRules,
    account: MemoryAccount,
    inFlight: RequestsInFlight,
    encoder: ReplyEncoder,
    replies: ReplyQueue,
  ) {
    this.#host = host;
    this.#device = device;
    this.#clearsFirst = !fillsBuffer(device);
    this.#account = account;
    this.#inFlight = inFlight;
    this.#encoder = encoder;
    this.#replies = replies;
    this.areAllowed = negotiated.structuredReplies;
    this.#knowsHoles = geometry.contexts.includes(ALLOCATION_CONTEXT);
  }

  /** Answer a read with holes, if the device may report some. False: the caller reads it as a whole. */
  begin(request: Request): boolean {
    const device = this.#device;
    const { offset, length } = request;
    const inFlight = this.#inFlight;
    const startedAt = inFlight.now;
    if (this.#asksIsHole && this.#isHole(request)) {
      inFlight.bytesRead += length;
      this.#replies.hole(request, offset, length);
      if (inFlight.areObserved) inFlight.done(request, startedAt, 0);
      return true;
    }
    // "DF … the server MUST send at most one content chunk"
    if (length < SPARSE_READ_BYTES || !this.#knowsHoles || (request.flags & CMD_FLAG.DF) !== 0) return false;
    if (this.#readsNotToAsk > 0) {
      this.#readsNotToAsk--;
      return false;
    }
    const plan = new ReadPlan(offset, length);
    let extents: Promise<unknown> | undefined;
    try {
      const answer: unknown = device.extents(
        ALLOCATION_CONTEXT,
        offset,
        length,
        plan.sink,
        this.#host.clientSignal.signal,
      );
      if (answer !== undefined) extents = promiseOf(answer);
    } catch (error) {
      plan.forget();
      inFlight.failureOf(error, request);
      return false;
    }
    if (extents === undefined) {
      const parts = plan.finish();
      if (parts.length === 1 && parts[0]?.isHole === false) return false;
    }
    void this.#readInParts(new SparseRead(this, addresseeOf(request), request, startedAt), plan, extents);
    return true;
  }

  /** What the device's isHole answers; false if it fails, since it may still be able to read. */
  #isHole(request: Request): boolean {
    const device = this.#device;
    try {
      if (device.isHole === undefined) return false;
      const answer: unknown = device.isHole(request.offset, request.length);
      if (typeof answer === 'boolean') return answer;
      // Most likely a promise, which counts as true in a condition.
      this.#asksIsHole = false;
      const asked = { type: request.type, flags: request.flags, offset: request.offset, length: request.length };
      promiseOf(answer)?.then(undefined, (error: unknown) => this.#inFlight.failureOf(error, asked));
      throw new TypeError(`isHole returned a value of type ${typeof answer}; it must return true or false at once`);
    } catch (error) {
      this.#inFlight.failureOf(error, request);
      return false;
    }
  }

  /** Read the data parts, each into its chunk, and send all chunks together. */
  async #readInParts(read: SparseRead, plan: ReadPlan, extents: Promise<unknown> | undefined): Promise<void> {
    const inFlight = this.#inFlight;
    const { overdue } = this.#host;
    const { length } = read;
    // There is room for all of it. How much it needs is known when the extents are known.
    this.#host.pool.claim(this.#account, length);
    inFlight.begin(length);
    if (overdue.isOn) overdue.begin(read);
    if (extents !== undefined) {
      try {
        await extents;
      } catch (error) {
        // A device that fails to report extents may still be able to read.
        inFlight.failureOf(error, read);
        plan.forget();
      }
    }
    if (this.#wasAnswered(read)) {
      this.#host.pool.unclaim(this.#account, length);
      return;
    }
    const parts = plan.finish();
    if (extents !== undefined) {
      const isAllData = parts.length === 1 && parts[0]?.isHole === false;
      this.#askInterval = isAllData ? Math.min(MAX_ASK_INTERVAL, 2 * this.#askInterval + 1) : 0;
      this.#readsNotToAsk = this.#askInterval;
    }
    const bytes = sizeOfParts(parts, this.#encoder);
    this.#host.pool.unclaim(this.#account, length);
    const block = this.#replies.beginParts(bytes);
    const data = layParts(block.buffer, parts, read.to, this.#encoder);
    const failure = await this.#readParts(parts, data, read);
    if (this.#wasAnswered(read)) {
      this.#replies.dropParts(block);
      return;
    }
    overdue.end(read);
    inFlight.end(length);
    if (failure === undefined) {
      inFlight.bytesRead += length;
      this.#replies.sendParts(block, bytes);
    } else {
      inFlight.errors++;
      this.#replies.dropParts(block);
      this.#replies.error(read.to, failure);
    }
    if (inFlight.areObserved) inFlight.done(read, read.startedAt, failure?.errno ?? 0);
    inFlight.settled();
  }

  /** Whether its time was up before; then it is over now, and only its memory is left to be given back. */
  #wasAnswered(read: SparseRead): boolean {
    if (!read.isOverdue) return false;
    this.#inFlight.settledLate(read, read.length);
    this.#inFlight.settled();
    return true;
  }

  /** For SparseRead only: its time is up. Its memory is kept, since the device may still use it. */
  timeUp(read: SparseRead, error: DeviceError): void {
    const inFlight = this.#inFlight;
    const failure = inFlight.timeUp(read, error);
    this.#replies.error(read.to, failure);
    if (inFlight.areObserved) inFlight.done(read, read.startedAt, failure.errno);
    inFlight.settled();
  }

  /** The first failure by offset, or undefined. Resolves when all reads have ended: until then they use their memory. */
  async #readParts(parts: readonly Part[], data: readonly Buffer[], asked: Asked): Promise<Failure | undefined> {
    const dataParts = parts.filter(({ isHole }) => !isHole);
    const results = await Promise.allSettled(
      data.map((into, index) => this.#readPart(dataParts[index]?.offset ?? 0, into)),
    );
    const failed = results.findIndex(({ status }) => status === 'rejected');
    const result = results[failed];
    const part = dataParts[failed];
    if (result?.status !== 'rejected' || part === undefined) return undefined;
    const { type, flags } = asked;
    const failure = this.#inFlight.failureOf(result.reason, { type, flags, offset: part.offset, length: part.length });
    // The parts before the failed one were read.
    return { ...failure, offset: failure.offset ?? part.offset };
  }
  /** Errors: what the device fails with; Error if it has read less than it was asked to. */
  async #readPart(offset: number, into: Buffer): Promise<void> {
    const { length } = into;
    if (this.#clearsFirst) into.fill(0);
    const answer: unknown = this.#device.read(offset, into, this.#host.clientSignal.signal);
    const result = await (promiseOf(answer) ?? answer);
    // The block is this read's alone, and is not used again: only the read fails.
    if (isDetached(into, length)) throw new Error(DETACHED);
    if (result === undefined || result === length) return;
    const shortfall = readShortfall(result, into);
    if (shortfall !== undefined) throw new Error(shortfall);
  }
}
