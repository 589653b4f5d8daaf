/**
 * The server: listeners, the set of open connections, and the orderly end of both. It owns addresses and socket files;
 * what happens on a connection is the connection's affair.
 */

import { chmod, lstat, unlink } from 'node:fs/promises';
import net from 'node:net';
import type { Duplex } from 'node:stream';
import { isMainThread } from 'node:worker_threads';
import { Admission, type Place } from './admission.js';
import type { ExportProvider, Peer, PeerCredentials } from '../block-device.js';
import { BufferPool, type MemoryUse } from './buffer-pool.js';
import { Connection } from './connection.js';
import { receiveInPlace, type InPlaceSocket } from './in-place-socket.js';
import { limitsFrom, MIN_MEMORY_BYTES, type Limits } from './limits.js';
import { LoopShare } from './loop-share.js';
import { LoopTime } from './loop-time.js';
import type { ConnectionInfo, ServerObserver } from './observer.js';
import { socketPathProblem } from '../protocol/socket-path.js';
import { StallWatch } from './stall-watch.js';
import type { ServerTls } from '../protocol/tls.js';
import { Violations } from './violations.js';

export interface ServerOptions {
  readonly provider: ExportProvider;
  /** Told what happens; see ServerObserver. */
  readonly observer?: ServerObserver;
  /** Bounds other than DEFAULT_LIMITS. */
  readonly limits?: Partial<Limits>;
  /** TLS for connections of listeners. Internal peers are never offered it: who hands a stream over answers for it. */
  readonly tls?: ServerTls;
  /** Asks the kernel who is at the other end of a unix socket; undefined if it will not say. */
  readonly peerCredentials?: (socket: net.Socket) => PeerCredentials | undefined;
  /**
   * Called for every socket that a listener accepts, before it is served: for options that Node does not know. It is the
   * socket's own object until it is closed.
   */
  readonly prepareSocket?: (socket: net.Socket) => void;
}

/**
 * Where to listen: a unix socket, with the permissions of its file, a TCP address (port 0: any free one), or a
 * descriptor of a socket of either kind that listens already (socket activation).
 */
export type ListenOptions =
  | { readonly path: string; readonly mode?: number }
  | { readonly host: string; readonly port: number }
  | {
      readonly fd: number;
      /** The path of a unix socket, which Node cannot find out. */
      readonly path?: string;
    };

/** Where a server listens. */
export type BoundAddress =
  | { readonly transport: 'unix'; readonly path: string }
  | { readonly transport: 'tcp'; readonly host: string; readonly port: number };

/** Why a server could not listen. */
export class ListenError extends Error {
  constructor(
    readonly code: 'IN_USE' | 'NOT_A_SOCKET' | 'CLOSED' | 'FAILED',
    message: string,
    options?: ErrorOptions,
  ) {
    super(message, options);
    this.name = 'ListenError';
  }
}

/** How long close() waits for requests in flight if not told otherwise. */
export const DEFAULT_GRACE_MS = 10_000;
/** After the grace, sockets are gone; devices get this long to finish their last requests. */
const FORCED_CLOSE_WAIT_MS = 1_000;
/** Pending connections the kernel keeps: all connections of a multi-conn client may come at once. */
const LISTEN_BACKLOG = 511;

export class NbdServer {
  private readonly provider: ExportProvider;
  private readonly observer: ServerObserver;
  private readonly limits: Limits;
  private readonly tls: ServerTls | undefined;
  private readonly peerCredentials: ServerOptions['peerCredentials'];
  private readonly prepareSocket: ServerOptions['prepareSocket'];
  private readonly admission: Admission;
  /** Open connections that were handed over. */
  private internalCount = 0;
  private readonly pool: BufferPool;
  private readonly loop = new LoopShare();
  private readonly time: LoopTime;
  private readonly stallWatch: StallWatch;
  private readonly violations: Violations;
  private readonly listeners = new Set<net.Server>();
  private readonly open = new Map<number, Connection>();
  private nextId = 1;
  private isClosed = false;
  private closing: Promise<void> | undefined;

  constructor(options: ServerOptions) {
    this.provider = options.provider;
    this.observer = options.observer ?? {};
    this.limits = limitsFrom(options.limits);
    this.admission = new Admission(this.limits);
    this.violations = new Violations(this.limits.maxViolationDelayMs);
    const { maxMemoryBytes } = this.limits;
    if (!(maxMemoryBytes >= MIN_MEMORY_BYTES)) {
      throw new RangeError(`maxMemoryBytes is ${maxMemoryBytes}, and must be ${MIN_MEMORY_BYTES} at least`);
    }
    this.pool = new BufferPool(maxMemoryBytes);
    this.time = new LoopTime();
    this.stallWatch = new StallWatch(() => this.open.values(), this.pool, this.limits, this.time);
    this.tls = options.tls;
    this.peerCredentials = options.peerCredentials;
    this.prepareSocket = options.prepareSocket;
  }

  /** The connections open now, by id: `size` counts them, iterating tells about them. */
  get connections(): ReadonlyMap<number, ConnectionInfo> {
    return this.open;
  }

  /** The memory that requests and replies take now. */
  get memory(): MemoryUse {
    return this.pool.use;
  }

  /**
   * Listen at an address; may be called several times. A socket file left behind by a server that is gone is replaced;
   * one that somebody listens on, and any other kind of file, is not.
   * @throws ListenError
   */
  async listen(options: ListenOptions): Promise<BoundAddress> {
    if (this.isClosed) throw new ListenError('CLOSED', 'the server is closed');
    // Half-open: a client that has sent its last request and shut its side down still gets its answers.
    const listener = net.createServer({
      allowHalfOpen: true,
      noDelay: true,
      keepAlive: true,
      keepAliveInitialDelay: this.limits.keepAliveMs,
    });
    let bound: BoundAddress;
    // There is always somebody to hear of an error; who asked to listen hears of those of listening.
    listener.on('error', () => undefined);
    listener.on('connection', (accepted) => {
      // Under TLS what is received is ciphertext, which the TLS socket takes as it comes.
      const inPlace = this.tls === undefined ? receiveInPlace(accepted) : undefined;
      const socket = inPlace?.socket ?? accepted;
      this.prepareSocket?.(socket);
      this.serve(socket, { peer: this.peerOf(socket, listener, options), inPlace });
    });
    if ('fd' in options) bound = await adopt(listener, options);
    else bound = 'path' in options ? await bindUnix(listener, options) : await bindTcp(listener, options);
    if (this.isClosed) {
      listener.close();
      throw new ListenError('CLOSED', 'the server was closed while it began to listen');
    }
    listener.on('error', (error) => this.observer.onListenerError?.(error));
    this.listeners.add(listener);
    if (bound.transport === 'unix') this.admission.keepsRoomForUnix = true;
    return bound;
  }

  /**
   * Serve a connection that somebody else accepted, from the greeting on (an HTTP upgrade, a socket pair).
   * @param options.peer who it is; default an internal peer
   * @param options.head bytes that were already read from it
   * @returns its id, or undefined if it was refused (server closed or full) and its socket destroyed
   */
  serveConnection(socket: Duplex, options: { readonly peer?: Peer; readonly head?: Buffer } = {}): number | undefined {
    return this.serve(socket, options);
  }

  /**
   * Cut a connection off. When it resolves, its device is closed: nothing that was received from it is under way, and nothing
   * more of it will be carried out. The client is not told; one that connects again by itself will do so at once.
   * @returns false if there is no such connection
   */
  async disconnect(id: number, reason: string): Promise<boolean> {
    const connection = this.open.get(id);
    if (connection === undefined) return false;
    connection.disconnect(reason);
    await connection.over;
    return true;
  }

  /** The stream that a connection came on, below TLS: to ask the system about its other end, not to be read or written. */
  transportOf(id: number): Duplex | undefined {
    return this.open.get(id)?.transport;
  }

  private serve(
    socket: Duplex,
    options: { readonly peer?: Peer; readonly head?: Buffer; readonly inPlace?: InPlaceSocket | undefined },
  ): number | undefined {
    const peer = options.peer ?? { transport: 'internal', address: `connection ${this.nextId}` };
    const key = peerKey(peer);
    const place = this.placeFor(key, peer);
    if (typeof place === 'string') {
      socket.on('error', () => undefined);
      socket.destroy();
      this.observer.onConnectionRefused?.({ peer, reason: place });
      return undefined;
    }
    const id = this.nextId++;
    const connection = new Connection({
      id,
      socket,
      peer,
      tls: peer.transport === 'internal' ? undefined : this.tls,
      head: options.head,
      inPlace: options.inPlace,
      provider: this.provider,
      limits: this.limits,
      observer: this.observer,
      pool: this.pool,
      loop: this.loop,
      time: this.time,
      violations: this.violations,
      offender: key,
      place,
    });
    this.open.set(id, connection);
    if (place === undefined) this.internalCount++;
    void connection.over.then(() => {
      this.open.delete(id);
      if (place === undefined) this.internalCount--;
      else place.left();
    });
    return id;
  }

  /** Its place, if its kind has one; or why no further connection of this peer is served. */
  private placeFor(key: string | undefined, peer: Peer): Place | string | undefined {
    const { maxConnections } = this.limits;
    if (this.isClosed) return 'the server is closed';
    if (key !== undefined) return this.admission.enter(key, peer.transport);
    // Whoever hands them over keeps count of them as well; strangers at the listeners keep none of them out.
    if (this.internalCount >= maxConnections) return `${maxConnections} connections are open, as many as allowed`;
    return undefined;
  }

  private peerOf(socket: net.Socket, listener: net.Server, options: ListenOptions): Peer {
    const address = listener.address();
    if (address === null || typeof address === 'string') {
      const credentials = this.peerCredentials?.(socket);
      return { transport: 'unix', address: pathOf(options), ...(credentials !== undefined && { credentials }) };
    }
    const remote = socket.remoteAddress ?? 'unknown';
    const host =
      remote.startsWith(IPV4_MAPPED) && net.isIPv4(remote.slice(IPV4_MAPPED.length))
        ? remote.slice(IPV4_MAPPED.length)
        : remote;
    return { transport: 'tcp', address: `${remote}:${socket.remotePort ?? 0}`, host };
  }

  /**
   * Stop accepting, answer the requests in flight, refuse further ones with ESHUTDOWN, close. Resolves when every
   * connection is over and its device closed. What is not done after `graceMs` milliseconds is cut off; then only a
   * device that never finishes a request can be left (`connections` shows whose).
   *
   * With `refuse: false` further requests are not answered at all. For a server that will be back: clients that connect
   * again (Linux, qemu) repeat what was not answered, but make an I/O error of ESHUTDOWN.
   */
  close(options: { readonly graceMs?: number; readonly refuse?: boolean } = {}): Promise<void> {
    this.closing ??= this.shutDown(options.graceMs ?? DEFAULT_GRACE_MS, options.refuse ?? true);
    return this.closing;
  }

  /** Stop accepting and close every socket now. Devices are closed as soon as their requests in flight finish. */
  destroy(): void {
    this.stopListening();
    this.violations.release();
    for (const connection of this.open.values()) connection.abort('the server was stopped');
  }

  private async shutDown(graceMs: number, refuse: boolean): Promise<void> {
    this.stopListening();
    this.violations.release();
    for (const connection of this.open.values()) connection.shutdown({ refuse });
    if (await within(graceMs, this.allOver())) return;
    this.destroy();
    await within(FORCED_CLOSE_WAIT_MS, this.allOver());
  }

  private async allOver(): Promise<void> {
    await Promise.all(Array.from(this.open.values(), (connection) => connection.over));
  }

  private stopListening(): void {
    this.isClosed = true;
    this.stallWatch.stop();
    this.time.stop();
    for (const listener of this.listeners) listener.close();
    this.listeners.clear();
  }
}

/** Whether `work` was done within `timeoutMs`. */
async function within(timeoutMs: number, work: Promise<void>): Promise<boolean> {
  let timer: NodeJS.Timeout | undefined;
  const timeout = new Promise<boolean>((resolve) => {
    timer = setTimeout(() => resolve(false), timeoutMs);
  });
  const isDone = await Promise.race([work.then(() => true), timeout]);
  clearTimeout(timer);
  return isDone;
}

const IPV4_MAPPED = '::ffff:';

/** Whose connections are counted together: a host's, a user's. Undefined for internal peers, who are none of a listener's. */
function peerKey(peer: Peer): string | undefined {
  if (peer.transport === 'internal') return undefined;
  if (peer.transport === 'tcp') return `host ${peer.host ?? peer.address}`;
  return peer.credentials === undefined ? `socket ${peer.address}` : `uid ${peer.credentials.uid}`;
}

async function adopt(listener: net.Server, options: { fd: number; path?: string }): Promise<BoundAddress> {
  try {
    await bind(listener, { fd: options.fd });
  } catch (error) {
    throw listenError(`descriptor ${options.fd}`, error);
  }
  return addressOf(listener, options);
}

/** Where `listener` listens; Node has no address for unix sockets that it did not bind. */
function addressOf(listener: net.Server, options: ListenOptions): BoundAddress {
  const address = listener.address();
  if (address === null || typeof address === 'string') return { transport: 'unix', path: pathOf(options) };
  return { transport: 'tcp', host: address.address, port: address.port };
}

function pathOf(options: ListenOptions): string {
  if ('path' in options && options.path !== undefined) return options.path;
  return 'fd' in options ? `descriptor ${options.fd}` : 'unknown';
}

async function bindTcp(listener: net.Server, options: { host: string; port: number }): Promise<BoundAddress> {
  const { host, port } = options;
  try {
    await bind(listener, { host, port });
  } catch (error) {
    throw listenError(`${host}:${port}`, error);
  }
  return addressOf(listener, options);
}

async function bindUnix(listener: net.Server, options: { path: string; mode?: number }): Promise<BoundAddress> {
  const { path, mode } = options;
  const problem = socketPathProblem(path);
  if (problem !== undefined) throw new ListenError('FAILED', `cannot listen on ${path}: ${problem}`);
  try {
    await bind(listener, { path }, mode);
  } catch (error) {
    if (errorCode(error) !== 'EADDRINUSE') throw listenError(path, error);
    await removeStaleSocket(path);
    try {
      await bind(listener, { path }, mode);
    } catch (secondError) {
      throw listenError(path, secondError);
    }
  }
  return { transport: 'unix', path };
}

async function bind(
  listener: net.Server,
  address: { path: string } | { host: string; port: number } | { fd: number },
  mode?: number,
): Promise<void> {
  // The file must never be there with wider permissions than asked for. It is created inside listen(), before that
  // returns; a worker thread may not set the umask and makes do with the chmod below.
  await new Promise<void>((resolve, reject) => {
    listener.once('error', reject);
    listener.once('listening', () => listener.off('error', reject));
    const umask = mode !== undefined && isMainThread ? process.umask(0o777 & ~mode) : undefined;
    try {
      listener.listen({ ...address, backlog: LISTEN_BACKLOG }, resolve);
    } finally {
      if (umask !== undefined) process.umask(umask);
    }
  }).finally(() => listener.removeAllListeners('listening'));
  if (mode !== undefined && 'path' in address) await chmod(address.path, mode);
}

/** Remove the socket file at `path` if nobody listens on it. */
async function removeStaleSocket(path: string): Promise<void> {
  const found = await lstat(path).catch(() => undefined);
  if (found === undefined) return;
  if (!found.isSocket())
    throw new ListenError('NOT_A_SOCKET', `${path} exists and is not a socket; remove it yourself`);
  if (await isListenedOn(path)) throw new ListenError('IN_USE', `another server is listening on ${path}`);
  await unlink(path).catch((error: unknown) => {
    throw listenError(path, error);
  });
}

function isListenedOn(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const probe = net.connect({ path });
    probe.once('connect', () => {
      probe.destroy();
      resolve(true);
    });
    // Only a refusal says that nobody is there; anything else (EACCES, a full backlog) may be a live server.
    probe.once('error', (error) => resolve(errorCode(error) !== 'ECONNREFUSED'));
  });
}

function listenError(where: string, error: unknown): ListenError {
  if (error instanceof ListenError) return error;
  const message = error instanceof Error ? error.message : String(error);
  const code = errorCode(error) === 'EADDRINUSE' ? 'IN_USE' : 'FAILED';
  return new ListenError(code, `cannot listen on ${where}: ${message}`, { cause: error });
}

function errorCode(error: unknown): unknown {
  return error instanceof Error && 'code' in error ? error.code : undefined;
}
