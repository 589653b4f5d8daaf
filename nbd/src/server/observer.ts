/**
 * What a server tells the program it is embedded in. It owns the shapes of these reports; it depends on no logger and
 * nothing in the library depends on anybody listening.
 */

import type { Peer } from '../block-device.js';

/** A connection as it is now. */
export interface ConnectionInfo {
  readonly id: number;
  readonly peer: Peer;
  /** Undefined until the handshake has chosen an export. */
  readonly exportName: string | undefined;
  /** 'closing': also while requests of a client that has said goodbye are still worked on. */
  readonly phase: 'handshake' | 'transmission' | 'closing';
  /** Nothing that was received is under way, or will be carried out: only the socket is left, until its client closes it. */
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
  /** How often in a row this peer has lately broken the protocol on this export: 0 for all but a few. */
  readonly violations: number;
}

/** A connection is over. */
export interface ConnectionCloseEvent {
  readonly id: number;
  readonly peer: Peer;
  /** Undefined if the handshake never chose an export. */
  readonly exportName: string | undefined;
  /** The last export that it asked for and did not get, if it has got none. */
  readonly refused: string | undefined;
  /** In words, for a log: who ended the connection and why. */
  readonly reason: string;
  /** If the client broke the protocol: how often in a row, this time included; else 0. */
  readonly violations: number;
  /** It had chosen no export, or was done, and made room for another connection. */
  readonly isCrowdedOut: boolean;
  readonly bytesRead: number;
  readonly bytesWritten: number;
  readonly requests: number;
  readonly errors: number;
  readonly durationMs: number;
}

/** A connection was not let in. */
export interface ConnectionRefusedEvent {
  readonly peer: Peer;
  /** In words, for a log: which bound was reached. */
  readonly reason: string;
}

/** A request as it came, before the device is asked. */
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

/** Callbacks of a server, all optional. They must not throw: what they throw is not caught. */
export interface ServerObserver {
  /** A client has chosen an export and may send requests. */
  onConnectionOpen?(event: ConnectionOpenEvent): void;
  /**
   * A connection is over, its device is closed. Called for every connection, also one that chose no export. After
   * repeated violations its socket may stay open for a while (Limits.maxViolationDelayMs).
   */
  onConnectionClose?(event: ConnectionCloseEvent): void;
  /** A connection was closed as soon as it came: there are too many. */
  onConnectionRefused?(event: ConnectionRefusedEvent): void;
  /** Every request, for debugging. Costs nothing while it is not set. */
  onRequest?(event: RequestEvent): void;
  /** A device or provider threw something that is neither a DeviceError nor an ExportError: a bug, answered EIO. */
  onDeviceError?(error: unknown, context: { readonly id: number; readonly exportName: string | undefined }): void;
  /** A listener failed to accept (out of file descriptors, for example); it goes on listening. */
  onListenerError?(error: Error): void;
}
