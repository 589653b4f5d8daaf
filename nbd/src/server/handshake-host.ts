/**
 * The interface between a handshake and its connection, and how a handshake ends. It keeps them apart: the handshake never
 * touches the socket, and the connection contains no options.
 */

import type { ExportInfo, ExportProvider, Geometry, Peer } from '../block-device.js';
import type { ByteReader } from '../protocol/byte-reader.js';
import type { TlsMode } from '../protocol/tls-material.js';
import type { Negotiated } from '../protocol/wire.js';
import type { ClientExport } from './client-export.js';
import type { ServedDevice } from './geometry.js';
import type { HandshakeClock } from './handshake-clock.js';
import type { Limits } from './limits.js';

/** What the handshake needs of its connection. */
export interface HandshakeHost {
  readonly peer: Peer;
  readonly provider: ExportProvider;
  readonly limits: Limits;
  readonly reader: ByteReader;
  readonly clock: HandshakeClock;
  readonly isShuttingDown: boolean;
  /** Whether this peer may, or must, begin TLS. Undefined: this server has no TLS. */
  readonly tlsMode: TlsMode | undefined;
  readonly export: ClientExport;
  /**
   * Send `acknowledgement` as the last bytes in the clear and do the TLS handshake; `peer` and `reader` are those under TLS
   * afterwards.
   */
  startTls(acknowledgement: Buffer): Promise<void>;
  /** The client has sent an option. */
  advanced(): void;
  /** Resolves when the socket has written the bytes; rejects when it is closed. */
  send(bytes: Buffer): Promise<void>;
}

/** An export that has passed the check: it can be announced and served. */
export interface CheckedExport {
  readonly device: ServedDevice;
  readonly geometry: Geometry;
  readonly info: ExportInfo;
}

/** How a handshake ended: with the transmission phase, or with the connection to be closed after its last answer. */
export type HandshakeOutcome =
  | {
      readonly next: 'transmission';
      readonly negotiated: Negotiated;
      readonly device: ServedDevice;
      readonly geometry: Geometry;
      readonly exportName: string;
    }
  | { readonly next: 'close'; readonly reason: string };

/** The client violated the protocol, or sent a request that can only be refused by closing: the connection ends at once. */
export class HandshakeError extends Error {
  constructor(message: string) {
    super(message);
    this.name = 'HandshakeError';
  }
}
