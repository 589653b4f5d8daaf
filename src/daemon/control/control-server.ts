/**
 * The control socket: HTTP with JSON for the catalog, and `Upgrade: nbd`, which hands the connection to the NBD server.
 * Owns the socket file, which is this user's only from its first moment, and the checking of what comes in. Decides
 * nothing about VDIs: every route is one call of Operations.
 */
import fs from 'node:fs';
import http from 'node:http';
import net from 'node:net';
import path from 'node:path';
import {
  MAX_CONTROL_CONNECTIONS,
  MAX_KEEP_OUT_MS,
  MAX_REQUEST_BODY_BYTES,
  NBD_UPGRADE,
  SESSION_HEADER,
  REQUEST_TIMEOUT_MS,
  type Disconnected,
  type ErrorAnswer,
  type StatusAnswer,
} from '../../operations/control-protocol.js';
import type { DirectOperations } from '../../operations/direct-operations.js';
import { answerList } from './streamed-list.js';
import type { ReloadReport } from '../security/security.js';
import { FILLERS, type Redundancy } from '../../store/object-store.js';
import { parseRedundancy, REDUNDANCY_HELP } from '../../store/redundancy.js';
import { asOperationError, OperationError, type Beginning } from '../../operations/operations.js';
import {
  controlSocketOf,
  makeSocketDirectory,
  socketAddress,
  type SocketAddress,
} from '../../operations/default-paths.js';
import { removeStaleSocket } from '../../operations/socket-state.js';

/** Only the daemon's user, and root, may send commands. */
const DEFAULT_CONTROL_MODE = 0o600;

export interface ControlServerOptions {
  readonly operations: DirectOperations;
  readonly status: () => StatusAnswer;
  /** Reads TLS keys and access rules again. */
  readonly reload: () => Promise<ReloadReport>;
  /** Takes an upgraded connection over, `head` being what the client sent already; resolves when it is over and its export closed. */
  readonly serveNbd: (socket: net.Socket, head: Buffer, session: string) => Promise<void>;
  /** At the same time, upgraded ones as well; MAX_CONTROL_CONNECTIONS if not given. */
  readonly maxConnections?: number;
  /** Cut a connection of the NBD server off, and keep its client from writing the same disk for `keepOutMs`. Errors: NO_CLIENT. */
  readonly disconnect: (id: number, keepOutMs: number) => Promise<Disconnected>;
  /** Whether a socket that is elsewhere is linked to from the store. */
  readonly isFoundFromStore: boolean;
  /** Permissions of the socket; by default DEFAULT_CONTROL_MODE. */
  readonly mode?: number;
  /** Told of faults of ours, which the client only sees as INTERNAL. */
  readonly onFault: (error: unknown, request: string) => void;
}

type Body = Readonly<Record<string, unknown>>;

/** What a store has room for in the mark of an unfinished VDI. */
const MAX_RUN_DIGITS = 32;
const MAX_OF_DIGITS = 64;

/** How late after its time a request that does not come to its end may be noticed; Node's own choice is 30 s. */
const TIMEOUT_CHECK_MS = 2_000;

interface Call {
  readonly operations: DirectOperations;
  readonly status: () => StatusAnswer;
  readonly reload: () => Promise<ReloadReport>;
  readonly disconnect: ControlServerOptions['disconnect'];
  readonly sessions: ReadonlyMap<string, Promise<void>>;
  /** The decoded path segments that the route leaves open. */
  readonly names: readonly string[];
  readonly query: URLSearchParams;
  readonly body: Body;
}

interface Route {
  readonly method: 'GET' | 'POST' | 'DELETE';
  /** Segments; "*" stands for any one. */
  readonly path: readonly string[];
  readonly answer: (call: Call) => unknown;
}

const ROUTES: readonly Route[] = [
  { method: 'GET', path: ['status'], answer: ({ status }) => status() },
  { method: 'POST', path: ['reload'], answer: ({ reload }) => reload() },
  {
    method: 'GET',
    path: ['vdis'],
    answer: ({ operations, query }) => (query.get('details') === '1' ? operations.listDetails() : operations.list()),
  },
  { method: 'GET', path: ['damaged'], answer: ({ operations }) => operations.listDamaged() },
  {
    method: 'POST',
    path: ['vdis'],
    answer: ({ operations, body }) =>
      operations.create(text(body, 'name'), wholeNumber(body, 'size'), {
        blockSizeShift: optionalNumber(body, 'blockSizeShift'),
        redundancy: copiesIn(body),
        force: flag(body, 'force'),
      }),
  },
  { method: 'GET', path: ['vdis', '*'], answer: ({ operations, names }) => operations.show(first(names)) },
  {
    method: 'DELETE',
    path: ['vdis', '*'],
    answer: async ({ operations, names, query }) => {
      const options = { force: query.get('force') === '1', run: query.get('run') ?? undefined };
      const result = await operations.remove(first(names), options);
      return result.ended.length > 0 ? result : null;
    },
  },
  {
    method: 'GET',
    path: ['vdis', '*', 'changes'],
    answer: ({ operations, names, query }) =>
      operations.changes(first(names), query.get('since') ?? '', offsetIn(query)),
  },
  {
    method: 'POST',
    path: ['vdis', '*', 'resize'],
    answer: ({ operations, names, body }) =>
      operations.resize(first(names), wholeNumber(body, 'size'), {
        force: flag(body, 'force'),
        forceInUse: flag(body, 'forceInUse'),
        run: runIn(body),
      }),
  },
  {
    method: 'POST',
    path: ['vdis', '*', 'snapshots'],
    answer: ({ operations, names, body }) =>
      operations.snapshot(first(names), text(body, 'tag'), {
        takenAt: body.takenAt === undefined ? undefined : wholeNumber(body, 'takenAt'),
        force: flag(body, 'force'),
        run: runIn(body),
      }),
  },
  {
    method: 'POST',
    path: ['vdis', '*', 'begin'],
    answer: ({ operations, names, body }) => operations.begin(first(names), beginningIn(body)),
  },
  {
    method: 'POST',
    path: ['vdis', '*', 'finish'],
    answer: ({ operations, names, body }) => operations.finish(first(names), hex(body, 'run', MAX_RUN_DIGITS)),
  },
  {
    method: 'POST',
    path: ['vdis', '*', 'clone'],
    answer: ({ operations, names, body }) =>
      operations.clone(first(names), text(body, 'name'), { force: flag(body, 'force') }),
  },
  {
    method: 'POST',
    path: ['vdis', '*', 'rollback'],
    answer: ({ operations, names, body }) =>
      operations.rollback(first(names), { force: flag(body, 'force'), run: runIn(body) }),
  },
  { method: 'GET', path: ['locks'], answer: ({ operations }) => operations.locks() },
  {
    method: 'POST',
    path: ['vdis', '*', 'unlock'],
    answer: ({ operations, names, body }) =>
      operations.unlock(first(names), { heldBy: body.heldBy === undefined ? undefined : text(body, 'heldBy') }),
  },
  {
    method: 'GET',
    path: ['sessions', '*'],
    answer: async ({ sessions, names }) => {
      await sessions.get(first(names));
      return null;
    },
  },
  {
    method: 'POST',
    path: ['connections', '*', 'disconnect'],
    answer: ({ disconnect, names, body }) => disconnect(connectionId(first(names)), keepOutIn(body)),
  },
  { method: 'GET', path: ['exports', '*'], answer: ({ operations, names }) => operations.describe(first(names)) },
  {
    method: 'POST',
    path: ['check'],
    answer: ({ operations, body }) => operations.check({ repair: flag(body, 'repair') }),
  },
];

/** HTTP's status for a code; the client goes by the code, this is for people with curl. */
const STATUS_OF: Readonly<Record<string, number>> = {
  BAD_REQUEST: 400,
  BAD_NAME: 400,
  BAD_SIZE: 400,
  BAD_TIME: 400,
  READ_ONLY: 403,
  IS_SNAPSHOT: 400,
  NO_VDI: 404,
  NO_TAG: 404,
  UNKNOWN: 404,
  NO_ROUTE: 404,
  NO_CLIENT: 404,
  UNSUPPORTED: 400,
  NOT_LOCKED: 409,
  EXISTS: 409,
  UNFINISHED: 409,
  BUSY: 409,
  NEEDS_FORCE: 409,
  AMBIGUOUS: 409,
  ENDED: 410,
  NO_SPACE: 507,
};

export class ControlServer {
  readonly path: string;
  readonly #options: ControlServerOptions;
  readonly #http: http.Server;
  /** Upgraded connections that are not over. */
  readonly #sessions = new Map<string, Promise<void>>();
  /** Connections that have asked for nothing yet; Node counts them as busy. */
  readonly #silent = new Set<net.Socket>();
  #lastSession = 0;
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
    // There is always somebody to hear of an error; who asked to listen hears of those of listening.
    this.#http.on('error', () => undefined);
    this.#http.on('connection', (socket) => {
      this.#silent.add(socket);
      socket.once('close', () => this.#silent.delete(socket));
    });
    this.#http.on('upgrade', (request, socket, head) => this.#upgrade(request, socket as net.Socket, head));
  }

  /**
   * Listen, replacing a socket that a dead daemon left behind. A socket outside the store is linked to from the store,
   * so that it is found by those who only know the store. Errors: IN_USE, PERMISSION, IO.
   */
  async listen(): Promise<void> {
    makeSocketDirectory(path.dirname(this.path));
    await removeStaleSocket(this.path);
    this.#address = socketAddress(this.path);
    const { path: address } = this.#address;
    await new Promise<void>((resolve, reject) => {
      this.#http.once('error', reject);
      // bind(2) happens within listen(), so the file never has other permissions than these.
      const umask = process.umask(0o777 & ~(this.#options.mode ?? DEFAULT_CONTROL_MODE));
      try {
        this.#http.listen({ path: address }, () => resolve());
      } finally {
        process.umask(umask);
      }
    }).catch((error: Error) => {
      throw new OperationError(
        'IO',
        `cannot listen on the control socket ${this.path}: ${error.message}; give --control PATH to have it elsewhere`,
      );
    });
    this.#http.on('error', (error) => this.#options.onFault(error, 'accepting a connection'));
    await this.#linkFromStore();
  }

  /** Take no more requests and finish those under way; after `graceMs` they are cut off. */
  async close(graceMs: number): Promise<void> {
    const closed = new Promise<void>((resolve) => this.#http.close(() => resolve()));
    this.#http.closeIdleConnections();
    for (const socket of this.#silent) socket.destroy();
    const timer = setTimeout(() => this.#http.closeAllConnections(), graceMs);
    // Upgraded connections are the NBD server's to end; it ends them before it says it is closed.
    await closed;
    clearTimeout(timer);
    if (this.#link !== undefined) fs.rmSync(this.#link, { force: true });
    this.#address?.release();
  }

  async #linkFromStore(): Promise<void> {
    if (!this.#options.isFoundFromStore) return;
    const inStore = controlSocketOf(this.#options.operations.store);
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
        operations: this.#options.operations,
        status: this.#options.status,
        reload: this.#options.reload,
        disconnect: this.#options.disconnect,
        names: segments.filter((_, i) => route.path[i] === '*'),
        sessions: this.#sessions,
        query: searchParams,
        body: route.method === 'POST' ? await readBody(request) : {},
      });
      if (Array.isArray(result)) await answerList(response, result);
      else answer(response, 200, result);
    } catch (error) {
      const expected = asOperationError(error);
      if (!expected) this.#options.onFault(error, name);
      const { code, message } = expected ?? {
        code: 'INTERNAL',
        message: `the daemon failed: ${(error as Error).message}`,
      };
      answer(response, STATUS_OF[code] ?? 500, { error: { code, message } } satisfies ErrorAnswer);
    }
  }

  #upgrade(request: http.IncomingMessage, socket: net.Socket, head: Buffer): void {
    this.#silent.delete(socket);
    // From here on it is not HTTP's any more, and its end nobody's fault.
    socket.on('error', () => undefined);
    if (request.headers.upgrade?.toLowerCase() !== NBD_UPGRADE) {
      // Nobody reads from it, so nobody would see its end: it is closed as soon as this has left.
      socket.end('HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n', () => socket.destroy());
      return;
    }
    const session = String(++this.#lastSession);
    socket.write(
      `HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: ${NBD_UPGRADE}\r\n` +
        `${SESSION_HEADER}: ${session}\r\n\r\n`,
    );
    socket.setTimeout(0);
    const over = this.#options
      .serveNbd(socket, head, session)
      .catch((error: unknown) => this.#options.onFault(error, 'serving NBD'))
      .finally(() => this.#sessions.delete(session));
    this.#sessions.set(session, over);
  }
}

/** Errors: BAD_REQUEST. */
function urlOf(request: http.IncomingMessage): URL {
  try {
    return new URL(request.url ?? '/', 'http://control');
  } catch {
    throw badRequest(`the path ${JSON.stringify(request.url)} is none`);
  }
}

function sameFile(a: string, b: string): boolean {
  try {
    return fs.realpathSync(a) === fs.realpathSync(b);
  } catch {
    return false;
  }
}

function decodeSegments(pathname: string): string[] {
  try {
    return pathname.split('/').slice(1).map(decodeURIComponent);
  } catch {
    throw badRequest(`the path ${pathname} is not well encoded`);
  }
}

function matches(pattern: readonly string[], segments: readonly string[]): boolean {
  return pattern.length === segments.length && pattern.every((each, i) => each === '*' || each === segments[i]);
}

async function readBody(request: http.IncomingMessage): Promise<Body> {
  const chunks: Buffer[] = [];
  let length = 0;
  try {
    for await (const chunk of request as AsyncIterable<Buffer>) {
      length += chunk.length;
      if (length > MAX_REQUEST_BODY_BYTES) break;
      chunks.push(chunk);
    }
  } catch (error) {
    // Its client has left, and reads no answer either.
    throw badRequest(`the body ended early: ${(error as Error).message}`);
  }
  if (length > MAX_REQUEST_BODY_BYTES) throw badRequest(`the body is longer than ${MAX_REQUEST_BODY_BYTES} bytes`);
  if (length === 0) return {};
  let body: unknown;
  try {
    body = JSON.parse(Buffer.concat(chunks).toString());
  } catch (error) {
    throw badRequest(`the body is not JSON: ${(error as Error).message}`);
  }
  if (typeof body !== 'object' || body === null || Array.isArray(body))
    throw badRequest('the body must be a JSON object');
  return body as Body;
}

function answer(response: http.ServerResponse, status: number, value: unknown): void {
  const body = Buffer.from(`${JSON.stringify(value)}\n`);
  // One request a connection: nothing is left waiting when the daemon stops.
  response.writeHead(status, {
    'content-type': 'application/json',
    'content-length': body.length,
    connection: 'close',
  });
  response.end(body);
}

function first(names: readonly string[]): string {
  return names[0] ?? '';
}

function text(body: Body, field: string): string {
  const value = body[field];
  if (typeof value !== 'string') throw badRequest(`"${field}" must be a string, not ${JSON.stringify(value)}`);
  return value;
}

function wholeNumber(body: Body, field: string): number {
  const value = body[field];
  if (typeof value !== 'number' || !Number.isSafeInteger(value)) {
    throw badRequest(`"${field}" must be a whole number, not ${JSON.stringify(value)}`);
  }
  return value;
}

function connectionId(name: string): number {
  if (!/^\d{1,15}$/.test(name)) throw badRequest(`${JSON.stringify(name)} is no number of a connection`);
  return Number(name);
}

function keepOutIn(body: Body): number {
  const ms = body.keepOutMs === undefined ? 0 : wholeNumber(body, 'keepOutMs');
  if (ms < 0 || ms > MAX_KEEP_OUT_MS) throw badRequest(`"keepOutMs" must be 0 to ${MAX_KEEP_OUT_MS}, not ${ms}`);
  return ms;
}

function offsetIn(query: URLSearchParams): number {
  const offset = query.get('offset') ?? '0';
  if (!/^\d{1,16}$/.test(offset)) throw badRequest(`"offset" must be a whole number, not ${JSON.stringify(offset)}`);
  return Number(offset);
}

function flag(body: Body, field: string): boolean {
  const value = body[field] ?? false;
  if (typeof value !== 'boolean') throw badRequest(`"${field}" must be true or false, not ${JSON.stringify(value)}`);
  return value;
}

function hex(body: Body, field: string, mostDigits: number): string {
  const value = text(body, field);
  if (!/^[0-9a-f]*$/.test(value) || value.length > mostDigits) {
    throw badRequest(`"${field}" must be at most ${mostDigits} hex digits, not ${JSON.stringify(value)}`);
  }
  return value;
}

function copiesIn(body: Body): Redundancy | undefined {
  if (body.copies === undefined) return undefined;
  const redundancy = parseRedundancy(text(body, 'copies'));
  if (redundancy) return redundancy;
  throw badRequest(`"copies" must be ${REDUNDANCY_HELP}, not ${JSON.stringify(body.copies)}`);
}

function optionalNumber(body: Body, key: string): number | undefined {
  return body[key] === undefined ? undefined : wholeNumber(body, key);
}

function runIn(body: Body): string | undefined {
  return body.run === undefined ? undefined : hex(body, 'run', MAX_RUN_DIGITS);
}

function beginningIn(body: Body): Beginning {
  const by = FILLERS.find((each) => each === body.by);
  if (by === undefined) throw badRequest(`"by" must be one of ${FILLERS.join(', ')}, not ${JSON.stringify(body.by)}`);
  const run = hex(body, 'run', MAX_RUN_DIGITS);
  if (run === '') throw badRequest('"run" must not be empty');
  return {
    by,
    of: hex(body, 'of', MAX_OF_DIGITS),
    run,
    size: wholeNumber(body, 'size'),
    blockSizeShift: optionalNumber(body, 'blockSizeShift'),
    likeShift: optionalNumber(body, 'likeShift'),
    largestSize: optionalNumber(body, 'largestSize'),
    isOpenEnded: flag(body, 'isOpenEnded'),
    redundancy: copiesIn(body),
    overwrites: flag(body, 'overwrites'),
    goesOn: flag(body, 'goesOn'),
    force: flag(body, 'force'),
  };
}

function badRequest(message: string): OperationError {
  return new OperationError('BAD_REQUEST', message);
}
