/**
 * The server: listeners, the set of open connections, and the orderly end of both. It owns the admission and everything
 * that all connections share, whichever event loop serves them (see serving-loop.ts). It never reads or writes a
 * connection.
 */

import net from 'node:net';
import type { Duplex } from 'node:stream';
import type { ExportProvider, Peer, PeerCredentials } from '../block-device.js';
import type { ServerTls } from '../protocol/tls-material.js';
import { Admission, type Place } from './admission.js';
import type { MemoryUse } from './buffer-pool.js';
import { ConnectionLoop } from './connection-loop.js';
import { limitsFrom, type Limits } from './limits.js';
import { bindListener, ListenError, peerOf, type BoundAddress, type ListenOptions } from './listening.js';
import { HandOverError, type NegotiatedState } from './negotiated-state.js';
import type { ConnectionInfo, ServerObserver } from './observer.js';
import { Offenders } from './offenders.js';
import type { Progress, ServedConnection, ServingLoop, TakeConnection } from './serving-loop.js';

/** What a server serves, and how. Only the provider is required. */
export interface ServerOptions {
  readonly provider: ExportProvider;
  /** Receives the server's events; see ServerObserver. */
  readonly observer?: ServerObserver;
  /** Limits other than DEFAULT_LIMITS. */
  readonly limits?: Partial<Limits>;
  /**
   * TLS for connections of listeners. It is not offered to internal peers: the program that hands over a stream vouches for
   * it.
   */
  readonly tls?: ServerTls;
  /** Asks the kernel for the process at the other end of a unix socket; undefined if unknown. */
  readonly peerCredentials?: (socket: net.Socket) => PeerCredentials | undefined;
  /**
   * Called for every socket that a listener accepts, before it is served: for socket options that Node does not have. If the
   * connection is served in this thread, this object is its socket until it is closed.
   */
  readonly prepareSocket?: (socket: net.Socket) => void;
  /**
   * The event loops that serve accepted connections, each with its part of the connections and of the memory; by default
   * that of this thread. The server owns them: it stops them when it is closed.
   */
  readonly loops?: readonly ServingLoop[];
}

/** How long close() waits for requests in flight by default, milliseconds. */
export const DEFAULT_GRACE_MS = 10_000;
/** After the grace sockets are closed; devices get this long to finish their last requests, milliseconds. */
const FORCED_CLOSE_WAIT_MS = 1_000;

/** The progress of a connection that no listener accepted: the program that hands it over counts it. */
const NO_PLACE: Progress = { advanced: () => undefined, settled: () => undefined, leaving: () => undefined };

/**
 * An NBD server: it listens, admits connections, has them served by its event loops, and closes them in order. It may listen at
 * any number of addresses, or at none and be given connections.
 */
export class NbdServer {
  readonly #limits: Limits;
  readonly #observer: ServerObserver;
  readonly #peerCredentials: ServerOptions['peerCredentials'];
  readonly #prepareSocket: ServerOptions['prepareSocket'];
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
  #isClosed = false;
  #closing: Promise<void> | undefined;

  /** Errors: RangeError (a limit is invalid, or too little memory for so many loops). */
  constructor(options: ServerOptions) {
    const { provider, observer = {}, tls } = options;
    this.#observer = observer;
    this.#limits = limitsFrom(options.limits);
    this.#admission = new Admission(this.#limits);
    const offenders = new Offenders(this.#limits.maxViolationDelayMs);
    this.#here = new ConnectionLoop({ provider, observer, limits: this.#limits, offenders, ...(tls && { tls }) });
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
   * any other kind of file, is not.
   * Errors: ListenError.
   */
  async listen(options: ListenOptions): Promise<BoundAddress> {
    this.#mustBeOpen('the server is closed');
    // Half-open: a client that has sent its last request and closed its side still gets its answers.
    const listener = net.createServer({
      allowHalfOpen: true,
      noDelay: true,
      keepAlive: true,
      keepAliveInitialDelay: this.#limits.keepAliveMs,
      // A connection served in another thread must be read there, from the first byte on.
      pauseOnConnect: this.#servesElsewhere(),
    });
    // So no error event is without a listener; errors of listening reject listen().
    listener.on('error', () => undefined);
    listener.on('connection', (accepted) => this.#accepted(accepted, listener, options));
    const bound = await bindListener(listener, options);
    try {
      this.#mustBeOpen('the server was closed while it began to listen');
    } catch (error) {
      listener.close();
      throw error;
    }
    listener.on('error', (error) => this.#observer.onListenerError?.(error));
    this.#listeners.add(listener);
    if (bound.transport === 'unix') this.#admission.keepsRoomForUnix = true;
    return bound;
  }

  #mustBeOpen(message: string): void {
    if (this.#isClosed) throw new ListenError('CLOSED', message);
  }

  #accepted(accepted: net.Socket, listener: net.Server, options: ListenOptions): void {
    const loop = this.#nextLoop();
    const socket = loop === this.#here ? this.#here.prepare(accepted) : accepted;
    this.#prepareSocket?.(socket);
    this.#serve(loop, socket, peerOf(socket, listener, options, this.#peerCredentials));
  }

  /**
   * Serve a connection that the program accepted, from the greeting on (an HTTP upgrade, a socket pair).
   * @param options.peer the client; default an internal peer
   * @param options.head bytes that were already read from it
   * @returns its id, or undefined if it was refused (server closed or full) and its socket destroyed
   */
  serveConnection(socket: Duplex, options: { readonly peer?: Peer; readonly head?: Buffer } = {}): number | undefined {
    const { head } = options;
    const peer = options.peer ?? { transport: 'internal', address: `connection ${this.#nextId}` };
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
    this.#prepareSocket?.(served);
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
   * @returns false if there is no such connection
   */
  async disconnect(id: number, reason: string): Promise<boolean> {
    const connection = this.#open.get(id);
    if (connection === undefined) return false;
    connection.disconnect(reason);
    await connection.over;
    return true;
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
      socket.on('error', () => undefined);
      socket.destroy();
      this.#observer.onConnectionRefused?.({ peer, reason: place });
      return undefined;
    }
    const id = this.#nextId++;
    const connection = serve({ id, peer, progress: place ?? NO_PLACE, offender });
    this.#open.set(id, connection);
    if (place === undefined) this.#internalCount++;
    else place.occupant = connection;
    if (loop !== undefined) this.#count(loop, 1);
    void connection.over.then(() => {
      this.#open.delete(id);
      if (place === undefined) this.#internalCount--;
      else place.left();
      if (loop !== undefined) this.#count(loop, -1);
    });
    return id;
  }

  /**
   * Its place, or the reason why no further connection of this peer is served; undefined for internal peers, which have no
   * place.
   */
  #placeFor(key: string | undefined, peer: Peer): Place | string | undefined {
    const { maxConnections } = this.#limits;
    if (this.#isClosed) return 'the server is closed';
    if (key !== undefined) return this.#admission.enter(key, peer.transport);
    // Connections of listeners do not count: clients from outside must not use up the room of internal ones.
    if (this.#internalCount >= maxConnections) return `${maxConnections} connections are open, as many as allowed`;
    return undefined;
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
   * over and its device closed. After `graceMs` milliseconds the remaining sockets are closed; then only a device that never
   * finishes a request can be left (`connections` shows which).
   *
   * With `refuse: false` further requests are not answered at all. For a restart: clients that reconnect (Linux, qemu) repeat
   * unanswered requests, but report ESHUTDOWN as an I/O error.
   */
  close(options: { readonly graceMs?: number; readonly refuse?: boolean } = {}): Promise<void> {
    this.#closing ??= this.#shutDown(options.graceMs ?? DEFAULT_GRACE_MS, options.refuse ?? true);
    return this.#closing;
  }

  /** Stop accepting and close every socket now. Devices are closed as soon as their requests in flight finish. */
  destroy(): void {
    this.#stopListening();
    for (const connection of this.#open.values()) connection.abort('the server was stopped');
  }

  async #shutDown(graceMs: number, refuse: boolean): Promise<void> {
    this.#stopListening();
    for (const connection of this.#open.values()) connection.shutdown({ refuse });
    if (await within(graceMs, this.#allOver())) return;
    this.destroy();
    await within(FORCED_CLOSE_WAIT_MS, this.#allOver());
  }

  async #allOver(): Promise<void> {
    await Promise.all(Array.from(this.#open.values(), (connection) => connection.over));
  }

  #stopListening(): void {
    this.#isClosed = true;
    for (const loop of this.#allLoops()) loop.stop();
    for (const listener of this.#listeners) listener.close();
    this.#listeners.clear();
  }
}

/** Whether `work` is done within `timeoutMs`. */
async function within(timeoutMs: number, work: Promise<void>): Promise<boolean> {
  let timer: NodeJS.Timeout | undefined;
  const timeout = new Promise<boolean>((resolve) => {
    timer = setTimeout(() => resolve(false), timeoutMs);
  });
  const isDone = await Promise.race([work.then(() => true), timeout]);
  clearTimeout(timer);
  return isDone;
}

/** The key by which connections are counted: of a host, or a user. Undefined for internal peers, which no listener accepted. */
function peerKey(peer: Peer): string | undefined {
  if (peer.transport === 'internal') return undefined;
  if (peer.transport === 'tcp') return `host ${peer.host ?? peer.address}`;
  return peer.credentials === undefined ? `socket ${peer.address}` : `uid ${peer.credentials.uid}`;
}
