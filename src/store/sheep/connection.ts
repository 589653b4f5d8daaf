/**
 * One TCP connection to a node: requests are pipelined, answers are matched by id in any order, payloads are received into the
 * callers' buffers. Owns ids, framing and deadlines. Never repeats a request, and does not interpret results.
 *
 * Requests made in one turn of the event loop leave in one write. Input is received into one buffer that is reused, and most of a
 * large payload directly into the buffer it is for: a new buffer for every 64 KiB, as sockets do by default, keeps the garbage
 * collector busy.
 */
import net from 'node:net';
import { addressLabel, type NodeAddress } from './cluster-address.js';
import {
  opcodeOf,
  responseEpoch,
  responseId,
  responseLength,
  responsePayloadOffset,
  responseResult,
  setId,
} from '../../sheepdog/headers.js';
import { HEADER_BYTES, OBJECT_OPCODES, Opcode } from '../../sheepdog/protocol.js';

export const CONNECT_TIMEOUT_MS = 5_000;
const KEEP_ALIVE_MS = 10_000;
const DEADLINE_CHECK_MS = 250;
/** The largest answer is a whole VDI bitmap; a larger payload does not come from a Sheepdog node. */
const MAX_PAYLOAD_BYTES = 128 * 2 ** 20;
const MAX_ID = 0xffff_ffff;
/** Most bytes of one receive: several answers of a few KiB, or what a socket holds of a large answer. */
const RECEIVE_BYTES = 256 * 1024;
/** The same while a large answer is awaited: payload that arrives with its header must be copied. */
const RECEIVE_BEFORE_LARGE_BYTES = 8 * 1024;
/** The rest of a payload is received in place if at least this much is missing. */
const IN_PLACE_BYTES = 32 * 1024;
/** Data up to this size is gathered with other requests; larger data is sent from the caller's buffer. */
const GATHER_BYTES = 8 * 1024;
const SEND_SLAB_BYTES = 64 * 1024;
/** Slabs kept for the next turn. */
const KEPT_SLABS = 8;

export interface WireRequest {
  /** HEADER_BYTES; the id is filled in here. */
  readonly header: Buffer;
  /** Follows the header. Must not change until the answer has arrived. */
  readonly data?: Buffer;
  /** Where the answer's payload goes; bytes that the node leaves out become zeros. */
  readonly receive?: Buffer;
}

export interface Answer {
  readonly result: number;
  /** The epoch of the node when it answered: the number of the latest change of members that it knew. */
  readonly epoch: number;
  /** Payload bytes that arrived. */
  readonly length: number;
  /** The response's header; empty for requests on objects. */
  readonly header: Buffer;
}

/** The connection is gone; whether the node has carried out the request is not known. */
export class ConnectionLost extends Error {
  constructor(message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = 'ConnectionLost';
  }
}

/** The answer does not come from a Sheepdog node. */
export class NotSheepdog extends ConnectionLost {}

/** The node did not answer in time. Unlike after other losses it may carry out the request much later. */
export class NoAnswer extends ConnectionLost {
  /** `remote`: the address that `address` was resolved to. */
  constructor(
    readonly address: NodeAddress,
    readonly remote: NodeAddress,
  ) {
    super(`${addressLabel(address)} did not answer in time`);
    this.name = 'NoAnswer';
  }
}

interface Pending {
  readonly request: WireRequest;
  /** By performance.now(), as all deadlines: setting the clock does not move them. */
  readonly sentAt: number;
  readonly deadline: number;
  readonly resolve: (answer: Answer) => void;
  readonly reject: (error: Error) => void;
}

const NO_HEADER = Buffer.alloc(0);
const NO_ANSWER: Answer = { result: 0, epoch: 0, length: 0, header: NO_HEADER };

/** What all connections to one node share about it. */
export interface Peer {
  /** Of its latest answer; 0 before the first one. */
  epoch: number;
  /** It has the vids in use of the other nodes. */
  knowsVids: boolean;
}

export class NodeConnection {
  readonly #address: NodeAddress;
  readonly #label: string;
  readonly #onClose: () => void;
  readonly #pending = new Map<number, Pending>();
  #onEpoch: ((epoch: number) => void) | undefined;
  #peer: Peer = { epoch: 0, knowsVids: false };
  /** Of the latest answer; 0 before the first one. */
  #epoch = 0;
  #socket: net.Socket | undefined;
  #remote: NodeAddress | undefined;
  #lastId = 0;
  /** Counts of requests sent and of answers. */
  sent = 0;
  answers = 0;
  #lost: ConnectionLost | undefined;
  #timer: NodeJS.Timeout | undefined;
  /** The socket receives into `#scratch`, or (`#isInPlace`) into the rest of the payload that is being received. */
  readonly #scratch = Buffer.allocUnsafeSlow(RECEIVE_BYTES);
  readonly #startOfScratch = this.#scratch.subarray(0, RECEIVE_BEFORE_LARGE_BYTES);
  #isInPlace = false;
  /** Requests whose answers are to be received in place. */
  #largeAwaited = 0;
  readonly #header = Buffer.allocUnsafeSlow(HEADER_BYTES);
  #headerFilled = 0;
  /** The answer whose payload is being received. */
  #receiving: Pending | undefined;
  #receivingId = 0;
  #answer: Answer = NO_ANSWER;
  #payloadOffset = 0;
  #payloadDone = 0;
  /** Requests of this turn. */
  #slab: Buffer | undefined;
  #slabUsed = 0;
  #isSendScheduled = false;
  readonly #spareSlabs: Buffer[] = [];
  readonly #slabsLeaving: Buffer[] = [];

  private constructor(address: NodeAddress, label: string, onClose: () => void) {
    this.#address = address;
    this.#label = label;
    this.#onClose = onClose;
  }

  /** `onClose` is called once when the connection is gone. Errors: ConnectionLost. */
  static connect(address: NodeAddress, onClose: () => void, timeoutMs = CONNECT_TIMEOUT_MS): Promise<NodeConnection> {
    const label = addressLabel(address);
    return new Promise((resolve, reject) => {
      const connection = new NodeConnection(address, label, onClose);
      const socket = net.connect({
        host: address.host,
        port: address.port,
        noDelay: true,
        onread: {
          buffer: () => connection.#nextBuffer(),
          callback: (length, bytes) => connection.#received(length, bytes),
        },
      });
      const fail = (error: Error): void => {
        socket.destroy();
        reject(new ConnectionLost(`cannot connect to ${label}: ${error.message}`, { cause: error }));
      };
      socket.setTimeout(timeoutMs, () => fail(new Error(`no answer within ${Math.round(timeoutMs)} ms`)));
      socket.once('error', fail);
      socket.once('connect', () => {
        socket.setTimeout(0);
        socket.removeListener('error', fail);
        socket.setKeepAlive(true, KEEP_ALIVE_MS);
        connection.#attach(socket);
        resolve(connection);
      });
    });
  }

  #attach(socket: net.Socket): void {
    this.#socket = socket;
    const { port } = this.#address;
    this.#remote = { host: socket.remoteAddress ?? this.#address.host, port };
    const label = this.#label;
    socket.on('error', (error) => this.#lose(new ConnectionLost(`${label}: ${error.message}`, { cause: error })));
    socket.on('end', () => this.#lose(new ConnectionLost(`${label} closed the connection`)));
    socket.on('close', () => this.#lose(new ConnectionLost(`${label} closed the connection`)));
  }

  /** As given to connect. */
  get address(): NodeAddress {
    return this.#address;
  }

  get inFlight(): number {
    return this.#pending.size;
  }

  /** Unanswered requests that were sent up to `time`, by performance.now(). */
  *unansweredSince(time: number): Generator<{ readonly request: WireRequest; readonly sentAt: number }> {
    // A Map keeps the order in which they were sent.
    for (const pending of this.#pending.values()) {
      if (pending.sentAt > time) return;
      yield pending;
    }
  }

  /**
   * `onEpoch` is called when the epoch in answers changes, and now if there was an answer. `peer`, which all connections to the
   * node share, is updated first.
   */
  watchEpoch(peer: Peer, onEpoch: (epoch: number) => void): void {
    this.#peer = peer;
    this.#onEpoch = onEpoch;
    if (this.#epoch === 0) return;
    peer.epoch = this.#epoch;
    onEpoch(this.#epoch);
  }

  get peer(): Peer {
    return this.#peer;
  }

  /**
   * Sends the request and waits for the answer, whatever its result. If the answer is late, the connection is closed: only then
   * can a late answer not be received into a buffer that has another use meanwhile. Errors: ConnectionLost.
   */
  send(request: WireRequest, timeoutMs: number): Promise<Answer> {
    return new Promise((resolve, reject) => {
      if (this.#lost) {
        reject(this.#lost);
        return;
      }
      const id = this.#nextId();
      setId(request.header, id);
      const sentAt = performance.now();
      this.#pending.set(id, { request, sentAt, deadline: sentAt + timeoutMs, resolve, reject });
      this.sent++;
      if (isLarge(request)) this.#largeAwaited++;
      this.#timer ??= setInterval(() => this.#checkDeadlines(), DEADLINE_CHECK_MS).unref();
      this.#gather(request);
    });
  }

  #gather({ header, data }: WireRequest): void {
    const length = data?.length ?? 0;
    const isGathered = length <= GATHER_BYTES;
    const needed = HEADER_BYTES + (isGathered ? length : 0);
    if (this.#slab && this.#slabUsed + needed > SEND_SLAB_BYTES) this.#sendSlab();
    const slab = (this.#slab ??= this.#spareSlabs.pop() ?? Buffer.allocUnsafeSlow(SEND_SLAB_BYTES));
    header.copy(slab, this.#slabUsed);
    this.#slabUsed += HEADER_BYTES;
    if (data && isGathered) {
      data.copy(slab, this.#slabUsed);
      this.#slabUsed += length;
    }
    if (!this.#isSendScheduled) {
      this.#isSendScheduled = true;
      this.#socket?.cork();
      process.nextTick(this.#sendGathered);
    }
    if (data && !isGathered) {
      this.#sendSlab();
      this.#socket?.write(data);
    }
  }

  #sendSlab(): void {
    const slab = this.#slab;
    if (!slab) return;
    this.#slab = undefined;
    this.#slabsLeaving.push(slab);
    this.#socket?.write(slab.subarray(0, this.#slabUsed), this.#slabHasLeft);
    this.#slabUsed = 0;
  }

  readonly #sendGathered = (): void => {
    this.#isSendScheduled = false;
    this.#sendSlab();
    this.#socket?.uncork();
  };

  readonly #slabHasLeft = (): void => {
    const slab = this.#slabsLeaving.shift();
    if (slab && this.#spareSlabs.length < KEPT_SLABS) this.#spareSlabs.push(slab);
  };

  /** The node does not answer: the same as a late answer. */
  giveUp(): void {
    this.#lose(new NoAnswer(this.#address, this.#remote ?? this.#address));
  }

  /** Closes it; requests in flight fail. */
  destroy(): void {
    this.#lose(new ConnectionLost(`the connection to ${this.#label} was closed by us`));
  }

  #nextId(): number {
    do this.#lastId = this.#lastId === MAX_ID ? 1 : this.#lastId + 1;
    while (this.#pending.has(this.#lastId));
    return this.#lastId;
  }

  #checkDeadlines(): void {
    const now = performance.now();
    for (const { deadline } of this.#pending.values()) {
      if (now < deadline) continue;
      this.giveUp();
      return;
    }
    if (this.#pending.size === 0) {
      clearInterval(this.#timer);
      this.#timer = undefined;
    }
  }

  #lose(reason: ConnectionLost): void {
    if (this.#lost) return;
    this.#lost = reason;
    clearInterval(this.#timer);
    // Reset, not closed: the node must not read requests that it has not read yet.
    if (reason instanceof NoAnswer) this.#socket?.resetAndDestroy();
    else this.#socket?.destroy();
    const pending = [...this.#pending.values()];
    this.#pending.clear();
    this.#receiving = undefined;
    this.#onClose();
    for (const { reject } of pending) reject(reason);
  }

  /** Where the next bytes go. */
  #nextBuffer(): Buffer {
    const receive = this.#receiving?.request.receive;
    const missing = this.#answer.length - this.#payloadDone;
    this.#isInPlace = receive !== undefined && missing >= IN_PLACE_BYTES;
    if (!receive || !this.#isInPlace) return this.#largeAwaited > 0 ? this.#startOfScratch : this.#scratch;
    const from = this.#payloadOffset + this.#payloadDone;
    return receive.subarray(from, from + missing);
  }

  #received(length: number, bytes: Uint8Array): boolean {
    if (this.#lost) return false;
    if (this.#isInPlace && this.#receiving) {
      this.#payloadDone += length;
      if (this.#payloadDone === this.#answer.length) this.#finishAnswer(this.#receiving);
    } else {
      this.#take(Buffer.from(bytes.buffer, bytes.byteOffset, length));
    }
    return true;
  }

  #take(chunk: Buffer): void {
    let at = 0;
    while (at < chunk.length && !this.#lost) {
      if (!this.#receiving) {
        if (this.#headerFilled === 0 && chunk.length - at >= HEADER_BYTES) {
          this.#beginAnswer(chunk, at);
          at += HEADER_BYTES;
          continue;
        }
        const part = Math.min(HEADER_BYTES - this.#headerFilled, chunk.length - at);
        chunk.copy(this.#header, this.#headerFilled, at, at + part);
        this.#headerFilled += part;
        at += part;
        if (this.#headerFilled < HEADER_BYTES) return;
        this.#headerFilled = 0;
        this.#beginAnswer(this.#header, 0);
        continue;
      }
      const part = Math.min(this.#answer.length - this.#payloadDone, chunk.length - at);
      const { receive } = this.#receiving.request;
      if (receive) chunk.copy(receive, this.#payloadOffset + this.#payloadDone, at, at + part);
      this.#payloadDone += part;
      at += part;
      if (this.#payloadDone === this.#answer.length) this.#finishAnswer(this.#receiving);
    }
  }

  /** A header has arrived; it is in `bytes` at `at`. */
  #beginAnswer(bytes: Buffer, at: number): void {
    const id = responseId(bytes, at);
    const length = responseLength(bytes, at);
    const pending = this.#pending.get(id);
    if (!pending || length > MAX_PAYLOAD_BYTES) {
      this.#lose(new NotSheepdog(`${this.#label} does not speak Sheepdog's protocol (an answer without a request)`));
      return;
    }
    const epoch = responseEpoch(bytes, at);
    // For every answer: another connection may have set it meanwhile.
    this.#peer.epoch = epoch;
    if (epoch !== this.#epoch) {
      this.#epoch = epoch;
      this.#onEpoch?.(epoch);
    }
    const { receive, header: asked } = pending.request;
    const opcode = opcodeOf(asked);
    // Only answers to object reads have this field; in others the bytes mean something else.
    const saysWhere = length > 0 && receive && length < receive.length && opcode === Opcode.READ_OBJ;
    const offset = saysWhere ? responsePayloadOffset(bytes, at) : 0;
    if (receive && offset + length > receive.length) {
      this.#lose(new NotSheepdog(`${this.#label} answered ${length} bytes at ${offset}, more than was asked for`));
      return;
    }
    const isObject = OBJECT_OPCODES.has(opcode);
    const header = isObject ? NO_HEADER : Buffer.from(bytes.subarray(at, at + HEADER_BYTES));
    this.#answer = { result: responseResult(bytes, at), epoch, length, header };
    this.#receiving = pending;
    this.#receivingId = id;
    this.#payloadOffset = offset;
    this.#payloadDone = 0;
    if (length === 0) this.#finishAnswer(pending);
  }

  #finishAnswer(pending: Pending): void {
    const answer = this.#answer;
    this.#receiving = undefined;
    this.#answer = NO_ANSWER;
    this.#pending.delete(this.#receivingId);
    this.answers++;
    if (isLarge(pending.request)) this.#largeAwaited--;
    const { receive } = pending.request;
    if (receive && answer.length < receive.length) {
      receive.fill(0, 0, this.#payloadOffset);
      receive.fill(0, this.#payloadOffset + answer.length);
    }
    pending.resolve(answer);
  }
}

function isLarge({ receive }: WireRequest): boolean {
  return receive !== undefined && receive.length >= IN_PLACE_BYTES;
}
