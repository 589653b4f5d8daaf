/**
 * The control socket: HTTP with JSON, and `Upgrade: nbd`, which hands the connection to the NBD server. Owns the socket file, which
 * from its first moment only this user can use, and the lives of its connections. Decides nothing about VDIs: the routes
 * (vdi-routes.ts, daemon-routes.ts) call operations.
 */
import fs from 'node:fs';
import http from 'node:http';
import net from 'node:net';
import path from 'node:path';
import {
  MAX_CONTROL_CONNECTIONS,
  NBD_UPGRADE,
  REQUEST_TIMEOUT_MS,
  SESSION_HEADER,
} from '../../operations/control-protocol.js';
import { controlSocketOf, makeSocketDirectory } from '../../operations/default-paths.js';
import { socketAddress, type SocketAddress } from '../../operations/socket-address.js';
import { asOperationError, OperationError } from '../../operations/operations.js';
import { removeStaleSocket } from '../../operations/socket-state.js';
import { DAEMON_ROUTES } from './daemon-routes.js';
import { decodeSegments, readBody, urlOf } from './http-request.js';
import { answerError, answerList, answerValue } from './json-answer.js';
import type { ControlTarget, Route } from './route.js';
import { VDI_ROUTES } from './vdi-routes.js';

/** Only the daemon's user, and root, may send commands. */
const DEFAULT_CONTROL_MODE = 0o600;

export interface ControlServerOptions {
  /** What the routes call. */
  readonly target: ControlTarget;
  /** The name of the next upgraded connection. */
  readonly nextSession: () => string;
  /** Takes an upgraded connection over, `head` being what the client has sent already; resolves when it is over. */
  readonly serveNbd: (socket: net.Socket, head: Buffer, session: string) => Promise<void>;
  /** At the same time, upgraded ones as well; MAX_CONTROL_CONNECTIONS if not given. */
  readonly maxConnections?: number;
  /** Whether the store has a link to a socket that is outside it. */
  readonly isFoundFromStore: boolean;
  /** Permissions of the socket; by default DEFAULT_CONTROL_MODE. */
  readonly mode?: number;
  /** Called with faults of ours, which the client only sees as INTERNAL. */
  readonly onFault: (error: unknown, request: string) => void;
}

const ROUTES: readonly Route[] = [...DAEMON_ROUTES, ...VDI_ROUTES];

/** How late an incomplete request may be noticed after its time-out; Node's default is 30 s. */
const TIMEOUT_CHECK_MS = 2_000;

export class ControlServer {
  readonly path: string;
  readonly #options: ControlServerOptions;
  readonly #http: http.Server;
  /** Connections without a request so far; Node counts them as busy. */
  readonly #silent = new Set<net.Socket>();
  #address: SocketAddress | undefined;
  #link: string | undefined;

  constructor(socketPath: string, options: ControlServerOptions) {
    this.path = path.resolve(socketPath);
    this.#options = options;
    this.#http = http.createServer(
      {
        requestTimeout: REQUEST_TIMEOUT_MS,
        headersTimeout: REQUEST_TIMEOUT_MS,
        connectionsCheckingInterval: TIMEOUT_CHECK_MS,
        keepAlive: false,
      },
      (request, response) => {
        this.#silent.delete(request.socket);
        this.#serve(request, response).catch((error: unknown) => {
          this.#options.onFault(error, 'answering');
          response.destroy();
        });
      },
    );
    this.#http.maxConnections = options.maxConnections ?? MAX_CONTROL_CONNECTIONS;
    // An error always has a listener; errors of listening reach the caller of listen().
    this.#http.on('error', () => undefined);
    this.#http.on('connection', (socket) => {
      this.#silent.add(socket);
      socket.once('close', () => this.#silent.delete(socket));
    });
    this.#http.on('upgrade', (request, socket, head) => {
      // Node's type allows for other streams; a server that listens by itself has none.
      if (socket instanceof net.Socket) this.#upgrade(request, socket, head);
      else socket.destroy();
    });
  }

  /**
   * Listen, replacing a socket that a dead daemon left behind. If the socket is outside the store, the store gets a link to it, so
   * that commands find it from the store. Errors: IN_USE, PERMISSION, IO.
   */
  async listen(): Promise<void> {
    makeSocketDirectory(path.dirname(this.path));
    await removeStaleSocket(this.path);
    this.#address = socketAddress(this.path);
    const { path: address } = this.#address;
    await new Promise<void>((resolve, reject) => {
      this.#http.once('error', reject);
      // listen() calls bind(2) before it returns, so the file never has other permissions than these.
      const umask = process.umask(0o777 & ~(this.#options.mode ?? DEFAULT_CONTROL_MODE));
      try {
        this.#http.listen({ path: address }, () => resolve());
      } finally {
        process.umask(umask);
      }
    }).catch((error: unknown) => {
      throw new OperationError(
        'IO',
        `cannot listen on the control socket ${this.path}: ${(error as Error).message}; give --control PATH to have it elsewhere`,
      );
    });
    this.#http.on('error', (error) => this.#options.onFault(error, 'accepting a connection'));
    await this.#linkFromStore();
  }

  /** Take no more requests and finish those in flight; after `graceMs` they are cut off. */
  async close(graceMs: number): Promise<void> {
    const closed = new Promise<void>((resolve) => this.#http.close(() => resolve()));
    this.#http.closeIdleConnections();
    for (const socket of this.#silent) socket.destroy();
    const timer = setTimeout(() => this.#http.closeAllConnections(), graceMs);
    // Upgraded connections belong to the NBD server, which ends them before its own close() resolves.
    await closed;
    clearTimeout(timer);
    if (this.#link !== undefined) fs.rmSync(this.#link, { force: true });
    this.#address?.release();
  }

  async #linkFromStore(): Promise<void> {
    if (!this.#options.isFoundFromStore) return;
    const inStore = controlSocketOf(this.#options.target.operations.store);
    if (inStore === this.path || sameFile(inStore, this.path)) return;
    makeSocketDirectory(path.dirname(inStore));
    await removeStaleSocket(inStore);
    fs.symlinkSync(this.path, inStore);
    this.#link = inStore;
  }

  async #serve(request: http.IncomingMessage, response: http.ServerResponse): Promise<void> {
    const name = `${request.method} ${request.url}`;
    request.on('error', () => undefined);
    response.on('error', () => undefined);
    try {
      const { pathname, searchParams } = urlOf(request);
      const segments = decodeSegments(pathname);
      const route = ROUTES.find((each) => each.method === request.method && matches(each.path, segments));
      if (!route) {
        throw new OperationError('NO_ROUTE', `the daemon does not know ${name}; is it an older version? restart it`);
      }
      const result = await route.answer({
        ...this.#options.target,
        names: segments.filter((_, i) => route.path[i] === '*'),
        query: searchParams,
        body: route.method === 'POST' ? await readBody(request) : {},
      });
      if (Array.isArray(result)) await answerList(response, result);
      else answerValue(response, result);
    } catch (error) {
      const expected = asOperationError(error);
      if (!expected) this.#options.onFault(error, name);
      answerError(
        response,
        expected ?? { code: 'INTERNAL', message: `the daemon failed: ${(error as Error).message}` },
      );
    }
  }

  #upgrade(request: http.IncomingMessage, socket: net.Socket, head: Buffer): void {
    this.#silent.delete(socket);
    // HTTP does not listen for its errors any more, and a client may leave at any time.
    socket.on('error', () => undefined);
    if (request.headers.upgrade?.toLowerCase() !== NBD_UPGRADE) {
      // The socket is not read, so its end would not be seen: it is closed as soon as the answer has left.
      socket.end('HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n', () => socket.destroy());
      return;
    }
    const session = this.#options.nextSession();
    socket.write(
      `HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: ${NBD_UPGRADE}\r\n` +
        `${SESSION_HEADER}: ${session}\r\n\r\n`,
    );
    socket.setTimeout(0);
    this.#options
      .serveNbd(socket, head, session)
      .catch((error: unknown) => this.#options.onFault(error, 'serving NBD'));
  }
}

function matches(pattern: readonly string[], segments: readonly string[]): boolean {
  return pattern.length === segments.length && pattern.every((each, i) => each === '*' || each === segments[i]);
}

function sameFile(a: string, b: string): boolean {
  try {
    return fs.realpathSync(a) === fs.realpathSync(b);
  } catch {
    return false;
  }
}
