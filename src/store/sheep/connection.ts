/**
 * One TCP connection to a node: requests are pipelined, answers are matched by id in whatever order they come, payloads
 * go straight into the buffers of those who asked. Owns ids, framing and deadlines; it never repeats a request and
 * knows nothing of what results mean.
 */
import net from 'node:net';
import { DATA_LENGTH_OFFSET, ID_OFFSET, PAYLOAD_OFFSET_OFFSET, RESULT_OFFSET } from './layouts.js';
import { HEADER_BYTES, Opcode } from './protocol.js';

const CONNECT_TIMEOUT_MS = 5_000;
const KEEP_ALIVE_MS = 10_000;
const DEADLINE_CHECK_MS = 250;
/** A read of a whole VDI bitmap is the largest answer; more than this is no Sheepdog node. */
const MAX_PAYLOAD_BYTES = 128 * 2 ** 20;
const MAX_ID = 0xffff_ffff;

export interface NodeAddress {
  readonly host: string;
  readonly port: number;
}

export function addressLabel({ host, port }: NodeAddress): string {
  return host.includes(':') ? `[${host}]:${port}` : `${host}:${port}`;
}

export interface WireRequest {
  /** HEADER_BYTES; the id is filled in here. */
  readonly header: Buffer;
  /** Follows the header. It must stay as it is until the answer is there. */
  readonly data?: Buffer;
  /** Where the answer's payload goes; what the node leaves out of it is zeros. */
  readonly receive?: Buffer;
}

export interface Answer {
  readonly result: number;
  /** Payload bytes that came. */
  readonly length: number;
  /** The response's header. */
  readonly header: Buffer;
}

/** The connection is gone; whether the node has acted on the request is not known. */
export class ConnectionLost extends Error {
  constructor(message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = 'ConnectionLost';
  }
}

interface Pending {
  readonly request: WireRequest;
  readonly deadline: number;
  readonly resolve: (answer: Answer) => void;
  readonly reject: (error: Error) => void;
}

export class NodeConnection {
  readonly #socket: net.Socket;
  readonly #label: string;
  readonly #onClose: () => void;
  readonly #pending = new Map<number, Pending>();
  #lastId = 0;
  #lost: ConnectionLost | undefined;
  #timer: NodeJS.Timeout | undefined;
  #header = Buffer.allocUnsafe(HEADER_BYTES);
  #headerFilled = 0;
  /** The answer whose payload is being received. */
  #receiving: Pending | undefined;
  #payloadLength = 0;
  #payloadOffset = 0;
  #payloadDone = 0;

  private constructor(socket: net.Socket, label: string, onClose: () => void) {
    this.#socket = socket;
    this.#label = label;
    this.#onClose = onClose;
    socket.on('data', (chunk) => this.#take(chunk));
    socket.on('error', (error) => this.#lose(new ConnectionLost(`${label}: ${error.message}`, { cause: error })));
    socket.on('close', () => this.#lose(new ConnectionLost(`${label} closed the connection`)));
  }

  /** `onClose` is called once when the connection is gone. Errors: ConnectionLost. */
  static connect(address: NodeAddress, onClose: () => void): Promise<NodeConnection> {
    const label = addressLabel(address);
    return new Promise((resolve, reject) => {
      const socket = net.connect({ host: address.host, port: address.port, noDelay: true });
      const fail = (error: Error): void => {
        socket.destroy();
        reject(new ConnectionLost(`cannot connect to ${label}: ${error.message}`, { cause: error }));
      };
      socket.setTimeout(CONNECT_TIMEOUT_MS, () => fail(new Error(`no answer within ${CONNECT_TIMEOUT_MS} ms`)));
      socket.once('error', fail);
      socket.once('connect', () => {
        socket.setTimeout(0);
        socket.removeListener('error', fail);
        socket.setKeepAlive(true, KEEP_ALIVE_MS);
        resolve(new NodeConnection(socket, label, onClose));
      });
    });
  }

  get isOpen(): boolean {
    return this.#lost === undefined;
  }

  get inFlight(): number {
    return this.#pending.size;
  }

  /**
   * Send and wait for the answer, whatever its result. An answer that is not there in time ends the connection: it is
   * the only way to be sure that a late one goes into nobody's buffer. Errors: ConnectionLost.
   */
  send(request: WireRequest, timeoutMs: number): Promise<Answer> {
    return new Promise((resolve, reject) => {
      if (this.#lost) {
        reject(this.#lost);
        return;
      }
      const id = this.#nextId();
      const { header, data } = request;
      header.writeUInt32LE(id, ID_OFFSET);
      this.#pending.set(id, { request, deadline: Date.now() + timeoutMs, resolve, reject });
      this.#timer ??= setInterval(() => this.#checkDeadlines(), DEADLINE_CHECK_MS).unref();
      if (data !== undefined && data.length > 0) {
        this.#socket.cork();
        this.#socket.write(header);
        this.#socket.write(data);
        this.#socket.uncork();
      } else {
        this.#socket.write(header);
      }
    });
  }

  /** End it; what is in flight fails. */
  destroy(): void {
    this.#lose(new ConnectionLost(`the connection to ${this.#label} was closed by us`));
  }

  #nextId(): number {
    do this.#lastId = this.#lastId === MAX_ID ? 1 : this.#lastId + 1;
    while (this.#pending.has(this.#lastId));
    return this.#lastId;
  }

  #checkDeadlines(): void {
    const now = Date.now();
    for (const { deadline } of this.#pending.values()) {
      if (now < deadline) continue;
      this.#lose(new ConnectionLost(`${this.#label} did not answer in time`));
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
    this.#socket.destroy();
    const pending = [...this.#pending.values()];
    this.#pending.clear();
    this.#receiving = undefined;
    this.#onClose();
    for (const { reject } of pending) reject(reason);
  }

  #take(chunk: Buffer): void {
    let at = 0;
    while (at < chunk.length && !this.#lost) {
      if (!this.#receiving) {
        const part = Math.min(HEADER_BYTES - this.#headerFilled, chunk.length - at);
        chunk.copy(this.#header, this.#headerFilled, at, at + part);
        this.#headerFilled += part;
        at += part;
        if (this.#headerFilled === HEADER_BYTES) this.#beginAnswer();
        continue;
      }
      const part = Math.min(this.#payloadLength - this.#payloadDone, chunk.length - at);
      const { receive } = this.#receiving.request;
      if (receive) chunk.copy(receive, this.#payloadOffset + this.#payloadDone, at, at + part);
      this.#payloadDone += part;
      at += part;
      if (this.#payloadDone === this.#payloadLength) this.#finishAnswer(this.#receiving);
    }
  }

  #beginAnswer(): void {
    const header = this.#header;
    const id = header.readUInt32LE(ID_OFFSET);
    const length = header.readUInt32LE(DATA_LENGTH_OFFSET);
    const pending = this.#pending.get(id);
    if (!pending || length > MAX_PAYLOAD_BYTES) {
      this.#lose(new ConnectionLost(`${this.#label} does not speak Sheepdog's protocol (an answer to nothing asked)`));
      return;
    }
    const receive = pending.request.receive;
    // Only answers to object reads say where their payload belongs; the field means something else in others.
    const offset = length > 0 && receive && length < receive.length ? this.#offsetOf(header, pending) : 0;
    if (receive && offset + length > receive.length) {
      this.#lose(new ConnectionLost(`${this.#label} answered ${length} bytes at ${offset}, more than was asked for`));
      return;
    }
    this.#receiving = pending;
    this.#payloadLength = length;
    this.#payloadOffset = offset;
    this.#payloadDone = 0;
    if (length === 0) this.#finishAnswer(pending);
  }

  #offsetOf(header: Buffer, pending: Pending): number {
    return pending.request.header[1] === Opcode.READ_OBJ ? Number(header.readBigUInt64LE(PAYLOAD_OFFSET_OFFSET)) : 0;
  }

  #finishAnswer(pending: Pending): void {
    const header = this.#header;
    this.#receiving = undefined;
    this.#headerFilled = 0;
    this.#header = Buffer.allocUnsafe(HEADER_BYTES);
    this.#pending.delete(header.readUInt32LE(ID_OFFSET));
    const { receive } = pending.request;
    if (receive && this.#payloadLength < receive.length) {
      receive.fill(0, 0, this.#payloadOffset);
      receive.fill(0, this.#payloadOffset + this.#payloadLength);
    }
    pending.resolve({ result: header.readUInt32LE(RESULT_OFFSET), length: this.#payloadLength, header });
  }
}
