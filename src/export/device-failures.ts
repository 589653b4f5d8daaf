/** Where requests that failed for reasons of the store are told, for whoever logs or counts them. */
import { channel } from 'node:diagnostics_channel';
import type { DeviceErrorCode } from 'nbd-server-ts';

export interface DeviceFailure {
  /** What the client is told. */
  readonly code: DeviceErrorCode;
  readonly error: unknown;
}

/** Messages are DeviceFailures. */
export const deviceFailures = channel('sheepgate:device-failure');
