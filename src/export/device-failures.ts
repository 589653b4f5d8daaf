/** Where requests that failed for reasons of the store are told, for whoever logs or counts them. */
import { channel } from 'node:diagnostics_channel';
import type { DeviceErrorCode, Peer } from 'nbd-server-ts';

export interface DeviceFailure {
  /** What the client is told. */
  readonly code: DeviceErrorCode;
  /** The store's own error, which names files and nodes. */
  readonly error: unknown;
  /** The VDI or snapshot, whatever name the client has opened it under. */
  readonly disk: string;
  readonly exportName: string;
  readonly peer: Peer;
}

/** Messages are DeviceFailures. */
export const deviceFailures = channel('sheepgate:device-failure');
