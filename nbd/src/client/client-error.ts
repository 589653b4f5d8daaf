/** The one error class of the client, and its codes. */

import type { DeviceErrorCode } from '../block-device.js';
import { brand } from '../brand.js';

/**
 * The NBD error of a failed request; UNKNOWN_EXPORT, POLICY, UNSUPPORTED, INVALID, TLS_REQUIRED and REFUSED for a failed
 * option; TLS_FAILED if TLS is required and failed; PROTOCOL if the server violates the protocol; CLOSED if the connection
 * is closed or in the wrong phase; TIMED_OUT if the server was silent for too long; ABORTED if the caller's signal was
 * aborted (`cause` is its reason).
 * Of a reconnecting client also EXPORT_CHANGED, if the export is not the same any more, and FLUSH_IN_DOUBT, if writes that
 * were answered before the connection was lost may not be durable.
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
  | 'CLOSED'
  | 'TIMED_OUT'
  | 'ABORTED'
  | 'EXPORT_CHANGED'
  | 'FLUSH_IN_DOUBT';

/** The same in every copy of this package, so that `instanceof` is true for errors of another copy. */
const BRAND = Symbol.for('nbd-server-ts.NbdClientError');

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
    Object.defineProperty(this, BRAND, { value: true });
  }

  /** Also true for errors of another copy of this package. */
  static override [Symbol.hasInstance](value: unknown): boolean {
    if (this !== NbdClientError) return Function.prototype[Symbol.hasInstance].call(this, value);
    return typeof value === 'object' && value !== null && BRAND in value;
  }
}
