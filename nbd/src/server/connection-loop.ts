/**
 * The event loop of this thread as a server of connections. It owns what all connections of a loop share: buffers, shares
 * of its turns, its clock, the watch for stalled clients, and sockets that wait for their end. It admits every connection:
 * the server, which may be in another thread, decides that before.
 */

import type net from 'node:net';
import type { Duplex } from 'node:stream';
import type { ExportProvider, Peer } from '../block-device.js';
import type { AnyDevice } from '../device.js';
import { checkTls, type ServerTls } from '../protocol/tls-material.js';
import { BufferPool, type MemoryUse } from './buffer-pool.js';
import type { ConnectionOptions, LoopResources } from './connection-options.js';
import { Connection } from './connection.js';
import { GuardedObserver } from './guarded-observer.js';
import { HeldSockets } from './held-sockets.js';
import { receiveInPlace, type InPlaceSocket } from './in-place-socket.js';
import { Leftovers } from './leftovers.js';
import { limitsFrom, MIN_MEMORY_BYTES, type Limits } from './limits.js';
import { LoopShare } from './loop-share.js';
import { LoopTime } from './loop-time.js';
import type { ServerObserver } from './observer.js';
import { OverdueRequests } from './overdue-requests.js';
import { Offenders, type OffenderCounts } from './offenders.js';
import { poisoned } from './poisoned-device.js';
import type { AcceptedConnection, Progress, ServedConnection, ServingLoop } from './serving-loop.js';
import { StallWatch } from './stall-watch.js';

/** What a loop serves its connections with. */
export interface ConnectionLoopOptions {
  readonly provider: ExportProvider<AnyDevice>;
  /** Receives the events of this loop's connections; see ServerObserver. */
  readonly observer?: ServerObserver;
  /** Limits other than DEFAULT_LIMITS. The server enforces those of all connections together. */
  readonly limits?: Partial<Limits>;
  /** TLS for connections of listeners. */
  readonly tls?: ServerTls;
  /** Counts of violations that several loops share; by default the loop has its own. */
  readonly offenders?: OffenderCounts;
  /** See ServerOptions.poisonBuffers. */
  readonly poisonBuffers?: boolean | undefined;
}

/** A stream that the program accepted, and the bytes read from it. */
export interface AcceptedStream {
  readonly id: number;
  readonly socket: Duplex;
  readonly peer: Peer;
  readonly progress: Progress | undefined;
  readonly offender: string | undefined;
  readonly head?: Uint8Array | undefined;
}

/**
 * Serves connections on the event loop of the thread that creates it. A server creates one for its own thread; in a worker
 * thread the program creates one, and gives it the sockets whose descriptors the server's ServingLoop for that worker
 * sends.
 */
export class ConnectionLoop implements ServingLoop {
  readonly #tls: ServerTls | undefined;
  readonly #resources: LoopResources;
  readonly #stallWatch: StallWatch;
  readonly #connections = new Set<Connection>();
  /** Sockets that receive in place, until they are served. */
  readonly #prepared = new WeakMap<net.Socket, InPlaceSocket>();

  /** Errors: RangeError (a limit is invalid), TypeError (`tls` is not what it must be). */
  constructor(options: ConnectionLoopOptions) {
    const limits = limitsFrom(options.limits);
    if (options.tls !== undefined) checkTls(options.tls);
    this.#tls = options.tls;
    const provider = options.poisonBuffers === true ? poisoned(options.provider) : options.provider;
    this.#resources = {
      ...{ provider, observer: GuardedObserver.of(options.observer), limits },
      pool: new BufferPool(checkedMemory(limits.maxMemoryBytes)),
      loop: new LoopShare(),
      time: new LoopTime(),
      offenders: options.offenders ?? new Offenders(limits.maxViolationDelayMs),
      heldSockets: new HeldSockets(),
      leftovers: new Leftovers(),
      overdue: new OverdueRequests(limits.requestTimeoutMs),
    };
    const { pool, time } = this.#resources;
    this.#stallWatch = new StallWatch(() => this.#connections, pool, limits, time);
  }

  get memory(): MemoryUse {
    return this.#resources.pool.use;
  }

  shareMemory(bytes: number): void {
    this.#resources.pool.maxBytes = checkedMemory(bytes);
  }

  /**
   * The socket that replaces `accepted`: a new one over the same connection, if it can receive in place. `accepted` must not be
   * used any more. Only needed to set options of the socket before `serve`, which does the same.
   */
  prepare(accepted: net.Socket): net.Socket {
    // Under TLS the received bytes are ciphertext, which the TLS socket reads itself.
    if (this.#tls !== undefined || this.#prepared.has(accepted)) return accepted;
    const inPlace = receiveInPlace(accepted);
    if (inPlace === undefined) return accepted;
    this.#prepared.set(inPlace.socket, inPlace);
    return inPlace.socket;
  }

  serve(accepted: AcceptedConnection): ServedConnection {
    const { id, peer, progress, offender, state } = accepted;
    const socket = this.prepare(accepted.socket);
    const inPlace = this.#prepared.get(socket);
    return this.#open({ id, socket, peer, progress, offender, state, inPlace, tls: this.#tls });
  }

  /**
   * Serve a stream of this thread. TLS is not offered to internal peers: the program that hands over a stream vouches for
   * it.
   */
  serveStream(stream: AcceptedStream): ServedConnection {
    return this.#open({ ...stream, tls: stream.peer.transport === 'internal' ? undefined : this.#tls });
  }

  stop(): void {
    this.#stallWatch.stop();
    this.#resources.time.stop();
    this.#resources.heldSockets.release();
  }

  #open(options: ConnectionOptions): Connection {
    const connection = new Connection(options, this.#resources);
    this.#connections.add(connection);
    void connection.over.then(() => this.#connections.delete(connection));
    return connection;
  }
}

function checkedMemory(bytes: number): number {
  if (bytes >= MIN_MEMORY_BYTES) return bytes;
  throw new RangeError(`maxMemoryBytes is ${bytes} for an event loop, and must be ${MIN_MEMORY_BYTES} at least`);
}
