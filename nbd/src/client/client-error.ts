/** The one error class of the client, and its codes. */

import type { DeviceErrorCode } from '../block-device.js';

/**
 * The NBD error of a failed request; UNKNOWN_EXPORT, POLICY, UNSUPPORTED, INVALID, TLS_REQUIRED and REFUSED for a failed
 * option; TLS_FAILED if TLS was asked for and could not be had; PROTOCOL if the server does not speak NBD; CLOSED if the connection is gone or in the wrong phase.
 */
export type NbdClientErrorCode =
  | DeviceErrorCode
  | 'UNKNOWN_EXPORT'
  | 'POLICY'
  | 'UNSUPPORTED'
  | 'INVALID'
  | 'TLS_REQUIRED'
  | 'TLS_FAILED'
  | 'REFUSED'
  | 'PROTOCOL'
  | 'CLOSED';

/** What went wrong, with the server's words where it said some. */
export class NbdClientError extends Error {
  /** Where in the export a request failed, if the server told. */
  readonly offset: number | undefined;

  constructor(
    readonly code: NbdClientErrorCode,
    message: string,
    options?: ErrorOptions & { readonly offset?: number | undefined },
  ) {
    super(message, options);
    this.name = 'NbdClientError';
    this.offset = options?.offset;
  }
}
