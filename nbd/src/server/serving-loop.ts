/**
 * What a server and the event loops that serve its connections ask of each other. A loop may be that of this thread
 * (ConnectionLoop), or one of another thread behind a channel: nothing here has to be answered at once but what is known
 * already.
 *
 * Per server: the listeners, who is let in (Admission), the ids, the counts of offenders, which loop serves whom, how much
 * memory each loop may use, and the common end. Per loop: buffers, shares of its turns, its clock, the look for clients that
 * do not do their part, sockets that wait for their end.
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
  /** The memory that requests and replies of its connections take now, as far as it is known here. */
  readonly memory: MemoryUse;
  /** Its part of the server's `maxMemoryBytes`: told before the first connection, and again when it changes. */
  shareMemory(bytes: number): void;
  /** Serve a connection. Its socket is the loop's from now on. */
  serve(accepted: AcceptedConnection): ServedConnection;
  /** Nobody is served any more but those that are. */
  stop(): void;
}

/** A connection that is to be served: nothing has been read from its socket, and it is let in. */
export interface AcceptedConnection {
  /** The server's number for it. */
  readonly id: number;
  /** Paused, if it was accepted by a server with loops elsewhere. */
  readonly socket: net.Socket;
  readonly peer: Peer;
  /** What the server is told of how it gets on. */
  readonly progress: Progress;
  /** Whose violations are counted together with this peer's; undefined: they are not counted. */
  readonly offender: string | undefined;
  /** It was negotiated already, by another server. Undefined: it begins with the greeting. */
  readonly state?: NegotiatedState | undefined;
}

/** How a connection gets on, for whoever counts connections. May be told later than it happened. */
export interface Progress {
  /** The client has gone a step further in the handshake: it is not the next to make room. */
  advanced(): void;
  /** It has chosen an export. */
  settled(): void;
  /** The client has said goodbye, or the server is done with it. */
  leaving(): void;
}

/** What `take` is given with the socket; see NbdServer.handOver. */
export type TakeConnection<T> = (socket: net.Socket, state: NegotiatedState) => T;

/** A connection as its server has it, whichever loop serves it. */
export interface ServedConnection extends ConnectionInfo, Occupant {
  /** Resolves when the connection is over and its device closed. Never fails. */
  readonly over: Promise<void>;
  /** What it came on, below TLS; undefined if that is not in this thread. */
  readonly transport: Duplex | undefined;
  /** Finish what is in flight, refuse or drop what comes, then close. See `over`. */
  shutdown(options: { readonly refuse: boolean }): void;
  /** Close the socket now. The device is closed when its last request has finished. */
  abort(reason: string): void;
  /** The same, and nothing more is carried out of what was received. */
  disconnect(reason: string): void;
  /** Stop, and give the connection away; see NbdServer.handOver. */
  handOver<T>(take: TakeConnection<T>, signal?: AbortSignal): Promise<T>;
}
