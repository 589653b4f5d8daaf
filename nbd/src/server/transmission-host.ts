/** What the transmission phase and its parts need of their connection: nothing of its socket's life, nothing of its peer. */

import type { Duplex } from 'node:stream';
import type { BufferPool } from './buffer-pool.js';
import type { Limits } from './limits.js';
import type { LoopShare } from './loop-share.js';
import type { ServerObserver } from './observer.js';

export interface TransmissionHost {
  readonly id: number;
  readonly exportName: string | undefined;
  readonly socket: Duplex;
  readonly pool: BufferPool;
  readonly loop: LoopShare;
  readonly limits: Limits;
  readonly observer: ServerObserver;
  /** The client said goodbye: answer what is in flight, then close. */
  disconnectRequested(): void;
  /** The client broke the protocol: close now. */
  protocolViolated(reason: string): void;
}
