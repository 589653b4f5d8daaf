/**
 * Reads that are answered with holes: zeros that the device reports as holes are not sent. It owns the decision when to ask the
 * device for holes, and the reads of the data parts; read-plan.ts lays out the reply.
 */

import { ALLOCATION_CONTEXT, type Awaitable } from '../block-device.js';
import { CMD_FLAG } from '../protocol/wire.js';
import type { MemoryAccount } from './buffer-pool.js';
import type { ServedDevice } from './geometry.js';
import { layParts, ReadPlan, sizeOfParts, SPARSE_READ_BYTES, type Part } from './read-plan.js';
import { addresseeOf, type Addressee, type ReplyEncoder } from './reply-encoder.js';
import type { Failure, ReplyQueue } from './reply-queue.js';
import type { Request, RequestRules } from './request.js';
import { isPromise, type RequestsInFlight } from './requests-in-flight.js';
import type { TransmissionHost } from './transmission-host.js';

/**
 * A device whose answer comes later and reports data only is asked less and less often: up to this many long reads are then
 * read without asking. Asking before each of them cost a quarter of the speed of sequential reads of 1 MiB
 * from a full disk (1.4 to 1.8 GB/s with it, 1.9 to 2.0 without).
 */
const MAX_ASK_INTERVAL = 31;

export class SparseReads {
  /** Whether the client takes holes, and whether the device reports them. */
  readonly areAllowed: boolean;
  readonly #knowsHoles: boolean;
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
    if (device.isHole !== undefined && device.isHole(offset, length)) {
      this.#inFlight.bytesRead += length;
      this.#replies.hole(request, offset, length);
      return true;
    }
    // "DF … the server MUST send at most one content chunk"
    if (length < SPARSE_READ_BYTES || !this.#knowsHoles || (request.flags & CMD_FLAG.DF) !== 0) return false;
    if (this.#readsNotToAsk > 0) {
      this.#readsNotToAsk--;
      return false;
    }
    const plan = new ReadPlan(offset, length);
    let answer: Awaitable<void>;
    try {
      answer = device.extents(ALLOCATION_CONTEXT, offset, length, plan.sink);
    } catch (error) {
      this.#inFlight.failureOf(error, request);
      return false;
    }
    if (answer !== undefined && isPromise(answer)) {
      void this.#readInParts(addresseeOf(request), plan, answer, request.flags, offset, length);
      return true;
    }
    const parts = plan.finish();
    if (parts.length === 1 && parts[0]?.isHole === false) return false;
    void this.#readInParts(addresseeOf(request), plan, undefined, request.flags, offset, length);
    return true;
  }

  /** Read the data parts, each into its chunk, and send all chunks together. */
  async #readInParts(
    to: Addressee,
    plan: ReadPlan,
    extents: Promise<unknown> | undefined,
    flags: number,
    offset: number,
    length: number,
  ): Promise<void> {
    const inFlight = this.#inFlight;
    // There is room for all of it. How much it needs is known when the extents are known.
    this.#host.pool.claim(this.#account, length);
    inFlight.begin(length);
    if (extents !== undefined) {
      try {
        await extents;
      } catch (error) {
        // A device that fails to report extents may still be able to read.
        inFlight.failureOf(error, { flags, offset, length });
        plan.forget();
      }
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
    const data = layParts(block.buffer, parts, to, this.#encoder);
    const failure = await this.#readParts(parts, data, flags);
    inFlight.end(length);
    if (failure === undefined) {
      inFlight.bytesRead += length;
      this.#replies.sendParts(block, bytes);
    } else {
      inFlight.errors++;
      this.#replies.dropParts(block);
      this.#replies.error(to, failure);
    }
    inFlight.settled();
  }

  /** The first failure by offset, or undefined. Resolves when all reads have ended: until then they use their memory. */
  async #readParts(parts: readonly Part[], data: readonly Buffer[], flags: number): Promise<Failure | undefined> {
    const dataParts = parts.filter(({ isHole }) => !isHole);
    const results = await Promise.allSettled(
      data.map(async (into, index) => this.#device.read(dataParts[index]?.offset ?? 0, into)),
    );
    const failed = results.findIndex(({ status }) => status === 'rejected');
    const result = results[failed];
    const part = dataParts[failed];
    if (result?.status !== 'rejected' || part === undefined) return undefined;
    const failure = this.#inFlight.failureOf(result.reason, { flags, offset: part.offset, length: part.length });
    // The parts before the failed one were read.
    return { ...failure, offset: failure.offset ?? part.offset };
  }
}
