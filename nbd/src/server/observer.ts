/**
 * Events that a server reports to the embedding program. It owns their shapes; it depends on no logger, and nothing in the
 * library depends on an observer.
 */

import type { DeviceErrorCode, Peer } from '../block-device.js';
import type { commandName } from '../protocol/wire.js';

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
  /** Its name, as in COMMAND_NAMES. */
  readonly command: ReturnType<typeof commandName>;
  /** NBD_CMD_FLAG_* bits. */
  readonly flags: number;
  readonly offset: number;
  readonly length: number;
  /** The NBD error value it is refused with before it reaches the device; 0 if it is executed. */
  readonly refusedWith: number;
}

/** A request that was answered. */
export interface RequestDoneEvent {
  readonly id: number;
  /** Its name, as in COMMAND_NAMES. */
  readonly command: ReturnType<typeof commandName>;
  /** NBD_CMD_FLAG_* bits. */
  readonly flags: number;
  readonly offset: number;
  readonly length: number;
  /** From the call of the device to its answer, milliseconds with a fraction; 0 if the device was not called. */
  readonly durationMs: number;
  /** The error that the client got; undefined: it succeeded. */
  readonly error: DeviceErrorCode | undefined;
  /** The server refused it, and the device was not called. */
  readonly isRefused: boolean;
}

/** Where an error came from. Fields that do not apply are undefined. */
export interface ErrorContext {
  /** The id of the connection. */
  readonly id?: number | undefined;
  readonly peer?: Peer | undefined;
  readonly exportName?: string | undefined;
  /**
   * What failed: a method of a device, or of the provider; an observer; another callback of the options (`prepareSocket`,
   * a serving loop, …); the server itself.
   */
  readonly source: 'device' | 'provider' | 'observer' | 'callback' | 'server';
  /** The method or callback, for example 'read' or 'prepareSocket'. */
  readonly method?: string | undefined;
  /** The command of a failed request, as in COMMAND_NAMES, and its range, bytes. */
  readonly command?: ReturnType<typeof commandName> | undefined;
  readonly offset?: number | undefined;
  readonly length?: number | undefined;
  /**
   * A DeviceError, an error of the system that NBD has a value for, or an ExportError: the client was told what has happened.
   * False: it is a bug, and the client got EIO without its text.
   */
  readonly expected: boolean;
}

/**
 * Callbacks of a server, all optional. What they throw, or reject with, ends nothing: it becomes a process warning. They may
 * be called from inside a request, so they should be quick.
 */
export interface ServerObserver {
  /** A client has chosen an export and may send requests. */
  onConnectionOpen?(event: ConnectionOpenEvent): void;
  /**
   * A connection is over, and its device is closed. Called for every connection, also without an export. After repeated
   * violations its socket may stay open for a while (Limits.maxViolationDelayMs).
   */
  onConnectionClose?(event: ConnectionCloseEvent): void;
  /** A connection was closed at once: there are too many, or it could not be served. */
  onConnectionRefused?(event: ConnectionRefusedEvent): void;
  /** Every request as received, for debugging. Costs nothing if the server was made without it. */
  onRequest?(event: RequestEvent): void;
  /** Every request that was answered, with its time and its error. Costs nothing if the server was made without it. */
  onRequestDone?(event: RequestDoneEvent): void;
  /**
   * A device, the provider, or another callback failed: everything that they throw or reject with, except answers
   * (ExportErrors other than FAILED, and ENOTSUP to a request with FAST_ZERO); or they do not answer, and the server tells that.
   * Without this callback every error becomes a process warning of the type NbdServerWarning, at most one a second.
   */
  onError?(error: unknown, context: ErrorContext): void;
  /** A listener failed to accept (out of file descriptors, for example); it continues to listen. */
  onListenerError?(error: Error): void;
}
