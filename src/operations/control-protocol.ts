/**
 * What both ends of the control socket agree on: HTTP with JSON over a unix socket, and `Upgrade: nbd` for data. Owns the limits,
 * the upgrade, and the answers about the daemon itself; answers about VDIs have the types of operations.ts, and the routes are in
 * src/daemon/control/. Fields may be added; clients must work with daemons of earlier versions.
 */

/** A request is a few names and numbers. */
export const MAX_REQUEST_BODY_BYTES = 64 * 1024;
/** A list of some hundred thousand VDIs. */
export const MAX_ANSWER_BYTES = 128 * 2 ** 20;
/** For a whole request to arrive; requests are not typed by hand. */
export const REQUEST_TIMEOUT_MS = 10_000;
/** For the daemon to take a connection. */
export const CONNECT_TIMEOUT_MS = 5_000;
/** For an answer: deleting or checking a large store takes long. */
export const ANSWER_TIMEOUT_MS = 30 * 60_000;
export const MAX_CONTROL_CONNECTIONS = 256;
/** A day; to keep a client out for longer, write an access rule. */
export const MAX_KEEP_OUT_MS = 24 * 60 * 60_000;
/** For the requests of a connection that was cut off to end; after that `client disconnect` reports how many are left. */
export const DISCONNECT_WAIT_MS = 30_000;

/** The value of the Upgrade header that turns a control connection into an NBD connection. */
export const NBD_UPGRADE = 'nbd';
/**
 * The daemon's name for an upgraded connection, in the answer to the upgrade. GET /sessions/ID answers when that
 * connection is over and its export closed: only then may a VDI be deleted or rolled back.
 */
export const SESSION_HEADER = 'sheepgate-session';

export interface ErrorAnswer {
  readonly error: { readonly code: string; readonly message: string };
}

export interface ConnectionStatus {
  readonly id: number;
  /** "tcp 127.0.0.1:4242", "unix PATH", "control". */
  readonly peer: string;
  /** null until the client has chosen an export. */
  readonly export: string | null;
  /** Identifies the client over all its connections, for people; null for commands. Absent in earlier versions. */
  readonly client?: string | null;
  /** null without an export, and for commands. */
  readonly access?: 'read-write' | 'exclusive' | 'read-only' | null;
  readonly openedAt: string;
  readonly bytesRead: number;
  readonly bytesWritten: number;
  readonly requests: number;
}

/** The result of cutting a connection off. */
export interface Disconnected {
  readonly connection: ConnectionStatus;
  /** Nothing that was received over it can have an effect any more. If false, `inFlight` requests are still under way. */
  readonly isOver: boolean;
  readonly inFlight: number;
}

/** The result of a reload: what is in force now, and what was not taken because its file is wrong. */
export interface ReloadReport {
  /** "TLS keys", "access rules": those that are configured and whose files were good. */
  readonly reloaded: readonly string[];
  /** Number of access rules in force; null without an access file. */
  readonly rules: number | null;
  readonly failures: readonly string[];
  readonly warnings: readonly string[];
}

export interface StatusAnswer {
  readonly version: string;
  readonly pid: number;
  readonly store: string;
  /** Identifies the store. Absent in earlier versions. */
  readonly identity?: string;
  readonly startedAt: string;
  readonly listeners: readonly string[];
  readonly connections: readonly ConnectionStatus[];
}
