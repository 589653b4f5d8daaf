/**
 * Events that a server reports to the embedding program. It owns their shapes; it depends on no logger, and nothing in the
 * library depends on an observer.
 */

import type { Peer } from '../block-device.js';

/** The present state of a connection. */
export interface ConnectionInfo {
  readonly id: number;
  readonly peer: Peer;
  /** Undefined until the handshake has chosen an export. */
  readonly exportName: string | undefined;
  /** 'closing': also while the last requests of a client that has disconnected are in flight. */
  readonly phase: 'handshake' | 'transmission' | 'closing';
  /** Nothing that was received is in flight or will be executed: only the socket is left, until its client closes it. */
  readonly hasEnded: boolean;
  /** Date.now() at accept. */
  readonly openedAt: number;
  /** Data of successful reads and writes, bytes. */
  readonly bytesRead: number;
  readonly bytesWritten: number;
  /** Requests received, and those answered with an error. */
  readonly requests: number;
  readonly errors: number;
  /** Requests the device is working on. */
  readonly inFlight: number;
}

/** A client has chosen an export. */
export interface ConnectionOpenEvent {
  readonly id: number;
  readonly peer: Peer;
  readonly exportName: string;
  /** How often in a row this peer has lately violated the protocol on this export: usually 0. */
  readonly violations: number;
}

/** A connection is over. */
export interface ConnectionCloseEvent {
  readonly id: number;
  readonly peer: Peer;
  /** Undefined if the handshake never chose an export. */
  readonly exportName: string | undefined;
  /** The last export that the client was refused, if it opened none. */
  readonly refused: string | undefined;
  /** For a log: which side ended the connection and why. */
  readonly reason: string;
  /** If the client violated the protocol: how often in a row, this time included; else 0. */
  readonly violations: number;
  /** It had chosen no export, or was leaving, and was closed to make room for another connection. */
  readonly isCrowdedOut: boolean;
  readonly bytesRead: number;
  readonly bytesWritten: number;
  readonly requests: number;
  readonly errors: number;
  readonly durationMs: number;
}

/** A connection was refused. */
export interface ConnectionRefusedEvent {
  readonly peer: Peer;
  /** For a log: which limit was reached. */
  readonly reason: string;
}

/** A request as received, before the device is called. */
export interface RequestEvent {
  readonly id: number;
  /** NBD_CMD_* number. */
  readonly type: number;
  /** NBD_CMD_FLAG_* bits. */
  readonly flags: number;
  readonly offset: number;
  readonly length: number;
  /** The NBD error value it is refused with before it reaches the device; 0 if it is executed. */
  readonly refusedWith: number;
}

/** Callbacks of a server, all optional. They must not throw: their errors are not caught. */
export interface ServerObserver {
  /** A client has chosen an export and may send requests. */
  onConnectionOpen?(event: ConnectionOpenEvent): void;
  /**
   * A connection is over, and its device is closed. Called for every connection, also without an export. After repeated
   * violations its socket may stay open for a while (Limits.maxViolationDelayMs).
   */
  onConnectionClose?(event: ConnectionCloseEvent): void;
  /** A connection was closed at once, since there are too many. */
  onConnectionRefused?(event: ConnectionRefusedEvent): void;
  /** Every request, for debugging. Costs nothing while it is not set. */
  onRequest?(event: RequestEvent): void;
  /** A device or provider threw something that is neither a DeviceError nor an ExportError: a bug, answered EIO. */
  onDeviceError?(error: unknown, context: { readonly id: number; readonly exportName: string | undefined }): void;
  /** A listener failed to accept (out of file descriptors, for example); it continues to listen. */
  onListenerError?(error: Error): void;
}
