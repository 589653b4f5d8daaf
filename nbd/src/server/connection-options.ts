/** What a connection is given: what all connections of its event loop share, and what is its own. */

import type { Duplex } from 'node:stream';
import type { ExportProvider, Peer } from '../block-device.js';
import type { ServerTls } from '../protocol/tls-material.js';
import type { BufferPool } from './buffer-pool.js';
import type { HeldSockets } from './held-sockets.js';
import type { InPlaceSocket } from './in-place-socket.js';
import type { Limits } from './limits.js';
import type { LoopShare } from './loop-share.js';
import type { LoopTime } from './loop-time.js';
import type { NegotiatedState } from './negotiated-state.js';
import type { ServerObserver } from './observer.js';
import type { OffenderCounts } from './offenders.js';
import type { Progress } from './serving-loop.js';

/** What all connections of an event loop share. */
export interface LoopResources {
  readonly provider: ExportProvider;
  readonly limits: Limits;
  readonly observer: ServerObserver;
  readonly pool: BufferPool;
  readonly loop: LoopShare;
  readonly time: LoopTime;
  readonly offenders: OffenderCounts;
  readonly heldSockets: HeldSockets;
}

/** What belongs to one connection. */
export interface ConnectionOptions {
  readonly id: number;
  readonly socket: Duplex;
  readonly peer: Peer;
  /** Bytes that were read from the socket before. */
  readonly head?: Buffer | undefined;
  /** Lets the socket receive in place, if it can. */
  readonly inPlace?: InPlaceSocket | undefined;
  /** Undefined: this peer is not offered TLS. */
  readonly tls: ServerTls | undefined;
  /** Whose violations are counted together with this peer's; undefined: they are not counted. */
  readonly offender: string | undefined;
  /** Receives its progress; undefined: it is not counted. */
  readonly progress?: Progress | undefined;
  /** The state in which another server handed it over. Undefined: it begins with the greeting. */
  readonly state?: NegotiatedState | undefined;
}
