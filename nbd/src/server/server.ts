/**
 * The server: listeners, the set of open connections, and the orderly end of both. It owns who is let in, and what is one
 * for all connections, whichever event loop serves them (see serving-loop.ts); what happens on a connection is the
 * connection's affair.
 */

import net from 'node:net';
import type { Duplex } from 'node:stream';
import type { ExportProvider, Peer, PeerCredentials } from '../block-device.js';
import type { ServerTls } from '../protocol/tls.js';
import { Admission, type Place } from './admission.js';
import type { MemoryUse } from './buffer-pool.js';
import { ConnectionLoop } from './connection-loop.js';
import { limitsFrom, type Limits } from './limits.js';
import { bindListener, ListenError, peerOf, type BoundAddress, type ListenOptions } from './listening.js';
import { HandOverError, type NegotiatedState } from './negotiated-state.js';
import type { ConnectionInfo, ServerObserver } from './observer.js';
import { Offenders } from './offenders.js';
import type { Progress, ServedConnection, ServingLoop, TakeConnection } from './serving-loop.js';

/** What a server serves, and how. Only the provider is needed. */
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
   * socket's own object until it is closed, if the connection is served in this thread.
   */
  readonly prepareSocket?: (socket: net.Socket) => void;
  /**
   * The event loops that serve what listeners accept, each of them its part of the connections and of the memory; by default
   * that of this thread. They are the server's: it stops them when it is closed.
   */
  readonly loops?: readonly ServingLoop[];
}

/** How long close() waits for requests in flight if not told otherwise. */
export const DEFAULT_GRACE_MS = 10_000;
/** After the grace, sockets are gone; devices get this long to finish their last requests. */
const FORCED_CLOSE_WAIT_MS = 1_000;

/** The place of a connection that no listener has accepted: whoever hands it over keeps count of it as well. */
const NO_PLACE: Progress = { advanced: () => undefined, settled: () => undefined, leaving: () => undefined };

/**
 * An NBD server: it listens, lets connections in, has them served by its event loops, and ends them in order. It may listen
 * at any number of addresses, or at none and be given connections.
 */
export class NbdServer {
  readonly #limits: Limits;
  readonly #observer: ServerObserver;
  readonly #peerCredentials: ServerOptions['peerCredentials'];
  readonly #prepareSocket: ServerOptions['prepareSocket'];
  readonly #admission: Admission;
  /** Open connections that were handed over. */
  #internalCount = 0;
  /** This thread's loop: it serves streams, which cannot leave it, and by default everything. */
  readonly #here: ConnectionLoop;
  /** Those that serve what listeners accept, with the number of connections that each has. */
  readonly #loops: Map<ServingLoop, number>;
  readonly #listeners = new Set<net.Server>();
  readonly #open = new Map<number, ServedConnection>();
  #nextId = 1;
  #isClosed = false;
  #closing: Promise<void> | undefined;

  /** @throws RangeError if a limit is none, or there is too little memory for so many loops */
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

  /** The connections open now, by id: `size` counts them, iterating tells about them. */
  get connections(): ReadonlyMap<number, ConnectionInfo> {
    return this.#open;
  }

  /** The memory that requests and replies take now. */
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
   * Listen at an address; may be called several times. A socket file left behind by a server that is gone is replaced;
   * one that somebody listens on, and any other kind of file, is not.
   * @throws ListenError
   */
  async listen(options: ListenOptions): Promise<BoundAddress> {
    this.#mustBeOpen('the server is closed');
    // Half-open: a client that has sent its last request and shut its side down still gets its answers.
    const listener = net.createServer({
      allowHalfOpen: true,
      noDelay: true,
      keepAlive: true,
      keepAliveInitialDelay: this.#limits.keepAliveMs,
      // What is served elsewhere must be read there, from the first byte on.
      pauseOnConnect: this.#servesElsewhere(),
    });
    // There is always somebody to hear of an error; who asked to listen hears of those of listening.
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
   * Serve a connection that somebody else accepted, from the greeting on (an HTTP upgrade, a socket pair).
   * @param options.peer who it is; default an internal peer
   * @param options.head bytes that were already read from it
   * @returns its id, or undefined if it was refused (server closed or full) and its socket destroyed
   */
  serveConnection(socket: Duplex, options: { readonly peer?: Peer; readonly head?: Buffer } = {}): number | undefined {
    const { head } = options;
    const peer = options.peer ?? { transport: 'internal', address: `connection ${this.#nextId}` };
    return this.#letIn(socket, peer, (about) => this.#here.serveStream({ ...about, socket, head }));
  }

  /**
   * Go on with a connection that another server, of this process or of another one, has handed over. The export is opened
   * again, by its own name; if it is not any more what the client was told of, the connection is closed with that as the
   * reason. It is counted like one that a listener accepted.
   * @param socket the client's; nobody has read from it since the state was taken
   * @returns its id, or undefined if it was refused (server closed or full) and its socket destroyed
   */
  continueConnection(socket: net.Socket, state: NegotiatedState): number | undefined {
    // A client that has sent its last request and shut its side down still gets its answers.
    socket.allowHalfOpen = true;
    const loop = this.#nextLoop();
    const served = loop === this.#here ? this.#here.prepare(socket) : socket;
    this.#prepareSocket?.(served);
    return this.#serve(loop, served, state.peer, state);
  }

  /**
   * Give a connection away, to be continued elsewhere: it stops between two requests, those in flight are answered, and
   * `take` is called with its socket and its state. `take` has to do at once, not later, whatever it wants to do with the
   * socket: when it returns the socket is destroyed here, so it will duplicate the descriptor. (Sending the socket to a child
   * process is possible only if nothing is `unsent`: Node would go on sending that.) The state is plain data.
   *
   * Resolves with what `take` returned when the device is closed, as for a client that was lost. If `take` throws, or
   * `signal` is aborted before, the connection goes on here.
   * @throws HandOverError NOT_READY before it has an export, ENDING if it is over or about to be, TLS if it is encrypted,
   *   NOT_A_SOCKET if it is a stream of this process, ABORTED by `signal`
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
   * Cut a connection off. When it resolves, its device is closed: nothing that was received from it is under way, and nothing
   * more of it will be carried out. The client is not told; one that connects again by itself will do so at once.
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
   * The stream that a connection came on, below TLS: to ask the system about its other end, not to be read or written.
   * Undefined if there is no such connection, or it is served in another thread.
   */
  transportOf(id: number): Duplex | undefined {
    return this.#open.get(id)?.transport;
  }

  #serve(loop: ServingLoop, socket: net.Socket, peer: Peer, state?: NegotiatedState): number | undefined {
    return this.#letIn(socket, peer, (about) => loop.serve({ ...about, socket, state }), loop);
  }

  /** Have a connection served, if there is room for it. `loop`: whose it is, if it counts for one. */
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

  /** Its place, if its kind has one; or why no further connection of this peer is served. */
  #placeFor(key: string | undefined, peer: Peer): Place | string | undefined {
    const { maxConnections } = this.#limits;
    if (this.#isClosed) return 'the server is closed';
    if (key !== undefined) return this.#admission.enter(key, peer.transport);
    // Whoever hands them over keeps count of them as well; strangers at the listeners keep none of them out.
    if (this.#internalCount >= maxConnections) return `${maxConnections} connections are open, as many as allowed`;
    return undefined;
  }

  /** The one that has fewest connections. */
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
   * Stop accepting, answer the requests in flight, refuse further ones with ESHUTDOWN, close. Resolves when every
   * connection is over and its device closed. What is not done after `graceMs` milliseconds is cut off; then only a
   * device that never finishes a request can be left (`connections` shows whose).
   *
   * With `refuse: false` further requests are not answered at all. For a server that will be back: clients that connect
   * again (Linux, qemu) repeat what was not answered, but make an I/O error of ESHUTDOWN.
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

/** Whose connections are counted together: a host's, a user's. Undefined for internal peers, who are none of a listener's. */
function peerKey(peer: Peer): string | undefined {
  if (peer.transport === 'internal') return undefined;
  if (peer.transport === 'tcp') return `host ${peer.host ?? peer.address}`;
  return peer.credentials === undefined ? `socket ${peer.address}` : `uid ${peer.credentials.uid}`;
}
