/**
 * The server: listeners, the set of open connections, and the orderly end of both. It owns the admission and everything
 * that all connections share, whichever event loop serves them (see serving-loop.ts). It never reads or writes a
 * connection.
 */

import net from 'node:net';
import type { Duplex } from 'node:stream';
import type { ExportProvider, Peer, PeerCredentials } from '../block-device.js';
import type { AnyDevice } from '../device.js';
import type { ServerTls, TlsMode } from '../protocol/tls-material.js';
import { Admission, type Place } from './admission.js';
import type { MemoryUse } from './buffer-pool.js';
import { ConnectionLoop } from './connection-loop.js';
import { limitsFrom, type Limits } from './limits.js';
import {
  bindListener,
  ListenError,
  listenPlace,
  peerOf,
  type BoundAddress,
  type ListenOptions,
  type ListenTarget,
} from './listening.js';
import { HandOverError, type NegotiatedState } from './negotiated-state.js';
import { GuardedObserver } from './guarded-observer.js';
import type { ConnectionInfo, ServerObserver } from './observer.js';
import { promiseOf } from '../promised.js';
import { Offenders } from './offenders.js';
import type { Progress, ServedConnection, ServingLoop, TakeConnection } from './serving-loop.js';
import { unlessAborted, within } from './timers.js';
import { checkFunction, checkObject } from '../kinds.js';

/** What a server serves, and how. Only the provider is required. */
export interface ServerOptions {
  readonly provider: ExportProvider<AnyDevice>;
  /** Receives the server's events; see ServerObserver. */
  readonly observer?: ServerObserver;
  /** Limits other than DEFAULT_LIMITS. */
  readonly limits?: Partial<Limits>;
  /**
   * TLS for connections of listeners. It is not offered to internal peers: the program that hands over a stream vouches for
   * it.
   */
  readonly tls?: ServerTls;
  /**
   * Asks the kernel for the process at the other end of a unix socket; undefined if unknown. If it throws, or gives something
   * else, the connection is refused, and the error is reported.
   */
  readonly peerCredentials?: (socket: net.Socket) => PeerCredentials | undefined;
  /**
   * Called for every socket that a listener accepts, before it is served: for socket options that Node does not have. If the
   * connection is served in this thread, this object is its socket until it is closed. If it throws, the connection is
   * refused, and the error is reported.
   */
  readonly prepareSocket?: (socket: net.Socket) => void;
  /**
   * The event loops that serve accepted connections, each with its part of the connections and of the memory; by default
   * that of this thread. The server owns them: it stops them when it is closed.
   */
  readonly loops?: readonly ServingLoop[];
  /**
   * For tests of a device: it gets private copies of the data that it writes and of the memory that it reads into, which are
   * overwritten with "POISONED" when its call has settled. A device that keeps `data`, or fills `into` too late, is found by
   * what it then stores or sends. Every read and write costs a copy. Loops in other threads have their own option.
   */
  readonly poisonBuffers?: boolean;
}

/** What is left when an orderly end does not wait any longer. */
export interface Unfinished {
  /**
   * Connections that are not over, as they were at this moment: of clients that are still there, or whose devices have not
   * finished their requests (`inFlight`) or their close.
   */
  readonly unfinished: readonly ConnectionInfo[];
}

/** How long close() waits for requests in flight by default, milliseconds. */
export const DEFAULT_GRACE_MS = 10_000;
/** After the grace sockets are closed; devices get this long to finish their last requests, milliseconds. */
const FORCED_CLOSE_WAIT_MS = 1_000;

/**
 * An NBD server: it listens, admits connections, has them served by its event loops, and closes them in order. It may listen at
 * any number of addresses, or at none and be given connections.
 */
export class NbdServer {
  readonly #limits: Limits;
  readonly #observer: GuardedObserver;
  readonly #peerCredentials: ServerOptions['peerCredentials'];
  readonly #prepareSocket: ServerOptions['prepareSocket'];
  readonly #tlsMode: TlsMode | undefined;
  readonly #admission: Admission;
  /** Open connections that were handed over. */
  #internalCount = 0;
  /** This thread's loop: it serves streams of this thread, and by default everything. */
  readonly #here: ConnectionLoop;
  /** The loops that serve accepted connections, with the number of connections of each. */
  readonly #loops: Map<ServingLoop, number>;
  readonly #listeners = new Set<net.Server>();
  readonly #open = new Map<number, ServedConnection>();
  #nextId = 1;
  /** Why no further connection is accepted; undefined: they are. */
  #whyClosed: 'the server is draining' | 'the server is closed' | undefined;
  #closing: Promise<Unfinished> | undefined;

  /** Errors: RangeError (a limit is invalid, or too little memory for so many loops), TypeError (`tls` is not what it must be). */
  constructor(options: ServerOptions) {
    checkObject(options, 'the options of a server');
    const { provider, tls } = options;
    checkObject(provider, 'provider');
    checkFunction(options.peerCredentials, 'peerCredentials');
    checkFunction(options.prepareSocket, 'prepareSocket');
    const observer = GuardedObserver.of(options.observer);
    this.#observer = observer;
    this.#tlsMode = tls?.mode;
    this.#limits = limitsFrom(options.limits);
    this.#admission = new Admission(this.#limits);
    const offenders = new Offenders(this.#limits.maxViolationDelayMs);
    const { poisonBuffers } = options;
    const limits = this.#limits;
    this.#here = new ConnectionLoop({
      provider,
      observer,
      limits,
      offenders,
      poisonBuffers,
      ...(tls !== undefined && { tls }),
    });
    this.#loops = new Map((options.loops ?? [this.#here]).map((loop) => [loop, 0]));
    const all = this.#allLoops();
    for (const loop of all) loop.shareMemory(this.#limits.maxMemoryBytes / all.length);
    this.#peerCredentials = options.peerCredentials;
    this.#prepareSocket = options.prepareSocket;
  }

  /** The open connections, by id. */
  get connections(): ReadonlyMap<number, ConnectionInfo> {
    return this.#open;
  }

  /** The memory that requests and replies use now. */
  get memory(): MemoryUse {
    const uses = this.#allLoops().map(({ memory }) => memory);
    const sum = (field: keyof MemoryUse): number => uses.reduce((total, use) => total + use[field], 0);
    return {
      usedBytes: sum('usedBytes'),
      maxBytes: sum('maxBytes'),
      keptBytes: sum('keptBytes'),
      waiting: sum('waiting'),
    };
  }

  /**
   * Listen at an address; may be called several times. A stale socket file is replaced; a socket that a process listens on, and
   * any other kind of file, is not. An `nbds` URI is for a server that requires TLS of every client (`tls.mode`).
   * Errors: ListenError; TypeError and RangeError for what is not an address.
   */
  async listen(where: ListenTarget): Promise<BoundAddress> {
    const { options, uri } = listenPlace(where);
    if (uri?.tls === true && this.#tlsMode !== 'require') {
      const mode = this.#tlsMode === undefined ? 'it has no option tls' : `its tls.mode is '${this.#tlsMode}'`;
      throw new ListenError('FAILED', `a server for nbds requires TLS, and ${mode}; give tls with the mode 'require'`);
    }
    this.#mustBeOpen();
    // Half-open: a client that has sent its last request and closed its side still gets its answers.
    const listener = net.createServer({
      allowHalfOpen: true,
      noDelay: true,
      keepAlive: this.#limits.keepAliveMs > 0,
      // Node cuts it to whole seconds, and the system accepts no 0.
      keepAliveInitialDelay: Math.max(1000, this.#limits.keepAliveMs),
      // A connection served in another thread must be read there, from the first byte on.
      pauseOnConnect: this.#servesElsewhere(),
    });
    // So no error event is without a listener; errors of listening reject listen().
    listener.on('error', () => undefined);
    listener.on('connection', (accepted) => this.#accepted(accepted, listener, options));
    let bound: BoundAddress;
    try {
      bound = await bindListener(listener, options);
      this.#mustBeOpen();
    } catch (error) {
      // It may listen already: the permissions of its file come after that.
      listener.close();
      throw error;
    }
    listener.on('error', (error) => this.#observer.onListenerError(error));
    this.#listeners.add(listener);
    if (bound.transport === 'unix') this.#admission.keepsRoomForUnix = true;
    return bound;
  }

  /** Errors: ListenError CLOSED. */
  #mustBeOpen(): void {
    if (this.#whyClosed !== undefined) throw new ListenError('CLOSED', this.#whyClosed);
  }

  #accepted(accepted: net.Socket, listener: net.Server, options: ListenOptions): void {
    const loop = this.#nextLoop();
    const socket = loop === this.#here ? this.#here.prepare(accepted) : accepted;
    const peer = this.#peerOf(socket, listener, options);
    if (peer !== undefined && this.#prepare(socket, peer)) this.#serve(loop, socket, peer);
  }

  /** The peer of an accepted socket; undefined, and the connection is refused, if `peerCredentials` fails. */
  #peerOf(socket: net.Socket, listener: net.Server, options: ListenOptions): Peer | undefined {
    try {
      return peerOf(socket, listener, options, this.#peerCredentials);
    } catch (error) {
      this.#refuseFailed(socket, peerOf(socket, listener, options, undefined), 'peerCredentials', error);
      return undefined;
    }
  }

  /** Whether the program's `prepareSocket` has succeeded; otherwise the connection is refused. */
  #prepare(socket: net.Socket, peer: Peer): boolean {
    const report = (error: unknown): void =>
      this.#observer.onError(error, { peer, source: 'callback', method: 'prepareSocket', expected: false });
    try {
      const answer: unknown = this.#prepareSocket?.(socket);
      if (answer !== undefined) promiseOf(answer)?.then(undefined, report);
      return true;
    } catch (error) {
      this.#refuseFailed(socket, peer, 'prepareSocket', error);
      return false;
    }
  }

  /** A callback of the program has failed: the connection is not served. */
  #refuseFailed(socket: Duplex, peer: Peer, method: string, error: unknown): void {
    this.#observer.onError(error, { peer, source: 'callback', method, expected: false });
    this.#refuse(socket, peer, `${method} failed`);
  }

  #refuse(socket: Duplex, peer: Peer, reason: string): void {
    socket.on('error', () => undefined);
    socket.destroy();
    this.#observer.onConnectionRefused({ peer, reason });
  }

  /**
   * Serve a connection that the program accepted, from the greeting on (an HTTP upgrade, a socket pair).
   * @param options.peer the client; default an internal peer
   * @param options.head bytes that were already read from it
   * @returns its id, or undefined if it was refused (server closed or full) and its socket destroyed
   */
  serveConnection(
    socket: Duplex,
    options: { readonly peer?: Peer; readonly head?: Uint8Array } = {},
  ): number | undefined {
    const { head } = options;
    // One object for each connection: providers tell connections apart by it.
    const peer = { transport: 'internal', address: `connection ${this.#nextId}`, ...options.peer } as const;
    return this.#letIn(socket, peer, (about) => this.#here.serveStream({ ...about, socket, head }));
  }

  /**
   * Continue a connection that another server, of this process or another one, has handed over. The export is opened again, by
   * its own name; if it lacks something that was announced to the client, the connection is closed with that as the reason. It
   * counts like a connection that a listener accepted.
   * @param socket the client's; nothing was read from it since the state was taken
   * @returns its id, or undefined if it was refused (server closed or full) and its socket destroyed
   */
  continueConnection(socket: net.Socket, state: NegotiatedState): number | undefined {
    // A client that has sent its last request and closed its side still gets its answers.
    socket.allowHalfOpen = true;
    const loop = this.#nextLoop();
    const served = loop === this.#here ? this.#here.prepare(socket) : socket;
    if (!this.#prepare(served, state.peer)) return undefined;
    return this.#serve(loop, served, state.peer, state);
  }

  /**
   * Hand a connection over, to be continued elsewhere: it stops between two requests, requests in flight are answered, and
   * `take` is called with its socket and its state. `take` must use the socket before it returns, for example duplicate its
   * descriptor: afterwards the socket is destroyed here. (Sending the socket to a child process is possible only if nothing
   * is `unsent`: Node would continue to send that.) The state is plain data.
   *
   * Resolves with the result of `take` when the device is closed, with the ending 'lost'. If `take` throws, or `signal` is
   * aborted before, the connection continues here.
   * Errors: HandOverError NOT_READY (no export yet), ENDING (it is over, or about to be), TLS (it is encrypted),
   * NOT_A_SOCKET (it is a stream of this process), ABORTED (by `signal`); what `take` throws.
   */
  async handOver<T>(
    id: number,
    take: TakeConnection<T>,
    options: { readonly signal?: AbortSignal } = {},
  ): Promise<Awaited<T>> {
    const connection = this.#open.get(id);
    if (connection === undefined) throw new HandOverError('ENDING', `there is no connection ${id}`);
    const taken = await connection.handOver(take, options.signal);
    await connection.over;
    return taken;
  }

  /**
   * Close a connection at once. When this resolves its device is closed: nothing that was received over it is in flight, and
   * nothing more will be executed. The client gets no reason; a client that reconnects automatically does so at once.
   *
   * A device that does not finish a request delays this for as long. `signal` ends the wait, for example
   * AbortSignal.timeout(5000); the connection is closed all the same, and stays in `connections` until its device is.
   * @returns false if there is no such connection
   * Errors: the reason of `signal`, if that is aborted before.
   */
  async disconnect(id: number, reason: string, options: { readonly signal?: AbortSignal } = {}): Promise<boolean> {
    const connection = this.#open.get(id);
    if (connection === undefined) return false;
    connection.disconnect(reason);
    await unlessAborted(connection.over, options.signal);
    return true;
  }

  /**
   * Close all connections of an export, by its own name (`exportName` in `connections`), as `disconnect` closes one. When this
   * resolves their devices are closed. The export can still be opened, also while this waits: to prevent that, the provider
   * must refuse it first. Connections that are just opening it are not closed.
   * @returns how many there were
   * Errors: the reason of `signal`, if that is aborted before; the connections are closed all the same.
   */
  async closeExport(name: string, reason: string, options: { readonly signal?: AbortSignal } = {}): Promise<number> {
    const connections = [...this.#open.values()].filter(({ exportName }) => exportName === name);
    for (const connection of connections) connection.disconnect(reason);
    await unlessAborted(Promise.all(connections.map(({ over }) => over)), options.signal);
    return connections.length;
  }

  /**
   * The accepted stream of a connection, below TLS: to ask the system about its other end, not to read or write it.
   * Undefined if there is no such connection, or it is served in another thread.
   */
  transportOf(id: number): Duplex | undefined {
    return this.#open.get(id)?.transport;
  }

  #serve(loop: ServingLoop, socket: net.Socket, peer: Peer, state?: NegotiatedState): number | undefined {
    return this.#letIn(socket, peer, (about) => loop.serve({ ...about, socket, state }), loop);
  }

  /** Have a connection served, if there is room for it. `loop`: the loop that it counts for, if any. */
  #letIn(
    socket: Duplex,
    peer: Peer,
    serve: (about: {
      readonly id: number;
      readonly peer: Peer;
      readonly progress: Progress;
      readonly offender: string | undefined;
    }) => ServedConnection,
    loop?: ServingLoop,
  ): number | undefined {
    const offender = peerKey(peer);
    const place = this.#placeFor(offender, peer);
    if (typeof place === 'string') {
      this.#refuse(socket, peer, place);
      return undefined;
    }
    const id = this.#nextId++;
    const progress = place ?? this.#internalProgress();
    let connection: ServedConnection;
    let over: Promise<unknown>;
    try {
      connection = serve({ id, peer, progress, offender });
      // A loop of the program's own may give anything.
      over = Promise.resolve(connection.over);
    } catch (error) {
      progress.left?.();
      this.#refuseFailed(socket, peer, 'serve', error);
      return undefined;
    }
    this.#open.set(id, connection);
    if (place !== undefined) place.occupant = connection;
    if (loop !== undefined) this.#count(loop, 1);
    const ended = (): void => {
      this.#open.delete(id);
      progress.left?.();
      if (loop !== undefined) this.#count(loop, -1);
    };
    over.then(ended, (error: unknown) => {
      this.#observer.onError(error, { id, peer, source: 'server', method: 'serve', expected: false });
      ended();
    });
    return id;
  }

  /**
   * Its place, or the reason why no further connection of this peer is served; undefined for internal peers, which have no
   * place.
   */
  #placeFor(key: string | undefined, peer: Peer): Place | string | undefined {
    const { maxConnections } = this.#limits;
    if (this.#whyClosed !== undefined) return this.#whyClosed;
    if (key !== undefined) return this.#admission.enter(key, peer.transport);
    // Connections of listeners do not count: clients from outside must not use up the room of internal ones.
    if (this.#internalCount >= maxConnections) return `${maxConnections} connections are open, as many as allowed`;
    return undefined;
  }

  /** The progress of a connection that no listener accepted: it only counts, and the program that hands it over decides. */
  #internalProgress(): Progress {
    let isCounted = true;
    this.#internalCount++;
    return {
      advanced: () => undefined,
      settled: () => undefined,
      leaving: () => undefined,
      left: () => {
        if (isCounted) this.#internalCount--;
        isCounted = false;
      },
    };
  }

  /** The loop with the fewest connections. */
  #nextLoop(): ServingLoop {
    let best: ServingLoop = this.#here;
    let fewest = Infinity;
    for (const [loop, count] of this.#loops) {
      if (count >= fewest) continue;
      fewest = count;
      best = loop;
    }
    return best;
  }

  #count(loop: ServingLoop, change: number): void {
    this.#loops.set(loop, (this.#loops.get(loop) ?? 0) + change);
  }

  #servesElsewhere(): boolean {
    return [...this.#loops.keys()].some((loop) => loop !== this.#here);
  }

  #allLoops(): ServingLoop[] {
    return [...new Set<ServingLoop>([this.#here, ...this.#loops.keys()])];
  }

  /**
   * Stop accepting, answer the requests in flight, refuse further ones with ESHUTDOWN, close. Resolves when every connection is
   * over and its device closed. After `graceMs` milliseconds (by default 10 s; Infinity: never) the remaining sockets are
   * closed, and the signals of their devices aborted; devices get one more second. What is `unfinished` then waits for its
   * device; it is also reported to the observer.
   * Errors: RangeError (graceMs is no time), and nothing is closed.
   *
   * With `refuse: false` further requests are not answered at all. For a restart: clients that reconnect (Linux, qemu) repeat
   * unanswered requests, but report ESHUTDOWN as an I/O error.
   */
  async close(options: { readonly graceMs?: number; readonly refuse?: boolean } = {}): Promise<Unfinished> {
    const graceMs = graceOf(options);
    this.#closing ??= this.#shutDown(graceMs, options.refuse ?? true);
    return this.#closing;
  }

  /**
   * Stop accepting, and let the present clients work until they leave; then close. A client may stay for days, and is told
   * nothing: NBD has no message for it. `close`, also while this waits, ends those that are left.
   *
   * Resolves when all connections are over and their devices closed; after `timeoutMs` milliseconds in any case, with those
   * that are left as `unfinished`: they continue to be served.
   * Errors: the reason of `signal`, if that is aborted before; the server goes on draining. RangeError (timeoutMs is no time), and
   * it does not begin to.
   */
  async drain(options: { readonly timeoutMs?: number; readonly signal?: AbortSignal } = {}): Promise<Unfinished> {
    const { timeoutMs = Infinity, signal } = options;
    checkTime('timeoutMs', timeoutMs);
    this.#stopListening('the server is draining');
    if (!(await unlessAborted(within(timeoutMs, this.#allOver()), signal))) return this.#unfinished();
    return this.close();
  }

  /** `await using server = …`: the server is closed where its block ends. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  /** Stop accepting and close every socket now. Devices are closed as soon as their requests in flight finish. */
  destroy(): void {
    this.#stop();
    for (const connection of this.#open.values()) {
      this.#guard('abort', () => connection.abort('the server was stopped'));
    }
  }

  async #shutDown(graceMs: number, refuse: boolean): Promise<Unfinished> {
    this.#stop();
    for (const connection of this.#open.values()) this.#guard('shutdown', () => connection.shutdown({ refuse }));
    if (await within(graceMs, this.#allOver())) return { unfinished: [] };
    this.destroy();
    await within(FORCED_CLOSE_WAIT_MS, this.#allOver());
    const left = this.#unfinished();
    this.#reportUnfinished(left);
    return left;
  }

  #reportUnfinished({ unfinished }: Unfinished): void {
    for (const { id, peer, exportName, inFlight } of unfinished) {
      const waitsFor =
        inFlight === 0
          ? 'its export, which has not opened, answered or closed'
          : `${inFlight} ${inFlight === 1 ? 'request' : 'requests'} that its device has not finished`;
      const error = new Error(`the server was closed, but this connection waits for ${waitsFor}`);
      this.#observer.onError(error, { id, peer, exportName, source: 'server', method: 'close', expected: true });
    }
  }

  /** When all connections of this moment, and those that are accepted meanwhile, are over. */
  async #allOver(): Promise<void> {
    while (this.#open.size > 0) {
      await Promise.allSettled(Array.from(this.#open.values(), (connection) => connection.over));
    }
  }

  #unfinished(): Unfinished {
    return { unfinished: Array.from(this.#open.values(), stateOf) };
  }

  #stop(): void {
    this.#stopListening('the server is closed');
    for (const loop of this.#allLoops()) this.#guard('stop', () => loop.stop());
  }

  /** A loop or connection of the program's own fails: the others are still stopped. */
  #guard(method: string, call: () => void): void {
    try {
      call();
    } catch (error) {
      this.#observer.onError(error, { source: 'callback', method, expected: false });
    }
  }

  #stopListening(why: 'the server is draining' | 'the server is closed'): void {
    if (this.#whyClosed !== 'the server is closed') this.#whyClosed = why;
    for (const listener of this.#listeners) listener.close();
    this.#listeners.clear();
  }
}

/** The grace time of `close`, milliseconds. Errors: RangeError. */
export function graceOf({ graceMs = DEFAULT_GRACE_MS }: { readonly graceMs?: number } = {}): number {
  checkTime('graceMs', graceMs);
  return graceMs;
}

/** Errors: RangeError. */
function checkTime(name: string, value: unknown): void {
  if (typeof value === 'number' && value >= 0) return;
  throw new RangeError(`${name} must be a number of milliseconds from 0 on, or Infinity`);
}

/** A copy of what a connection says of itself. */
function stateOf(connection: ConnectionInfo): ConnectionInfo {
  const { id, peer, exportName, phase, hasEnded, openedAt, bytesRead, bytesWritten, requests, errors, inFlight } =
    connection;
  return { id, peer, exportName, phase, hasEnded, openedAt, bytesRead, bytesWritten, requests, errors, inFlight };
}

/** The key by which connections are counted: of a host, or a user. Undefined for internal peers, which no listener accepted. */
function peerKey(peer: Peer): string | undefined {
  if (peer.transport === 'internal') return undefined;
  if (peer.transport === 'tcp') return `host ${peer.host ?? peer.address}`;
  return peer.credentials === undefined ? `socket ${peer.address}` : `uid ${peer.credentials.uid}`;
}
