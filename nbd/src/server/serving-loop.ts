/**
 * The interface between a server and the event loops that serve its connections. A loop may be that of this thread
 * (ConnectionLoop), or of another thread behind a channel: no method needs an answer of the other thread at once.
 *
 * Per server: the listeners, the admission, the ids, the counts of violations, the choice of the loop, the memory of each loop,
 * and the shutdown. Per loop: buffers, shares of its turns, its clock, the watch for stalled clients, and sockets that wait for
 * their end.
 */

import type net from 'node:net';
import type { Duplex } from 'node:stream';
import type { Peer } from '../block-device.js';
import type { Occupant } from './admission.js';
import type { MemoryUse } from './buffer-pool.js';
import type { NegotiatedState } from './negotiated-state.js';
import type { ConnectionInfo } from './observer.js';

/** An event loop that serves connections. */
export interface ServingLoop {
  /** The memory that requests and replies of its connections use now, as last reported. */
  readonly memory: MemoryUse;
  /** Its part of the server's `maxMemoryBytes`: called before the first connection, and when it changes. */
  shareMemory(bytes: number): void;
  /** Serve a connection. The loop owns its socket from now on. */
  serve(accepted: AcceptedConnection): ServedConnection;
  /** Accept no further connections; those that are open are served to their end. */
  stop(): void;
}

/** A connection that was admitted and is to be served; nothing has been read from its socket. */
export interface AcceptedConnection {
  /** The server's number for it. */
  readonly id: number;
  /** Paused, if the server has loops in other threads. */
  readonly socket: net.Socket;
  readonly peer: Peer;
  /** Reports its progress to the server. */
  readonly progress: Progress;
  /** Whose violations are counted together with this peer's; undefined: they are not counted. */
  readonly offender: string | undefined;
  /** The state of a connection that another server negotiated. Undefined: it begins with the greeting. */
  readonly state?: NegotiatedState | undefined;
}

/** The progress of a connection, for the server's admission. Calls may come later than the events. */
export interface Progress {
  /** The handshake has advanced: this connection is not the next to make room. */
  advanced(): void;
  /** It has chosen an export. */
  settled(): void;
  /** The client has disconnected, or the server has finished with it. */
  leaving(): void;
  /**
   * Its client is gone, and it only waits for a device that does not answer: it no longer counts for any limit of connections,
   * though it is not over. May be called again.
   */
  left?(): void;
}

/** Takes over a socket with its state; see NbdServer.handOver. */
export type TakeConnection<T> = (socket: net.Socket, state: NegotiatedState) => T;

/** A connection as its server sees it, whichever loop serves it. */
export interface ServedConnection extends ConnectionInfo, Occupant {
  /** Resolves when the connection is over and its device closed. Never fails. */
  readonly over: Promise<void>;
  /** The accepted socket, below TLS; undefined if it is in another thread. */
  readonly transport: Duplex | undefined;
  /** Finish the requests in flight, refuse or drop further ones, then close. See `over`. */
  shutdown(options: { readonly refuse: boolean }): void;
  /** Close the socket now. The device is closed when its last request has finished. */
  abort(reason: string): void;
  /** The same, and nothing more of what was received is executed. */
  disconnect(reason: string): void;
  /** Stop, and hand the connection over; see NbdServer.handOver. */
  handOver<T>(take: TakeConnection<T>, signal?: AbortSignal): Promise<T>;
}
