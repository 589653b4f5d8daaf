/**
 * Block statuses in flight: the device is asked for one context after the other, and other connections have their turn of the
 * loop in between. It owns their order and their memory; block-status.ts collects and cuts the extents.
 */

import type { DeviceError } from '../block-device.js';
import { CMD, CMD_FLAG, REPLY_FLAG_DONE, type SelectedContext } from '../protocol/wire.js';
import {
  blockStatusMemory,
  isWideContext,
  MAX_REPLY_EXTENTS,
  OWN_REPLY_EXTENTS,
  StatusReply,
  statusChunkType,
  type ExtentCollector,
} from './block-status.js';
import type { Block, MemoryAccount } from './buffer-pool.js';
import type { Failure } from './failure.js';
import type { ServedDevice } from './geometry.js';
import { UNITS_PER_LOOK, type LoopTask, type LoopUser } from './loop-share.js';
import { TimedRequest } from './overdue-requests.js';
import { promiseOf } from '../promised.js';
import { addresseeOf, type Addressee } from './reply-encoder.js';
import type { ReplyQueue } from './reply-queue.js';
import { wantedContexts, type Request, type RequestRules } from './request.js';
import type { RequestsInFlight } from './requests-in-flight.js';
import type { TransmissionHost } from './transmission-host.js';

/** One block status in flight. */
class StatusRequest extends TimedRequest implements LoopTask {
  /** Index of the context to ask for next, or whose extents are being collected. */
  next = 0;
  /** The collector that the device fills. */
  collector: ExtentCollector | undefined;
  readonly type = CMD.BLOCK_STATUS;
  readonly flags: number;
  readonly offset: number;
  readonly length: number;

  readonly #owner: StatusRequests;

  constructor(
    owner: StatusRequests,
    readonly to: Addressee,
    { flags, offset, length }: Request,
    readonly contexts: readonly SelectedContext[],
    readonly status: StatusReply,
    /** Claimed for it, bytes. */
    readonly memory: number,
    /** Taken instead. */
    readonly own: Block | undefined,
    /** When it began, if somebody wants to know. */
    readonly startedAt: number,
  ) {
    super();
    this.#owner = owner;
    this.flags = flags;
    this.offset = offset;
    this.length = length;
  }

  get loopUser(): LoopUser {
    return this.#owner.loopUser;
  }

  serveTurn(): void {
    this.goOn();
  }

  overdue(error: DeviceError): void {
    this.#owner.timeUp(this, error);
  }

  readonly goOn = (): void => this.#owner.askContexts(this);
  readonly fail = (error: unknown): void => this.#owner.failed(this, error);
}

export class StatusRequests {
  readonly #extendedHeaders: boolean;

  readonly #host: TransmissionHost;
  readonly #device: ServedDevice;
  readonly #rules: RequestRules;
  readonly #account: MemoryAccount;
  readonly #inFlight: RequestsInFlight;
  readonly #replies: ReplyQueue;

  constructor(
    host: TransmissionHost,
    device: ServedDevice,
    rules: RequestRules,
    account: MemoryAccount,
    inFlight: RequestsInFlight,
    replies: ReplyQueue,
    readonly loopUser: LoopUser,
  ) {
    this.#host = host;
    this.#device = device;
    this.#rules = rules;
    this.#account = account;
    this.#inFlight = inFlight;
    this.#replies = replies;
    this.#extendedHeaders = rules.negotiated.extendedHeaders;
  }

  /** The most memory that a block status of `length` bytes needs, bytes. */
  memoryNeeded(length: number): number {
    return blockStatusMemory(length, this.#rules.negotiated.metaContexts.length);
  }

  /** Whether a block status can begin now. With less memory than the longest answer needs, the answer is shorter. */
  hasMemory(length: number): boolean {
    return !this.#account.isOwnTaken || this.#host.pool.hasRoom(this.#account, this.memoryNeeded(length));
  }

  begin(request: Request): void {
    const account = this.#account;
    const { flags, offset, length } = request;
    const { pool } = this.#host;
    const contexts = wantedContexts(request, this.#rules.negotiated.metaContexts);
    let memory = blockStatusMemory(length, contexts.length);
    let most = MAX_REPLY_EXTENTS;
    let own: Block | undefined;
    if (!pool.hasRoom(account, memory)) {
      own = pool.takeOwn(account);
      most = OWN_REPLY_EXTENTS;
      memory = 0;
    }
    pool.claim(account, memory);
    this.#inFlight.begin(memory);
    const isReqOne = (flags & CMD_FLAG.REQ_ONE) !== 0;
    const status = new StatusReply(offset, length, contexts.length, isReqOne, most);
    const { now } = this.#inFlight;
    const asked = new StatusRequest(this, addresseeOf(request), request, contexts, status, memory, own, now);
    if (this.#host.overdue.isOn) this.#host.overdue.begin(asked);
    asked.goOn();
  }

  /** For StatusRequest only: ask for the contexts from `asked.next` on, until its turn of the loop is over. */
  askContexts(asked: StatusRequest): void {
    const { loopUser } = this;
    const device = this.#device;
    const extendedHeaders = this.#extendedHeaders;
    const { loop } = this.#host;
    const { contexts, status, offset } = asked;
    const { wideContexts } = this.#rules.geometry;
    let failure: Failure | undefined;
    if (asked.isOverdue) {
      this.#finish(asked, failure);
      return;
    }
    try {
      for (let { collector } = asked; asked.next < contexts.length; collector = undefined) {
        if (collector === undefined) {
          if (asked.next > 0 && loop.mustYield(loopUser, UNITS_PER_LOOK)) {
            loop.enqueue(asked);
            return;
          }
          const { name } = contexts[asked.next] as SelectedContext;
          collector = status.next(name, extendedHeaders && isWideContext(name, wideContexts));
          // Set first: whatever happens in the device, its sink ends with the request.
          asked.collector = collector;
          const answer: unknown = device.extents(
            name,
            offset,
            status.length,
            collector.sink,
            this.#host.clientSignal.signal,
          );
          const later = answer === undefined ? undefined : promiseOf(answer);
          if (later !== undefined) {
            later.then(asked.goOn, asked.fail);
            return;
          }
        }
        asked.collector = undefined;
        status.add(collector);
        asked.next++;
      }
    } catch (error) {
      failure = this.#inFlight.failureOf(error, asked);
    } finally {
      loop.finish(loopUser);
    }
    this.#finish(asked, failure);
  }

  /** For StatusRequest only: the device has failed. */
  failed(asked: StatusRequest, error: unknown): void {
    this.#finish(asked, this.#inFlight.failureOf(error, asked));
  }

  /** For StatusRequest only: its time is up. Its memory is kept, since the device may still report extents. */
  timeUp(asked: StatusRequest, error: DeviceError): void {
    const inFlight = this.#inFlight;
    const failure = inFlight.timeUp(asked, error);
    this.#replies.error(asked.to, failure);
    if (inFlight.areObserved) inFlight.done(asked, asked.startedAt, failure.errno);
    inFlight.settled();
  }

  /** One chunk of extents for each context, all of the same length; or an error; or nothing, if it was answered before. */
  #finish(asked: StatusRequest, failure: Failure | undefined): void {
    const { to, contexts, status, memory, own } = asked;
    const extendedHeaders = this.#extendedHeaders;
    const inFlight = this.#inFlight;
    const wasAnswered = asked.isOverdue;
    if (wasAnswered) {
      inFlight.settledLate(asked, memory);
    } else {
      this.#host.overdue.end(asked);
      inFlight.end(memory);
    }
    // The claimed memory covers the reply.
    this.#host.pool.unclaim(this.#account, memory);
    if (own !== undefined) this.#host.pool.give(own);
    if (wasAnswered) {
      // Nothing more is sent.
    } else if (failure === undefined) {
      status.collectors.forEach((collector, index) => {
        const done = index === contexts.length - 1 ? REPLY_FLAG_DONE : 0;
        const size = collector.payloadSize(extendedHeaders);
        const payload = this.#replies.chunk(done, statusChunkType(extendedHeaders), to, size);
        collector.writePayload(payload, contexts[index]?.id ?? 0, extendedHeaders);
      });
    } else {
      inFlight.errors++;
      this.#replies.error(to, failure);
    }
    asked.collector?.release();
    status.release();
    if (inFlight.areObserved && !wasAnswered) inFlight.done(asked, asked.startedAt, failure?.errno ?? 0);
    inFlight.settled();
  }
}
