/**
 * The client's end of the control socket: one HTTP request per call, and connections upgraded to NBD. Turns error answers back into
 * the OperationErrors that they were. Keeps no state between calls, and sends nothing before it has checked who listens
 * (socket-trust.ts).
 */
import http from 'node:http';
import net from 'node:net';
import {
  ANSWER_TIMEOUT_MS,
  CONNECT_TIMEOUT_MS,
  MAX_ANSWER_BYTES,
  NBD_UPGRADE,
  SESSION_HEADER,
  type ErrorAnswer,
  type StatusAnswer,
} from './control-protocol.js';
import { OperationError } from './operations.js';
import { socketAddress } from './socket-address.js';
import { peerUid } from '../system/socket-calls.js';
import { mustBeTrusted, trustedSocket } from './socket-trust.js';

export type Method = 'GET' | 'POST' | 'DELETE';

/** An upgraded connection. */
export interface NbdConnection {
  readonly socket: net.Socket;
  /** Bytes that arrived together with the answer. */
  readonly head: Buffer;
  /** The daemon's name for it, for GET /sessions/ID. */
  readonly session: string;
}

/** A path of the API from its segments, each percent-encoded. */
export function pathOf(...segments: string[]): string {
  return `/${segments.map(encodeURIComponent).join('/')}`;
}

export class ControlClient {
  readonly path: string;

  constructor(socketPath: string) {
    this.path = socketPath;
  }

  status(): Promise<StatusAnswer> {
    return this.call<StatusAnswer>('GET', '/status', { timeoutMs: CONNECT_TIMEOUT_MS });
  }

  /** Errors: the daemon's, UNREACHABLE, UNTRUSTED. */
  async call<T>(method: Method, path: string, options: { body?: object; timeoutMs?: number } = {}): Promise<T> {
    const body = options.body && Buffer.from(JSON.stringify(options.body));
    const request = await this.#request(method, path, {
      timeoutMs: options.timeoutMs ?? ANSWER_TIMEOUT_MS,
      headers: body ? { 'content-type': 'application/json', 'content-length': body.length } : {},
    });
    const response = await new Promise<http.IncomingMessage>((resolve, reject) => {
      request.once('response', resolve);
      request.on('error', (error) => reject(this.#unreachable(error)));
      request.end(body);
    });
    const text = await this.#readAll(response);
    let answer: unknown;
    try {
      answer = JSON.parse(text);
    } catch {
      throw new OperationError(
        'UNREACHABLE',
        `what listens on ${this.path} is not a sheepgate daemon: its answer is not JSON`,
      );
    }
    if (response.statusCode === 200) return answer as T;
    throw errorOf(answer, this.path);
  }

  /** A connection that speaks NBD from here on. Errors: UNREACHABLE, UNTRUSTED. */
  async upgrade(): Promise<NbdConnection> {
    const request = await this.#request('GET', '/nbd', {
      timeoutMs: CONNECT_TIMEOUT_MS,
      headers: { connection: 'Upgrade', upgrade: NBD_UPGRADE },
    });
    return new Promise((resolve, reject) => {
      request.once('upgrade', (response, socket, head) => {
        // Until the NBD client listens.
        socket.on('error', () => undefined);
        socket.setTimeout(0);
        resolve({ socket: socket, head, session: String(response.headers[SESSION_HEADER] ?? '') });
      });
      request.once('response', (response) => {
        response.resume();
        reject(
          new OperationError('UNREACHABLE', `the daemon on ${this.path} refuses NBD here (${response.statusCode})`),
        );
      });
      request.on('error', (error) => reject(this.#unreachable(error)));
      request.end();
    });
  }

  async #request(
    method: Method,
    path: string,
    options: { readonly timeoutMs: number; readonly headers: http.OutgoingHttpHeaders },
  ): Promise<http.ClientRequest> {
    const socket = await this.#connect();
    const request = http.request({
      createConnection: () => socket,
      method,
      path,
      headers: { host: 'control', ...options.headers },
      timeout: options.timeoutMs,
    });
    socket.setTimeout(options.timeoutMs);
    request.once('timeout', () => request.destroy(new Error(`no answer within ${options.timeoutMs / 1000} s`)));
    return request;
  }

  /** A connection to a trusted daemon; nothing was sent yet. Errors: UNREACHABLE, UNTRUSTED. */
  async #connect(): Promise<net.Socket> {
    let address;
    try {
      const trusted = trustedSocket(this.path);
      address = socketAddress(trusted.path);
      const socket = net.connect({ path: address.path });
      // Until the request listens, and after it has ended.
      socket.on('error', () => undefined);
      await new Promise<void>((resolve, reject) => {
        socket.once('connect', resolve);
        socket.once('error', reject);
      });
      try {
        mustBeTrusted(trusted, peerUid(socket));
      } catch (error) {
        socket.destroy();
        throw error;
      }
      return socket;
    } catch (error) {
      throw error instanceof OperationError ? error : this.#unreachable(error as Error);
    } finally {
      address?.release();
    }
  }

  async #readAll(response: http.IncomingMessage): Promise<string> {
    const chunks: Buffer[] = [];
    let length = 0;
    try {
      for await (const chunk of response as AsyncIterable<Buffer>) {
        length += chunk.length;
        if (length > MAX_ANSWER_BYTES) throw new Error(`an answer of more than ${MAX_ANSWER_BYTES} bytes`);
        chunks.push(chunk);
      }
    } catch (error) {
      throw this.#unreachable(error as Error);
    }
    return Buffer.concat(chunks).toString();
  }

  #unreachable(error: NodeJS.ErrnoException): OperationError {
    if (error.code === 'ECONNRESET') {
      return new OperationError(
        'UNREACHABLE',
        `the daemon on ${this.path} ended before it answered: it is not known whether the request was carried out`,
        { cause: error },
      );
    }
    return new OperationError('UNREACHABLE', `no answer from the daemon on ${this.path}: ${error.message}`, {
      cause: error,
    });
  }
}

function errorOf(answer: unknown, where: string): OperationError {
  const error = (answer as Partial<ErrorAnswer> | null)?.error;
  if (typeof error?.code !== 'string' || typeof error.message !== 'string') {
    return new OperationError(
      'UNREACHABLE',
      `what listens on ${where} is not a sheepgate daemon: its error has another form`,
    );
  }
  return new OperationError(error.code, error.message);
}
