/** The one error class of the client, and its codes. */

import type { DeviceErrorCode } from '../block-device.js';
import { brand } from '../brand.js';

/**
 * The NBD error of a failed request; UNKNOWN_EXPORT, POLICY, UNSUPPORTED, INVALID, TLS_REQUIRED and REFUSED for a failed
 * option; TLS_FAILED if TLS is required and failed; PROTOCOL if the server violates the protocol; CLOSED if the connection
 * is closed or in the wrong phase.
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

/** A failure of the client, with the server's message if there is one. */
export class NbdClientError extends Error {
  static {
    brand(this, 'NbdClientError');
  }

  /** The offset in the export at which a request failed, if the server sent it. */
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
