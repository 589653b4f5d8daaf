/**
 * The event loop of this thread as one that serves connections. It owns what all connections of a loop share: their buffers,
 * their shares of its turns, its clock, the look for clients that do not do their part, and sockets that wait for their end.
 * It lets everybody in: who may come is decided before, by a server that may be in another thread.
 */

import type net from 'node:net';
import type { Duplex } from 'node:stream';
import type { ExportProvider, Peer } from '../block-device.js';
import type { ServerTls } from '../protocol/tls.js';
import { BufferPool, type MemoryUse } from './buffer-pool.js';
import type { ConnectionOptions, LoopResources } from './connection-options.js';
import { Connection } from './connection.js';
import { HeldSockets } from './held-sockets.js';
import { receiveInPlace, type InPlaceSocket } from './in-place-socket.js';
import { limitsFrom, MIN_MEMORY_BYTES, type Limits } from './limits.js';
import { LoopShare } from './loop-share.js';
import { LoopTime } from './loop-time.js';
import type { ServerObserver } from './observer.js';
import { Offenders, type OffenderCounts } from './offenders.js';
import type { AcceptedConnection, Progress, ServedConnection, ServingLoop } from './serving-loop.js';
import { StallWatch } from './stall-watch.js';

/** What the connections of a loop are served with. */
export interface ConnectionLoopOptions {
  readonly provider: ExportProvider;
  /** Told of this loop's connections; see ServerObserver. */
  readonly observer?: ServerObserver;
  /** Bounds other than DEFAULT_LIMITS. Those of connections in all are the server's to keep. */
  readonly limits?: Partial<Limits>;
  /** TLS for connections of listeners. */
  readonly tls?: ServerTls;
  /** Who has broken the protocol lately, if that is known for more than this loop. */
  readonly offenders?: OffenderCounts;
}

/** A stream that somebody else accepted, and what was read from it. */
export interface AcceptedStream {
  readonly id: number;
  readonly socket: Duplex;
  readonly peer: Peer;
  readonly progress: Progress | undefined;
  readonly offender: string | undefined;
  readonly head?: Buffer | undefined;
}

/**
 * The event loop of the thread that makes it, serving connections. A server makes one for its own thread; in a worker thread
 * the program makes one, and gives it the sockets whose descriptors come from the server's ServingLoop for that worker.
 */
export class ConnectionLoop implements ServingLoop {
  readonly #tls: ServerTls | undefined;
  readonly #resources: LoopResources;
  readonly #stallWatch: StallWatch;
  readonly #connections = new Set<Connection>();
  /** Sockets that receive into memory of ours, until they are served. */
  readonly #prepared = new WeakMap<net.Socket, InPlaceSocket>();

  /** @throws RangeError if a limit is none */
  constructor(options: ConnectionLoopOptions) {
    const limits = limitsFrom(options.limits);
    this.#tls = options.tls;
    this.#resources = {
      ...{ provider: options.provider, observer: options.observer ?? {}, limits },
      pool: new BufferPool(checkedMemory(limits.maxMemoryBytes)),
      loop: new LoopShare(),
      time: new LoopTime(),
      offenders: options.offenders ?? new Offenders(limits.maxViolationDelayMs),
      heldSockets: new HeldSockets(),
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
   * The socket that `accepted` is served as: another one, over the same connection, if it can receive into memory of ours.
   * `accepted` is not to be used any more. For whoever wants to set options of it before `serve`, which does the same.
   */
  prepare(accepted: net.Socket): net.Socket {
    // Under TLS what is received is ciphertext, which the TLS socket takes as it comes.
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

  /** Serve a stream of this thread. It is not offered TLS: who hands it over answers for it. */
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
