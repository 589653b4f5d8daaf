/**
 * The transmission phase of one connection: bytes in, requests out to the device, replies back. It owns the parser's
 * state and the requests in flight; it never closes the socket or the device, it tells its connection why it should.
 *
 * The path of a request that the device answers synchronously allocates nothing but the view of its data. Requests run
 * concurrently and are answered as they finish. Two bounds hold a client back: work in flight, and replies not taken.
 */

import type { Duplex } from 'node:stream';
import { ALLOCATION_CONTEXT, DeviceError, type Awaitable, type ZeroMode } from '../block-device.js';
import {
  blockStatusMemory,
  isWideContext,
  MAX_REPLY_EXTENTS,
  OWN_REPLY_EXTENTS,
  StatusReply,
  statusChunkType,
  type ExtentCollector,
} from './block-status.js';
import { MemoryAccount, OWN_BYTES, OWN_RECEIVE_BYTES, type Block, type BufferPool } from './buffer-pool.js';
import type { ServedDevice } from './geometry.js';
import type { Limits } from './limits.js';
import { LoopUser, UNITS_PER_LOOK, type LoopShare, type LoopTask } from './loop-share.js';
import type { ServerObserver } from './observer.js';
import {
  CMD,
  CMD_FLAG,
  EXTENDED_REQUEST_SIZE,
  MAX_PAYLOAD,
  NBD_ERRNO,
  REPLY_FLAG_DONE,
  REQUEST_HEADER_SIZE,
  type SelectedContext,
} from '../protocol/wire.js';
import { layParts, ReadPlan, sizeOfParts, SPARSE_READ_BYTES, type Part } from './read-plan.js';
import { chooseReplyEncoder, type Addressee, type ReplyEncoder } from './reply-encoder.js';
import { ReplyQueue, type Failure } from './reply-queue.js';
import {
  decodeExtendedRequest,
  decodeRequest,
  decodeStatusPayload,
  Request,
  requestError,
  wantedContexts,
  type Refusal,
  type RequestRules,
} from './request.js';

/** What a transmission needs of its connection. */
export interface TransmissionHost {
  readonly id: number;
  readonly exportName: string | undefined;
  readonly socket: Duplex;
  readonly pool: BufferPool;
  readonly loop: LoopShare;
  readonly limits: Limits;
  readonly observer: ServerObserver;
  /** The client said goodbye: answer what is in flight, then close. */
  disconnectRequested(): void;
  /** The client broke the protocol: close now. */
  protocolViolated(reason: string): void;
}

/** With less room than this left a receive would bring too little; of the block that a connection has for itself, less will do. */
const MIN_RECEIVE_BYTES = 64 * 1024;
const MIN_OWN_RECEIVE_BYTES = 8 * 1024;
/** Receives in a row of less than half of its own block after which a connection needs no larger one any more. */
const SMALL_RECEIVES = 64;
/** For what comes while all other memory is in use: enough to learn what is asked for. */
const SCRATCH_BYTES = 4 * 1024;
/** What must be missing of a payload for it to be received where it belongs; less comes along with what follows. */
const IN_PLACE_BYTES = 16 * 1024;

/** Under TLS data are in memory twice: as they are, and encrypted. */
const TLS_COPIES = 2;

/** Replies below this share of the bound before a held client is heard again, so that it is heard in batches. */
const RESUME_BELOW = 1 / 2;

/**
 * A device that has to look where its holes are, and finds data only, is asked less and less often: up to this many long
 * reads are then sent as they are. Asking before each of them cost a quarter of the speed of sequential reads of 1 MiB
 * from a full disk (1.4 to 1.8 GB/s with it, 1.9 to 2.0 without).
 */
const MAX_ASK_INTERVAL = 31;

const ZERO_MODES: readonly ZeroMode[] = Array.from({ length: 8 }, (_, bits) =>
  Object.freeze({ noHole: (bits & 1) !== 0, fua: (bits & 2) !== 0, fastZero: (bits & 4) !== 0 }),
);

/** Nothing is held back but the next thing to be received. */
const NOTHING = Buffer.alloc(0);

const SHUTTING_DOWN: Refusal = { errno: NBD_ERRNO.ESHUTDOWN, message: 'the server is shutting down' };

/** A request whose device call returned a promise. Reused, with its two handlers made once. */
class PendingRequest {
  type = 0;
  flags = 0;
  cookieHigh = 0;
  cookieLow = 0;
  offsetHigh = 0;
  offsetLow = 0;
  offset = 0;
  length = 0;
  /** Where a read's reply is being made, or the pooled memory of a write's payload. */
  block: Block | undefined;
  at = 0;
  readonly succeed: () => void;
  readonly fail: (error: unknown) => void;

  constructor(owner: Transmission) {
    this.succeed = () => owner.finished(this, undefined);
    this.fail = (error) => owner.finished(this, owner.failureOf(error, this));
  }
}

/** In the order in which they are looked for. */
type Receiving = 'payload' | 'block' | 'scratch';

/** A block status under way: it goes from context to context, and lets others have their turn in between. */
class StatusRequest implements LoopTask {
  /** The context that is to be asked for, or whose extents are being collected. */
  next = 0;
  /** Being filled by the device. */
  collector: ExtentCollector | undefined;
  readonly flags: number;
  readonly offset: number;
  readonly length: number;

  constructor(
    private readonly owner: Transmission,
    readonly to: Addressee,
    { flags, offset, length }: Request,
    readonly contexts: readonly SelectedContext[],
    readonly status: StatusReply,
    /** Claimed for it, bytes. */
    readonly memory: number,
    /** Taken instead. */
    readonly own: Block | undefined,
  ) {
    this.flags = flags;
    this.offset = offset;
    this.length = length;
  }

  get loopUser(): LoopUser {
    return this.owner.loopUser;
  }

  serveTurn(): void {
    this.goOn();
  }

  readonly goOn = (): void => this.owner.askContexts(this);
  readonly fail = (error: unknown): void => this.owner.finishedStatus(this, this.owner.failureOf(error, this));
}

export class Transmission implements LoopTask {
  readonly loopUser = new LoopUser();
  requests = 0;
  errors = 0;
  bytesRead = 0;
  bytesWritten = 0;
  /** Requests the device is working on. */
  inFlight = 0;
  /** Bytes of payloads that came in pieces. */
  payloadBytes = 0;

  private readonly encoder: ReplyEncoder;
  private readonly extendedHeaders: boolean;
  private readonly headerSize: number;
  /** Whether a read may be answered with holes, and whether the device can tell where they are. */
  private readonly sendsHoles: boolean;
  private readonly knowsHoles: boolean;
  private readonly replies: ReplyQueue;
  private readonly request = new Request();
  private readonly headerBytes = Buffer.alloc(EXTENDED_REQUEST_SIZE);
  private headerFill = 0;
  /** Bytes of the current request's payload still to come, or to be skipped if `payload` is undefined. */
  private payloadLeft = 0;
  private payload: Buffer | undefined;
  private payloadBlock: Block | undefined;
  private refusal: Refusal | undefined;
  /** Where the next bytes are received, unless into a payload. */
  private receiveBlock: Block | undefined;
  /** The one that is outside of the budget; `receiveBlock` may be another one. */
  private ownReceive: Block | undefined;
  private scratch: Buffer | undefined;
  private receiving: Receiving = 'block';
  /** Bytes that the socket may put there, and whether it has used all of them lately. */
  private receiveRoom = 0;
  private wantsLargeReceive = false;
  private smallReceives = 0;
  /** There is nowhere to receive into until a write of `ownReceive` is done. The socket is paused. */
  private isStarved = false;
  /** What is being parsed lies in this block: a write that goes on after the turn must pin it. */
  private parsedBlock: Block | undefined;
  /** Input that waits: for room, for memory, or for its turn. The socket is paused while there is any. */
  private held: Buffer | undefined;
  /** `held` lies in it. */
  private heldBlock: Block | undefined;
  /** `request` is decoded and waits for memory. */
  private isShortOfMemory = false;
  /** It waits for its turn of the loop. */
  private isQueued = false;
  private readonly account: MemoryAccount;
  private inFlightBytes = 0;
  /** Long reads before the device is asked again where its holes are, and how many were left out the last time. */
  private readsNotToAsk = 0;
  private askInterval = 0;
  private isDeaf = false;
  private isRefusing = false;
  /** Whether input came since the last settling. */
  private isHeard = false;
  private isSettleScheduled = false;
  private whenIdle: (() => void)[] = [];
  private readonly spare: PendingRequest[] = [];

  constructor(
    private readonly host: TransmissionHost,
    private readonly device: ServedDevice,
    private readonly rules: RequestRules,
  ) {
    const { negotiated } = rules;
    this.encoder = chooseReplyEncoder(negotiated);
    this.extendedHeaders = negotiated.extendedHeaders;
    this.headerSize = negotiated.extendedHeaders ? EXTENDED_REQUEST_SIZE : REQUEST_HEADER_SIZE;
    this.sendsHoles = negotiated.structuredReplies;
    this.knowsHoles = this.rules.geometry.contexts.includes(ALLOCATION_CONTEXT);
    this.account = new MemoryAccount(() => this.queue(), 'encrypted' in host.socket ? TLS_COPIES : 1);
    this.replies = new ReplyQueue(host.socket, host.pool, this.account, this.encoder, () => this.resume());
  }

  /** Whether the input so far ends inside a request. */
  get isMidRequest(): boolean {
    return this.headerFill > 0 || this.payloadLeft > 0;
  }

  /** Bytes of the server's memory that it holds. */
  get memoryBytes(): number {
    return this.account.held;
  }

  /** Bytes of replies that the socket is done with, each write as a whole. */
  get takenBytes(): number {
    return this.replies.takenBytes;
  }

  /** Whether the client is the one who has to do something: take a reply, or send the rest of a payload. */
  get waitsForClient(): boolean {
    // Where there is nowhere to receive into, or its turn has not come, it waits for us.
    const isHeard = !this.isStarved && this.held === undefined;
    return this.replies.unsentBytes > 0 || (this.payloadLeft > 0 && isHeard);
  }

  get hasEnded(): boolean {
    return this.isDeaf && this.inFlight === 0;
  }

  /** Whether the client waits for us. */
  get isBusy(): boolean {
    return this.inFlight > 0 || this.isQueued || this.isShortOfMemory;
  }

  /** Bytes from the client, as they came. `chunk` is the transmission's from now on. */
  feed(chunk: Buffer): void {
    if (this.isDeaf) return;
    this.isHeard = true;
    if (this.held !== undefined) {
      this.holdBack(Buffer.concat([this.held, chunk]), undefined);
      return;
    }
    if (this.host.loop.isSpent) {
      this.hold(chunk);
      this.queue();
      return;
    }
    this.parse(chunk);
    this.replies.flush();
  }

  /** Where the socket shall put what comes next. */
  nextBuffer(): Buffer {
    if (this.isDeaf) return this.bufferForNobody();
    const { payload } = this;
    // What is held back comes before it: the place of what is received now is not known before that is parsed.
    if (payload !== undefined && this.held === undefined && this.payloadLeft >= IN_PLACE_BYTES) {
      this.receiving = 'payload';
      return payload.subarray(payload.length - this.payloadLeft);
    }
    const block = this.chooseReceiveBlock();
    if (block === undefined) {
      this.receiving = 'scratch';
      this.isStarved = true;
      this.host.socket.pause();
      return (this.scratch ??= Buffer.allocUnsafeSlow(SCRATCH_BYTES));
    }
    this.receiving = 'block';
    this.receiveRoom = block.buffer.length - block.used;
    return block.buffer.subarray(block.used);
  }

  /** What comes is not looked at any more. */
  private bufferForNobody(): Buffer {
    const { payloadBlock } = this;
    this.receiving = 'scratch';
    this.payloadBlock = undefined;
    if (payloadBlock !== undefined) this.unpin(payloadBlock);
    return (this.scratch ??= Buffer.allocUnsafeSlow(SCRATCH_BYTES));
  }

  /** A block with room to receive into. Undefined if there is none before a write is done. */
  private chooseReceiveBlock(): Block | undefined {
    let block = this.receiveBlock;
    if (block !== undefined) {
      const isFree = block.pins === 1;
      // Nobody else is busy with any of it: begin again at its front.
      if (isFree) block.used = 0;
      const isOwn = block === this.ownReceive;
      const isWanted = isOwn ? !this.wantsLargeReceive : !(isFree && this.smallReceives >= SMALL_RECEIVES);
      const least = isOwn ? MIN_OWN_RECEIVE_BYTES : MIN_RECEIVE_BYTES;
      if (isWanted && block.buffer.length - block.used >= least) return block;
      if (!isOwn) {
        this.receiveBlock = undefined;
        if (isFree) this.wantsLargeReceive = false;
        this.unpin(block);
      }
    }
    let own = this.ownReceive;
    if (own === undefined) {
      this.ownReceive = own = this.host.pool.takeOwnReceive();
      own.pins = 1;
    }
    const isOwnFree = own.pins === 1;
    if (isOwnFree) own.used = 0;
    block = this.wantsLargeReceive || !isOwnFree ? this.host.pool.takeReceive(this.account) : undefined;
    if (block !== undefined) {
      block.pins = 1;
      this.smallReceives = 0;
    } else {
      if (own.buffer.length - own.used < MIN_OWN_RECEIVE_BYTES) return undefined;
      block = own;
    }
    this.receiveBlock = block;
    return block;
  }

  /** The socket has put so many bytes where it was told to. */
  received(length: number): void {
    if (this.isDeaf) return;
    if (this.receiving === 'payload') {
      this.isHeard = true;
      this.payloadCame(length);
      this.replies.flush();
      this.yieldAfterPayload();
      return;
    }
    if (this.receiving === 'scratch') {
      if (this.scratch === undefined) throw new Error('transmission: received into nothing');
      // Not often: the scratch is the next one's again.
      this.feed(Buffer.from(this.scratch.subarray(0, length)));
      return;
    }
    const block = this.receiveBlock;
    if (block === undefined) throw new Error('transmission: received into nothing');
    if (length === this.receiveRoom) this.wantsLargeReceive = true;
    else if (length >= OWN_RECEIVE_BYTES / 2) this.smallReceives = 0;
    else this.smallReceives++;
    const chunk = block.buffer.subarray(block.used, block.used + length);
    block.used += length;
    this.parsedBlock = block;
    this.feed(chunk);
    this.parsedBlock = undefined;
  }

  /** The payload of a write has been received where it belongs: what comes next may have to wait for its turn. */
  private yieldAfterPayload(): void {
    const { loop } = this.host;
    if (this.payloadLeft > 0 || this.isDeaf || this.held !== undefined) return;
    if (loop.mustYield(this.loopUser, UNITS_PER_LOOK)) {
      this.hold(NOTHING);
      this.queue();
    }
    loop.finish(this.loopUser);
  }

  /** Its turn of the loop has come. */
  serveTurn(): void {
    this.isQueued = false;
    this.resume();
  }

  private queue(): void {
    if (this.isQueued || this.isDeaf) return;
    this.isQueued = true;
    this.host.loop.enqueue(this);
  }

  /** Go on with `rest`, which is the transmission's, when there is room, memory, or its turn. */
  private hold(rest: Buffer): void {
    const block = this.parsedBlock;
    if (block === undefined) this.holdBack(rest, undefined);
    // The rest of its own block is not worth keeping it from what comes.
    else if (rest.length <= OWN_RECEIVE_BYTES) this.holdBack(Buffer.from(rest), undefined);
    else {
      block.pins++;
      this.holdBack(rest, block);
    }
    this.host.socket.pause();
  }

  private holdBack(held: Buffer | undefined, block: Block | undefined): void {
    const before = this.heldBlock;
    this.held = held;
    this.heldBlock = block;
    if (before !== undefined) this.unpin(before);
  }

  /** The server is shutting down: every further request is answered ESHUTDOWN (proto.md, "Terminating …"). */
  refuseNewRequests(): void {
    this.isRefusing = true;
    // What is held back is refused, too. Not at once: this may be called from inside a request (see onIdle).
    this.isHeard = true;
    this.scheduleSettle();
  }

  /**
   * The server is shutting down: no further request is carried out or answered. A client that connects again repeats them,
   * while an error it would have to hand on.
   */
  dropNewRequests(): void {
    // Not at once: this may be called from inside a request (see onIdle).
    setImmediate(() => {
      this.stopListening();
      this.scheduleSettle();
    });
  }

  /** Nothing the client sends from now on is looked at. */
  stopListening(): void {
    this.isDeaf = true;
    this.holdBack(undefined, undefined);
    this.endWaits();
    // What the socket has been told to receive into is no memory for anybody else, until the socket is gone.
    const { payloadBlock } = this;
    if (payloadBlock !== undefined && this.receiving !== 'payload') {
      this.payloadBlock = undefined;
      this.unpin(payloadBlock);
    }
    this.payload = undefined;
    this.payloadLeft = 0;
  }

  /** It waits neither for its turn nor for memory any more. */
  private endWaits(): void {
    this.isShortOfMemory = false;
    this.host.pool.endWait(this.account);
    if (this.isQueued) this.host.loop.leave(this);
    this.isQueued = false;
  }

  /** What is in flight is finished, its replies go nowhere; those that are made already leave. */
  dropReplies(): void {
    this.replies.close();
  }

  /** The socket is gone: what is in flight is finished, its replies go nowhere. */
  socketClosed(): void {
    this.stopListening();
    const { receiveBlock, ownReceive, payloadBlock } = this;
    this.receiveBlock = this.ownReceive = this.payloadBlock = undefined;
    if (receiveBlock !== undefined && receiveBlock !== ownReceive) this.unpin(receiveBlock);
    if (ownReceive !== undefined) this.unpin(ownReceive);
    if (payloadBlock !== undefined) this.unpin(payloadBlock);
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
    this.parseSlice(chunk);
    this.host.loop.finish(this.loopUser);
  }

  private parseSlice(chunk: Buffer): void {
    const { request, headerSize, loopUser } = this;
    const { loop } = this.host;
    const end = chunk.length;
    let at = 0;
    // A request that the device answers at once counts, too, until others have had their turn.
    let requestsLeft = this.host.limits.maxInFlightRequests;
    while (at < end) {
      if (this.payloadLeft > 0) {
        at += this.takePayload(chunk, at);
        continue;
      }
      if (this.isSaturated()) {
        this.hold(chunk.subarray(at));
        return;
      }
      let isRequest: boolean;
      if (this.headerFill === 0 && end - at >= headerSize) {
        if (requestsLeft-- === 0 || loop.mustYield(loopUser, unitsOf(chunk, at, headerSize))) {
          this.hold(chunk.subarray(at));
          this.queue();
          return;
        }
        isRequest = this.decode(chunk, at);
        at += headerSize;
      } else {
        const taken = chunk.copy(this.headerBytes, this.headerFill, at, at + headerSize - this.headerFill);
        this.headerFill += taken;
        at += taken;
        if (this.headerFill < headerSize) return;
        this.headerFill = 0;
        isRequest = this.decode(this.headerBytes, 0);
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
      const refusal = this.isRefusing ? SHUTTING_DOWN : requestError(request, this.rules);
      if (this.host.observer.onRequest !== undefined) this.report(refusal);

      const { payloadLength } = request;
      if (payloadLength > 0) {
        if (refusal !== undefined) {
          if (!this.skipPayload(refusal)) return;
        } else if (end - at >= payloadLength) {
          const data = chunk.subarray(at, at + payloadLength);
          at += payloadLength;
          if (this.parsedBlock !== undefined) this.parsedBlock.pins++;
          this.take(data, this.parsedBlock);
        } else if (!this.beginPayload()) {
          this.waitForMemory(payloadLength, chunk.subarray(at));
          return;
        }
      } else if (refusal !== undefined) {
        this.refuse(refusal);
      } else if (request.length === 0 && request.type !== CMD.FLUSH) {
        if (request.type === CMD.READ) this.replies.doneEmptyRead(request);
        else this.succeed(request);
      } else if (!this.hasMemory()) {
        this.waitForMemory(this.memoryNeeded(), chunk.subarray(at));
        return;
      } else {
        this.execute(undefined, undefined);
      }
    }
  }

  /** Whether there is memory for the request just decoded, which has no payload. */
  private hasMemory(): boolean {
    const { type, length } = this.request;
    if (type === CMD.READ) return this.replies.hasRoomFor(length);
    if (type !== CMD.BLOCK_STATUS) return true;
    // There may be less memory than for the longest answer, which then is a shorter one.
    return !this.account.isOwnTaken || this.host.pool.hasRoom(this.account, this.memoryNeeded());
  }

  private memoryNeeded(): number {
    const { type, length } = this.request;
    if (type === CMD.READ) return this.replies.readSize(length);
    return blockStatusMemory(length, this.rules.negotiated.metaContexts.length);
  }

  /** The request just decoded needs `bytes` of memory that others have. `rest` is what came behind its header. */
  private waitForMemory(bytes: number, rest: Buffer): void {
    this.isShortOfMemory = true;
    this.host.pool.wait(this.account, bytes);
    this.hold(rest);
  }

  /** Begin the request that waits for memory. False if there still is none. */
  private beginWaiting(): boolean {
    const hasPayload = this.request.payloadLength > 0;
    if (this.isRefusing) {
      this.endWaits();
      if (hasPayload) return this.skipPayload(SHUTTING_DOWN);
      this.refuse(SHUTTING_DOWN);
      return true;
    }
    const { account } = this;
    account.isBeginning = true;
    try {
      if (hasPayload ? !this.beginPayload() : !this.hasMemory()) return false;
      if (!hasPayload) this.execute(undefined, undefined);
    } finally {
      account.isBeginning = false;
    }
    this.endWaits();
    return true;
  }

  private decode(source: Buffer, at: number): boolean {
    return this.extendedHeaders
      ? decodeExtendedRequest(source, at, this.request)
      : decodeRequest(source, at, this.request);
  }

  /** The payload of the request just decoded is not looked at. False if it is too long for that. */
  private skipPayload(refusal: Refusal): boolean {
    const length = this.request.payloadLength;
    // With extended headers any command may have one: "A server SHOULD initiate hard disconnect if a client … uses a
    // length larger than a server's advertised … maximum payload length".
    const most = this.extendedHeaders ? MAX_PAYLOAD : this.host.limits.maxDrainedPayloadBytes;
    if (length > most) {
      this.violation(`refused request with a payload of ${length} bytes, more than is drained`);
      return false;
    }
    this.refusal = refusal;
    this.payload = undefined;
    this.payloadLeft = length;
    return true;
  }

  /** The payload of the request just decoded comes in pieces. False if there is no memory for it. */
  private beginPayload(): boolean {
    const length = this.request.payloadLength;
    // requestError() has seen to it that it is at most MAX_PAYLOAD.
    if (length > MAX_PAYLOAD) throw new Error('transmission: an unchecked payload length');
    const { pool } = this.host;
    let block: Block | undefined;
    if (pool.hasRoom(this.account, length)) block = pool.takeLarge(this.account, length);
    else if (length <= OWN_BYTES) block = pool.takeOwn(this.account);
    if (block === undefined) return false;
    block.pins = 1;
    this.payloadBlock = block;
    this.payload = block.buffer.subarray(0, length);
    this.payloadLeft = length;
    return true;
  }

  /** Returns how many bytes of `chunk` from `at` belonged to the payload. */
  private takePayload(chunk: Buffer, at: number): number {
    const taken = Math.min(this.payloadLeft, chunk.length - at);
    if (this.payload !== undefined) {
      chunk.copy(this.payload, this.payload.length - this.payloadLeft, at, at + taken);
    }
    this.payloadCame(taken);
    return taken;
  }

  private payloadCame(length: number): void {
    this.payloadLeft -= length;
    this.payloadBytes += length;
    if (this.payloadLeft === 0) {
      const { payload, payloadBlock, refusal } = this;
      this.payload = undefined;
      this.payloadBlock = undefined;
      this.refusal = undefined;
      if (payload !== undefined) this.take(payload, payloadBlock);
      else if (refusal !== undefined) this.refuse(refusal);
    }
  }

  /** The payload of a request that may have one is there: data to be written, or what a block status is about. */
  private take(payload: Buffer, block: Block | undefined): void {
    const { request } = this;
    if (request.type !== CMD.BLOCK_STATUS) {
      this.execute(payload, block);
      return;
    }
    decodeStatusPayload(request, payload);
    const refusal = requestError(request, this.rules);
    if (refusal !== undefined) this.refuse(refusal);
    else this.execute(undefined, undefined);
    if (block !== undefined) this.unpin(block);
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
          if (this.sendsHoles && this.readWithHoles()) return;
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
        case CMD.BLOCK_STATUS:
          this.beginBlockStatus();
          return;
        default:
          throw new Error(`transmission: command ${type} was not refused`);
      }
    } catch (error) {
      const failure = this.failureOf(error, request);
      this.errors++;
      if (block !== undefined) this.unpin(block);
      if (type === CMD.READ) this.replies.failRead(request, failure);
      else this.replies.error(request, failure);
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
    if (block !== undefined) this.unpin(block);
    this.succeed(request);
  }

  /** Answer the read just decoded with holes, if there are any to be known of. False if it is to be read as a whole. */
  private readWithHoles(): boolean {
    const { request, device } = this;
    const { offset, length } = request;
    if (device.isHole !== undefined && device.isHole(offset, length)) {
      this.bytesRead += length;
      this.replies.hole(request, offset, length);
      return true;
    }
    // "DF … the server MUST send at most one content chunk"
    if (length < SPARSE_READ_BYTES || !this.knowsHoles || (request.flags & CMD_FLAG.DF) !== 0) return false;
    if (this.readsNotToAsk > 0) {
      this.readsNotToAsk--;
      return false;
    }
    const plan = new ReadPlan(offset, length);
    let answer: Awaitable<void>;
    try {
      answer = device.extents(ALLOCATION_CONTEXT, offset, length, plan.sink);
    } catch (error) {
      this.failureOf(error, request);
      return false;
    }
    if (answer !== undefined && isPromise(answer)) {
      void this.readInParts(addresseeOf(request), plan, answer, request.flags, offset, length);
      return true;
    }
    const parts = plan.finish();
    if (parts.length === 1 && parts[0]?.isHole === false) return false;
    void this.readInParts(addresseeOf(request), plan, undefined, request.flags, offset, length);
    return true;
  }

  /** Read the parts of a read that are data, each into its chunk, and send all chunks together. */
  private async readInParts(
    to: Addressee,
    plan: ReadPlan,
    extents: Promise<void> | undefined,
    flags: number,
    offset: number,
    length: number,
  ): Promise<void> {
    // There is room for all of it. How much it takes is known when the extents are.
    this.host.pool.claim(this.account, length);
    this.inFlight++;
    this.inFlightBytes += length;
    if (extents !== undefined) {
      try {
        await extents;
      } catch (error) {
        // A device that cannot tell may still be able to read.
        this.failureOf(error, { flags, offset, length });
        plan.forget();
      }
    }
    const parts = plan.finish();
    if (extents !== undefined) {
      const isAllData = parts.length === 1 && parts[0]?.isHole === false;
      this.askInterval = isAllData ? Math.min(MAX_ASK_INTERVAL, 2 * this.askInterval + 1) : 0;
      this.readsNotToAsk = this.askInterval;
    }
    const bytes = sizeOfParts(parts, this.encoder);
    this.host.pool.unclaim(this.account, length);
    const block = this.replies.beginParts(bytes);
    const data = layParts(block.buffer, parts, to, this.encoder);
    const failure = await this.readParts(parts, data, flags);
    this.inFlight--;
    this.inFlightBytes -= length;
    if (failure === undefined) {
      this.bytesRead += length;
      this.replies.sendParts(block, bytes);
    } else {
      this.errors++;
      this.replies.dropParts(block);
      this.replies.error(to, failure);
    }
    this.scheduleSettle();
  }

  /** The first failure, by offset, or undefined. Returns when all reads have ended: their memory is theirs till then. */
  private async readParts(
    parts: readonly Part[],
    data: readonly Buffer[],
    flags: number,
  ): Promise<Failure | undefined> {
    const dataParts = parts.filter(({ isHole }) => !isHole);
    const results = await Promise.allSettled(
      data.map(async (into, index) => this.device.read(dataParts[index]?.offset ?? 0, into)),
    );
    const failed = results.findIndex(({ status }) => status === 'rejected');
    const result = results[failed];
    const part = dataParts[failed];
    if (result?.status !== 'rejected' || part === undefined) return undefined;
    const failure = this.failureOf(result.reason, { flags, offset: part.offset, length: part.length });
    // What lies before the part that failed was read.
    return { ...failure, offset: failure.offset ?? part.offset };
  }

  private beginBlockStatus(): void {
    const { request, account } = this;
    const { flags, offset, length } = request;
    const { pool } = this.host;
    const contexts = wantedContexts(request, this.rules.negotiated.metaContexts);
    let memory = blockStatusMemory(length, contexts.length);
    let most = MAX_REPLY_EXTENTS;
    let own: Block | undefined;
    if (!pool.hasRoom(account, memory)) {
      own = pool.takeOwn(account);
      most = OWN_REPLY_EXTENTS;
      memory = 0;
    }
    pool.claim(account, memory);
    this.inFlight++;
    this.inFlightBytes += memory;
    const isReqOne = (flags & CMD_FLAG.REQ_ONE) !== 0;
    const status = new StatusReply(offset, length, contexts.length, isReqOne, most);
    new StatusRequest(this, addresseeOf(request), request, contexts, status, memory, own).goOn();
  }

  /** For StatusRequest only: ask for the contexts from `asked.next` on, as long as it is its turn. */
  askContexts(asked: StatusRequest): void {
    const { device, extendedHeaders, loopUser } = this;
    const { loop } = this.host;
    const { contexts, status, offset } = asked;
    const { wideContexts } = this.rules.geometry;
    let failure: Failure | undefined;
    try {
      for (let { collector } = asked; asked.next < contexts.length; collector = undefined) {
        if (collector === undefined) {
          if (asked.next > 0 && loop.mustYield(loopUser, UNITS_PER_LOOK)) {
            loop.enqueue(asked);
            return;
          }
          const { name } = contexts[asked.next] as SelectedContext;
          collector = status.next(name, extendedHeaders && isWideContext(name, wideContexts));
          const answer = device.extents(name, offset, status.length, collector.sink);
          if (answer !== undefined && isPromise(answer)) {
            asked.collector = collector;
            answer.then(asked.goOn, asked.fail);
            return;
          }
        }
        asked.collector = undefined;
        status.add(collector);
        asked.next++;
      }
    } catch (error) {
      failure = this.failureOf(error, asked);
    } finally {
      loop.finish(loopUser);
    }
    this.finishedStatus(asked, failure);
  }

  /** For StatusRequest only. One chunk of extents for each context, all of the same length; or an error. */
  finishedStatus({ to, contexts, status, memory, own }: StatusRequest, failure: Failure | undefined): void {
    const { extendedHeaders } = this;
    this.inFlight--;
    this.inFlightBytes -= memory;
    // What was claimed covers the reply.
    this.host.pool.unclaim(this.account, memory);
    if (own !== undefined) this.host.pool.give(own);
    if (failure === undefined) {
      status.collectors.forEach((collector, index) => {
        const done = index === contexts.length - 1 ? REPLY_FLAG_DONE : 0;
        const size = collector.payloadSize(extendedHeaders);
        const payload = this.replies.chunk(done, statusChunkType(extendedHeaders), to, size);
        collector.writePayload(payload, contexts[index]?.id ?? 0, extendedHeaders);
      });
    } else {
      this.errors++;
      this.replies.error(to, failure);
    }
    status.release();
    this.scheduleSettle();
  }

  /** The device answers the current request later. */
  private wait(answer: Promise<void>, block: Block | undefined): void {
    const { request } = this;
    const pending = this.spare.pop() ?? new PendingRequest(this);
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
      const place = this.replies.detachRead();
      pending.block = place.block;
      pending.at = place.at;
    }
    this.inFlight++;
    if (holdsMemory(request.type)) this.inFlightBytes += request.length;
    answer.then(pending.succeed, pending.fail);
  }

  /** For PendingRequest only: the device has answered. */
  finished(pending: PendingRequest, failure: Failure | undefined): void {
    const { block } = pending;
    pending.block = undefined;
    this.inFlight--;
    if (holdsMemory(pending.type)) this.inFlightBytes -= pending.length;
    const { cookieHigh, cookieLow, offset, length } = pending;
    if (failure !== undefined) this.errors++;
    if (pending.type === CMD.READ) {
      if (block === undefined) throw new Error('transmission: a read without memory');
      if (failure === undefined) {
        this.bytesRead += length;
        this.replies.completeRead(block, pending.at, cookieHigh, cookieLow, offset, length);
      } else {
        this.replies.abandonRead(block, pending, failure);
      }
    } else {
      if (block !== undefined) this.unpin(block);
      if (failure === undefined) {
        if (pending.type === CMD.WRITE) this.bytesWritten += length;
        this.succeed(pending);
      } else {
        this.replies.error(pending, failure);
      }
    }
    this.spare.push(pending);
    this.scheduleSettle();
  }

  /** What to tell of what a device threw. What is not a DeviceError is a bug of the device: reported, its text kept. */
  failureOf(
    error: unknown,
    asked: { readonly flags: number; readonly offset: number; readonly length: number },
  ): Failure {
    if (!(error instanceof DeviceError)) {
      this.host.observer.onDeviceError?.(error, { id: this.host.id, exportName: this.host.exportName });
      return { errno: NBD_ERRNO.EIO, message: 'internal error of the export' };
    }
    const { code, message } = error;
    // "The server SHOULD NOT return ENOTSUP except … when FAST_ZERO is supported"; "MUST NOT" without the flag.
    const isUnexpected = code === 'ENOTSUP' && (asked.flags & CMD_FLAG.FAST_ZERO) === 0;
    // "an offset, which MUST lie within the original offset and length of the request"
    const at = error.offset;
    const isInside = at !== undefined && at >= asked.offset && at - asked.offset < asked.length;
    return { errno: isUnexpected ? NBD_ERRNO.EINVAL : NBD_ERRNO[code], message, offset: isInside ? at : undefined };
  }

  private unpin(block: Block): void {
    block.pins--;
    if (block.pins === 0) this.host.pool.give(block);
    else if (this.isStarved && block === this.ownReceive && block.pins === 1) {
      this.isStarved = false;
      if (this.held === undefined && !this.isDeaf) this.host.socket.resume();
    }
  }

  private succeed({ cookieHigh, cookieLow, offsetHigh, offsetLow }: Addressee): void {
    this.replies.done(cookieHigh, cookieLow, offsetHigh, offsetLow);
  }

  private refuse(refusal: Refusal): void {
    this.errors++;
    this.replies.error(this.request, refusal);
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

  /** Go on with held input if there is room again, and memory, and time. */
  private resume(): void {
    if (this.held === undefined || this.isDeaf || this.isQueued) return;
    // There was room when the request that is short of memory was decoded. It may not wait with that set aside for it.
    if (!this.isShortOfMemory) {
      const isBacklogged = this.replies.unsentBytes > this.host.limits.maxUnsentBytes * RESUME_BELOW;
      if ((isBacklogged && !this.isRefusing) || this.isSaturated()) return;
    }
    if (this.host.loop.isSpent) {
      this.queue();
      return;
    }
    if (this.isShortOfMemory && !this.beginWaiting()) return;
    const { held, heldBlock } = this;
    // What has just begun may have ended the connection.
    if (held === undefined) return;
    this.held = undefined;
    this.heldBlock = undefined;
    this.parsedBlock = heldBlock;
    this.parse(held);
    this.parsedBlock = undefined;
    if (heldBlock !== undefined) this.unpin(heldBlock);
    this.replies.flush();
    if (this.held === undefined && !this.isDeaf && !this.isStarved) this.host.socket.resume();
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

  private report(refusal: Refusal | undefined): void {
    const { type, flags, offset, length } = this.request;
    this.host.observer.onRequest?.({ id: this.host.id, type, flags, offset, length, refusedWith: refusal?.errno ?? 0 });
  }
}

/** How much work the request is whose header lies in `chunk` from `at` on, for LoopShare.mustYield. */
function unitsOf(chunk: Buffer, at: number, headerSize: number): number {
  // The low byte of the type. What is neither read nor written may be about a whole disk.
  if ((chunk[at + 7] as number) > CMD.WRITE) return UNITS_PER_LOOK;
  // The length in steps of 64 KiB: bytes of its low half.
  const length = at + headerSize - 4;
  return 1 + (((chunk[length] as number) << 8) | (chunk[length + 1] as number));
}

/** A copy that stays when the next request is decoded. */
function addresseeOf({ cookieHigh, cookieLow, offsetHigh, offsetLow }: Addressee): Addressee {
  return { cookieHigh, cookieLow, offsetHigh, offsetLow };
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
