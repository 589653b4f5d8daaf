/** The channel for requests that failed because of the store. Subscribers log or count them. */
import { channel } from 'node:diagnostics_channel';
import type { DeviceErrorCode, Peer } from 'nbd-server-ts';

export interface DeviceFailure {
  /** What the client gets. */
  readonly code: DeviceErrorCode;
  /** The store's own error, which names files and nodes. */
  readonly error: unknown;
  /** The VDI or snapshot, by its own name, whatever export name the client used. */
  readonly disk: string;
  readonly exportName: string;
  readonly peer: Peer;
}

/** Messages are DeviceFailures. */
export const deviceFailures = channel('sheepgate:device-failure');
