/** What the transmission phase and its parts need of their connection; not the end of its socket. */

import type { Duplex } from 'node:stream';
import type { Peer } from '../block-device.js';
import type { BufferPool } from './buffer-pool.js';
import type { ClientSignal } from './client-signal.js';
import type { GuardedObserver } from './guarded-observer.js';
import type { Limits } from './limits.js';
import type { LoopShare } from './loop-share.js';
import type { OverdueRequests } from './overdue-requests.js';

export interface TransmissionHost {
  readonly id: number;
  readonly peer: Peer;
  readonly exportName: string | undefined;
  readonly socket: Duplex;
  readonly pool: BufferPool;
  readonly loop: LoopShare;
  readonly overdue: OverdueRequests;
  /** See ExportInfo.countedAs. */
  readonly exportKey: string;
  readonly limits: Limits;
  readonly observer: GuardedObserver;
  /** Its signal goes to every method of the device. */
  readonly clientSignal: ClientSignal;
  /** The buffer that the transmission has chosen for the next bytes should be another one. */
  receiveElsewhere(): void;
  /** The client sent NBD_CMD_DISC: answer the requests in flight, then close. */
  disconnectRequested(): void;
  /** The client violated the protocol: close now. */
  protocolViolated(reason: string): void;
  /** Close the socket now, and execute nothing more. */
  disconnect(reason: string): void;
}
