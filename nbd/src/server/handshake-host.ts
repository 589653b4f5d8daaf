/**
 * What the handshake and its connection ask of each other, and how a handshake ends. Interfaces only: the handshake never
 * touches the socket, and the connection knows nothing of options.
 */

import type { ExportInfo, ExportProvider, Geometry, Peer } from '../block-device.js';
import type { ByteReader } from '../protocol/byte-reader.js';
import type { TlsMode } from '../protocol/tls.js';
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
  /** How this peer may, or must, begin TLS. Undefined: this server knows no TLS at all. */
  readonly tlsMode: TlsMode | undefined;
  readonly export: ClientExport;
  /** Send `acknowledgement` as the last bytes in the clear and shake hands; `peer` and `reader` are of TLS afterwards. */
  startTls(acknowledgement: Buffer): Promise<void>;
  /** The client has asked for something: it is not idling. */
  advanced(): void;
  /** Resolves when the socket has taken the bytes; fails when it is gone. */
  send(bytes: Buffer): Promise<void>;
}

/** An export that can be announced, and served. */
export interface CheckedExport {
  readonly device: ServedDevice;
  readonly geometry: Geometry;
  readonly info: ExportInfo;
}

/** How a handshake ended: in the transmission phase, or with the connection to be closed after what was sent. */
export type HandshakeOutcome =
  | {
      readonly next: 'transmission';
      readonly negotiated: Negotiated;
      readonly device: ServedDevice;
      readonly geometry: Geometry;
      readonly exportName: string;
    }
  | { readonly next: 'close'; readonly reason: string };

/** The client broke a MUST, or asked for what can only be refused by closing: the connection ends at once. */
export class HandshakeError extends Error {
  constructor(message: string) {
    super(message);
    this.name = 'HandshakeError';
  }
}
