/**
 * From the client's bytes to requests: it decodes headers and payloads, in whatever pieces they arrive, and refuses, delays
 * or executes each request. It owns the state between two pieces; it never touches the socket.
 *
 * The loop runs once per request: a request that the device answers synchronously allocates nothing here.
 */

import {
  CMD,
  commandName,
  EXTENDED_REQUEST_SIZE,
  MAX_PAYLOAD,
  NBD_ERRNO,
  REQUEST_HEADER_SIZE,
} from '../protocol/wire.js';
import type { BackPressure } from './back-pressure.js';
import type { Block, MemoryAccount } from './buffer-pool.js';
import type { Dispatch } from './dispatch.js';
import type { IncomingPayload } from './incoming-payload.js';
import { UNITS_PER_LOOK, type LoopUser } from './loop-share.js';
import type { ReceiveMemory } from './receive-memory.js';
import type { ReplyQueue } from './reply-queue.js';
import {
  decodeExtendedRequest,
  decodeRequest,
  decodeStatusPayload,
  encodeHeader,
  Request,
  requestError,
  type Refusal,
  type RequestRules,
} from './request.js';
import type { RequestsInFlight } from './requests-in-flight.js';
import type { StatusRequests } from './status-requests.js';
import type { TransmissionHost } from './transmission-host.js';

const SHUTTING_DOWN: Refusal = { errno: NBD_ERRNO.ESHUTDOWN, message: 'the server is shutting down' };

const NOT_ANSWERING: Refusal = {
  errno: NBD_ERRNO.EIO,
  message: 'the export does not answer, and has as many requests as it may have',
};

/** What the parser works with: the other parts of the same transmission. */
export interface ParserParts {
  readonly host: TransmissionHost;
  readonly rules: RequestRules;
  readonly account: MemoryAccount;
  readonly memory: ReceiveMemory;
  readonly payload: IncomingPayload;
  readonly backPressure: BackPressure;
  readonly inFlight: RequestsInFlight;
  readonly statuses: StatusRequests;
  readonly dispatch: Dispatch;
  readonly replies: ReplyQueue;
  readonly loopUser: LoopUser;
  /** Called when no further input is to be parsed, before the host is told why. */
  readonly stopListening: () => void;
}

export class RequestParser {
  /** Requests decoded so far. */
  requests = 0;
  /** No further input is parsed. */
  isDeaf = false;
  /** Every request is answered ESHUTDOWN. */
  isRefusing = false;

  readonly #host: TransmissionHost;
  readonly #rules: RequestRules;
  readonly #account: MemoryAccount;
  readonly #memory: ReceiveMemory;
  readonly #payload: IncomingPayload;
  readonly #backPressure: BackPressure;
  readonly #inFlight: RequestsInFlight;
  readonly #statuses: StatusRequests;
  readonly #dispatch: Dispatch;
  readonly #replies: ReplyQueue;
  readonly #loopUser: LoopUser;
  readonly #stopListening: () => void;
  readonly #extendedHeaders: boolean;
  readonly #headerSize: number;
  readonly #request = new Request();
  readonly #headerBytes = Buffer.alloc(EXTENDED_REQUEST_SIZE);
  #headerFill = 0;
  #keptIn: Block | undefined;

  constructor(parts: ParserParts) {
    this.#host = parts.host;
    this.#rules = parts.rules;
    this.#account = parts.account;
    this.#memory = parts.memory;
    this.#payload = parts.payload;
    this.#backPressure = parts.backPressure;
    this.#inFlight = parts.inFlight;
    this.#statuses = parts.statuses;
    this.#dispatch = parts.dispatch;
    this.#replies = parts.replies;
    this.#loopUser = parts.loopUser;
    this.#stopListening = parts.stopListening;
    const { extendedHeaders } = parts.rules.negotiated;
    this.#extendedHeaders = extendedHeaders;
    this.#headerSize = extendedHeaders ? EXTENDED_REQUEST_SIZE : REQUEST_HEADER_SIZE;
  }

  /** Whether the input so far ends inside a request. */
  get isMidRequest(): boolean {
    return this.#headerFill > 0 || this.#payload.left > 0;
  }

  parse(chunk: Buffer): void {
    this.#parseSlice(chunk);
    this.#host.loop.finish(this.#loopUser);
  }

  #parseSlice(chunk: Buffer): void {
    const request = this.#request;
    const headerSize = this.#headerSize;
    const loopUser = this.#loopUser;
    const payload = this.#payload;
    const backPressure = this.#backPressure;
    const { loop } = this.#host;
    const end = chunk.length;
    let at = 0;
    // Requests that the device answers at once count as well, until others have had their turn.
    let requestsLeft = this.#host.limits.maxInFlightRequests;
    // A device or an observer may close the connection from inside a request.
    while (at < end && !this.isDeaf) {
      if (payload.left > 0) {
        const taken = payload.copyFrom(chunk, at);
        at += taken;
        this.payloadCame(taken);
        continue;
      }
      if (backPressure.isSaturated(this.isRefusing)) {
        backPressure.hold(chunk.subarray(at));
        return;
      }
      let isRequest: boolean;
      if (this.#headerFill === 0 && end - at >= headerSize) {
        if (requestsLeft-- === 0 || loop.mustYield(loopUser, unitsOf(chunk, at, headerSize))) {
          backPressure.hold(chunk.subarray(at));
          this.#queue();
          return;
        }
        isRequest = this.#decode(chunk, at);
        at += headerSize;
      } else {
        const taken = chunk.copy(this.#headerBytes, this.#headerFill, at, at + headerSize - this.#headerFill);
        this.#headerFill += taken;
        at += taken;
        if (this.#headerFill < headerSize) return;
        this.#headerFill = 0;
        isRequest = this.#decode(this.#headerBytes, 0);
      }
      if (!isRequest) {
        this.#violation(`bad request magic 0x${request.magic.toString(16)}`);
        return;
      }
      if (request.type === CMD.DISC) {
        this.#stopListening();
        this.#replies.flush();
        this.#host.disconnectRequested();
        return;
      }

      this.requests++;
      let refusal = this.isRefusing ? SHUTTING_DOWN : requestError(request, this.#rules);
      if (this.#inFlight.overdue > 0 && this.#inFlight.areStuck) refusal ??= NOT_ANSWERING;
      if (this.#host.observer.onRequest !== undefined) this.#report(refusal);

      const { payloadLength } = request;
      if (payloadLength > 0) {
        let data: Buffer | undefined;
        if (refusal !== undefined) {
          if (!this.#skipPayload(refusal)) return;
        } else if (end - at >= payloadLength && (data = this.#keep(chunk, at, payloadLength)) !== undefined) {
          at += payloadLength;
          this.#take(data, this.#keptIn);
        } else if (!payload.begin(payloadLength)) {
          backPressure.waitForMemory(payloadLength, chunk.subarray(at));
          return;
        }
      } else if (refusal !== undefined) {
        this.#refuse(refusal);
      } else if (request.length === 0 && request.type !== CMD.FLUSH) {
        if (request.type === CMD.READ) this.#replies.doneEmptyRead(request);
        else this.#dispatch.succeed(request);
        this.#inFlight.answered(request, 0);
      } else if (!this.#hasMemory()) {
        backPressure.waitForMemory(this.memoryNeeded(), chunk.subarray(at));
        return;
      } else {
        this.#dispatch.execute(request, undefined, undefined);
      }
    }
  }

  #decode(source: Buffer, at: number): boolean {
    return this.#extendedHeaders
      ? decodeExtendedRequest(source, at, this.#request)
      : decodeRequest(source, at, this.#request);
  }

  /** Whether there is memory for the request just decoded, which has no payload. */
  #hasMemory(): boolean {
    const { type, length } = this.#request;
    if (type === CMD.READ) return this.#replies.hasRoomFor(length);
    return type !== CMD.BLOCK_STATUS || this.#statuses.hasMemory(length);
  }

  /** Bytes of memory that the request just decoded waits for. */
  memoryNeeded(): number {
    const { type, length, payloadLength } = this.#request;
    if (payloadLength > 0) return payloadLength;
    return type === CMD.READ ? this.#replies.readSize(length) : this.#statuses.memoryNeeded(length);
  }

  /** Discard the payload of the request just decoded. False if it is longer than what is drained: the connection ends. */
  #skipPayload(refusal: Refusal): boolean {
    const length = this.#request.payloadLength;
    // With extended headers any command may have one: "A server SHOULD initiate hard disconnect if a client … uses a
    // length larger than a server's advertised … maximum payload length".
    const most = this.#extendedHeaders ? MAX_PAYLOAD : this.#host.limits.maxDrainedPayloadBytes;
    if (length > most) {
      this.#violation(`refused request with a payload of ${length} bytes, more than is drained`);
      return false;
    }
    this.#payload.skip(length, refusal);
    return true;
  }

  /**
   * The payload of `length` bytes at `at` in `chunk`, in memory that the device may use until it has answered; `keptIn` is its
   * block, pinned once, if it is pooled. Undefined if there is no memory for it.
   */
  #keep(chunk: Buffer, at: number, length: number): Buffer | undefined {
    const memory = this.#memory;
    memory.countData(length);
    if (memory.isLent) {
      const data = memory.keep(chunk, at, length);
      this.#keptIn = memory.keptIn;
      return data;
    }
    if (memory.parsed !== undefined) memory.parsed.pins++;
    this.#keptIn = memory.parsed;
    return chunk.subarray(at, at + length);
  }

  payloadCame(length: number): void {
    const payload = this.#payload;
    if (!payload.came(length)) return;
    const { data, block, refusal } = payload;
    payload.clear();
    if (data !== undefined) this.#take(data, block);
    else if (refusal !== undefined) this.#refuse(refusal);
  }

  /** The payload of a valid request has arrived: data of a write, or the filter of a block status. */
  #take(payload: Buffer, block: Block | undefined): void {
    const request = this.#request;
    if (request.type !== CMD.BLOCK_STATUS) {
      this.#dispatch.execute(request, payload, block);
      return;
    }
    decodeStatusPayload(request, payload);
    const refusal = requestError(request, this.#rules);
    if (refusal !== undefined) this.#refuse(refusal);
    else this.#dispatch.execute(request, undefined, undefined);
    if (block !== undefined) this.#memory.unpin(block);
  }

  #refuse(refusal: Refusal): void {
    this.#replies.error(this.#request, refusal);
    this.#inFlight.answered(this.#request, refusal.errno);
  }

  #violation(reason: string): void {
    this.#stopListening();
    this.#replies.flush();
    this.#host.protocolViolated(reason);
  }

  #report(refusal: Refusal | undefined): void {
    const { type, flags, offset, length } = this.#request;
    this.#host.observer.onRequest?.({
      id: this.#host.id,
      type,
      command: commandName(type),
      flags,
      offset,
      length,
      refusedWith: refusal?.errno ?? 0,
    });
  }

  /** Begin the request that waits for memory. False if there still is not enough. */
  beginWaiting(): boolean {
    const request = this.#request;
    const account = this.#account;
    const backPressure = this.#backPressure;
    const hasPayload = request.payloadLength > 0;
    if (this.isRefusing) {
      backPressure.endWaits();
      if (hasPayload) return this.#skipPayload(SHUTTING_DOWN);
      this.#refuse(SHUTTING_DOWN);
      return true;
    }
    account.isBeginning = true;
    try {
      if (hasPayload ? !this.#payload.begin(request.payloadLength) : !this.#hasMemory()) return false;
      if (!hasPayload) this.#dispatch.execute(request, undefined, undefined);
    } finally {
      account.isBeginning = false;
    }
    backPressure.endWaits();
    return true;
  }

  /** The bytes of a request that arrived in part or waits. `isDecoded`: its header was parsed, and it waits for memory. */
  begun(isDecoded: boolean): Buffer {
    const request = this.#request;
    const payload = this.#payload;
    const extendedHeaders = this.#extendedHeaders;
    if (isDecoded) return encodeHeader(request, extendedHeaders);
    if (payload.left === 0) return this.#headerBytes.subarray(0, this.#headerFill);
    return Buffer.concat([encodeHeader(request, extendedHeaders), payload.arrived(request.payloadLength)]);
  }

  #queue(): void {
    if (!this.isDeaf) this.#backPressure.waitForTurn();
  }
}

/** The work (units of LoopShare.mustYield) of the request whose header begins at `at` in `chunk`. */
function unitsOf(chunk: Buffer, at: number, headerSize: number): number {
  // The low byte of the type. Requests other than reads and writes may concern a whole disk.
  if ((chunk[at + 7] as number) > CMD.WRITE) return UNITS_PER_LOOK;
  // The length in units of 64 KiB: the upper two bytes of its low 32 bits.
  const length = at + headerSize - 4;
  return 1 + (((chunk[length] as number) << 8) | (chunk[length + 1] as number));
}
