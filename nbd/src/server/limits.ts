/**
 * The limits of a server: what one connection may hold, how long it may take. Every queue and loop of the library is bounded by
 * one of these. This file owns the numbers, their reasons, and which values are possible; it enforces none.
 */

import { nearestName } from './nearest-name.js';
import { checkObject } from '../kinds.js';

/**
 * The limits of a server, whole numbers. Bytes and milliseconds where the names say so. A time limit that can be switched off
 * is off with 0 or Infinity; other times are 2^31-1 ms at most, the longest that a timer of Node can wait (24 days).
 */
export interface Limits {
  /**
   * Connections from listeners open at the same time; further ones are closed at once. With a unix socket beside TCP, an
   * eighth of them is reserved for unix sockets. As many again may be handed over by the program (internal peers).
   */
  readonly maxConnections: number;
  /** The same for one peer: one address (tcp) or one user (unix). By default three quarters of `maxConnections`. */
  readonly maxConnectionsPerPeer: number;
  /**
   * Connections that have chosen no export and wait for their clients. One more closes the connection that has been quiet for
   * longest, of the peer that has most of them.
   */
  readonly maxHandshakes: number;
  /** A connection without a request received or in flight for so long is closed, milliseconds; 0: never. */
  readonly idleTimeoutMs: number;
  /**
   * After so long without input TCP keep-alive probes are sent, milliseconds, in whole seconds; without an answer the
   * connection is lost ten seconds later. 0: never.
   */
  readonly keepAliveMs: number;
  /**
   * From accept to the end of the handshake, and for each option, milliseconds; 0: no limit. The time that the server itself
   * needs is not counted: see `openTimeoutMs`.
   */
  readonly handshakeTimeoutMs: number;
  /** Added for each export listed to the client, milliseconds: it may query each of them on this connection. */
  readonly handshakeMsPerListedExport: number;
  /** For the server to open or describe one export, to list all, or to get its TLS keys, milliseconds; 0: no limit. */
  readonly openTimeoutMs: number;
  /**
   * For a device to answer a request that it answers later, milliseconds; 0: for ever. Then the client gets EIO, a sixteenth of
   * the time later at most (and a second at most). Until the device settles, the request keeps its memory and its place among
   * those in flight, and if it is a change, its range is not changed by others. Time spent waiting for memory, or for the
   * client, does not count.
   */
  readonly requestTimeoutMs: number;
  /** Longest option data that is parsed, bytes. Longer data are drained and answered NBD_REP_ERR_TOO_BIG. */
  readonly maxOptionBytes: number;
  /** Longest option data that are drained, bytes. Longer data close the connection. */
  readonly maxDrainedOptionBytes: number;
  /** Longest payload of a refused write that is drained, bytes. A longer one closes the connection. */
  readonly maxDrainedPayloadBytes: number;
  /** Requests of one connection in flight at the same time. */
  readonly maxInFlightRequests: number;
  /** Bytes of those requests. One request may exceed it, so that the largest one always fits. */
  readonly maxInFlightBytes: number;
  /** Reply bytes of one connection that the socket has not sent yet; beyond it no further request is started. */
  readonly maxUnsentBytes: number;
  /**
   * Memory for the requests and replies of all connections, bytes: a read until the client has taken its reply, a write until
   * it is done. Requests beyond it wait. In addition every connection may use 128 KiB, so that small requests always make progress.
   * At least MIN_MEMORY_BYTES.
   */
  readonly maxMemoryBytes: number;
  /**
   * While others wait for memory, a connection that holds some is closed after so long, milliseconds, if its client neither
   * reads replies nor sends the rest of a payload: less than MIN_MOVED_BYTES in that time. 0: never.
   */
  readonly memoryStallMs: number;
  /** The same for every connection at any time, if nothing at all was moved, milliseconds; 0: never. */
  readonly stallTimeoutMs: number;
  /**
   * The socket of a client that violates the protocol repeatedly is closed later each time, up to this many milliseconds; 0: at
   * once. Only the socket is left meanwhile; it does not count for `maxConnections`.
   */
  readonly maxViolationDelayMs: number;
  /** How long a closing connection waits for its client to read the last replies, milliseconds; 0: not at all. */
  readonly lingerMs: number;
}

/** Least memory, bytes: enough for two of the longest requests at a time. */
export const MIN_MEMORY_BYTES = 96 * 1024 * 1024;
/** See memoryStallMs: what a line of 64 kbit/s moves in ten seconds. */
export const MIN_MOVED_BYTES = 64 * 1024;

/** The limits of a server that is given no others. */
export const DEFAULT_LIMITS: Limits = {
  maxConnections: 1024,
  maxConnectionsPerPeer: 768,
  // A handshake takes some round trips. When hundreds of clients reconnect at once, some dozens are in it at a time.
  maxHandshakes: 256,
  // A disk may be mounted and quiet for days.
  idleTimeoutMs: 0,
  keepAliveMs: 60_000,
  handshakeTimeoutMs: 30_000,
  // `nbdinfo --list` and `qemu-nbd --list` ask two to four options for each export, one after the other.
  handshakeMsPerListedExport: 20,
  // Longer than remote storage may retry before it reports an error: so the client receives that error.
  openTimeoutMs: 120_000,
  // Only who wrote the device knows how long it may take: remote storage may stop for minutes and go on, but a guest that gets
  // EIO remounts its disk read-only. Clients that do not want to wait have time-outs of their own.
  requestTimeoutMs: 0,
  // A name of 4096 bytes with 65535 information requests does not fit; no client sends more than a dozen.
  maxOptionBytes: 64 * 1024,
  maxDrainedOptionBytes: 1024 * 1024,
  // Twice the payload that a client may always send (proto.md, "Size constraints").
  maxDrainedPayloadBytes: 64 * 1024 * 1024,
  // Linux queues 128 requests per nbd connection, libnbd's tools 64.
  maxInFlightRequests: 256,
  maxInFlightBytes: 64 * 1024 * 1024,
  maxUnsentBytes: 2 * 1024 * 1024,
  // The embedding program knows how much memory there is.
  maxMemoryBytes: 1024 * 1024 * 1024,
  memoryStallMs: 10_000,
  // A stopped client (a frozen guest, a debugger) is served when it continues; memory that others need it loses anyway.
  stallTimeoutMs: 0,
  // A guest that repeats a request that the server never accepts gains nothing by faster repetition.
  maxViolationDelayMs: 10_000,
  lingerMs: 5_000,
};

/** The default share of `maxConnections` for one peer: it leaves some for the others. */
export const DEFAULT_SHARE_OF_ONE_PEER = 3 / 4;

/** The longest time that a timer of Node can wait, milliseconds: it fires at once for a longer one. */
export const MAX_TIMER_MS = 2 ** 31 - 1;

/** The values that a limit may have. */
interface Range {
  readonly least: number;
  readonly most: number;
  /** 0 and Infinity mean that there is no limit. */
  readonly canBeOff?: boolean;
}

const TIME: Range = { least: 0, most: MAX_TIMER_MS };
const TIME_OR_NEVER: Range = { ...TIME, canBeOff: true };
const COUNT: Range = { least: 1, most: Number.MAX_SAFE_INTEGER };

const RANGES: Readonly<Record<keyof Limits, Range>> = {
  maxConnections: COUNT,
  maxConnectionsPerPeer: COUNT,
  maxHandshakes: COUNT,
  idleTimeoutMs: TIME_OR_NEVER,
  keepAliveMs: TIME_OR_NEVER,
  handshakeTimeoutMs: TIME_OR_NEVER,
  handshakeMsPerListedExport: TIME,
  openTimeoutMs: TIME_OR_NEVER,
  requestTimeoutMs: TIME_OR_NEVER,
  maxOptionBytes: COUNT,
  maxDrainedOptionBytes: { ...COUNT, least: 0 },
  maxDrainedPayloadBytes: { ...COUNT, least: 0 },
  maxInFlightRequests: COUNT,
  maxInFlightBytes: COUNT,
  maxUnsentBytes: COUNT,
  maxMemoryBytes: { ...COUNT, least: MIN_MEMORY_BYTES },
  memoryStallMs: TIME_OR_NEVER,
  stallTimeoutMs: TIME_OR_NEVER,
  maxViolationDelayMs: TIME,
  lingerMs: TIME,
};

/**
 * `given` with defaults for what is missing or undefined; a time limit that is off is 0. Errors: RangeError if a value is
 * impossible, or there is no limit of that name.
 */
export function limitsFrom(given: Partial<Limits> = {}): Limits {
  checkObject(given, 'limits');
  const said: Partial<Record<keyof Limits, number>> = {};
  for (const [name, value] of Object.entries(given) as [string, unknown][]) {
    if (!isLimit(name)) throw new RangeError(unknownLimit(name));
    if (value !== undefined) said[name] = checked(name, value);
  }
  const maxConnections = said.maxConnections ?? DEFAULT_LIMITS.maxConnections;
  const maxConnectionsPerPeer = Math.ceil(maxConnections * DEFAULT_SHARE_OF_ONE_PEER);
  return { ...DEFAULT_LIMITS, maxConnectionsPerPeer, ...said };
}

/** A time limit that may be off, for calculations with it, milliseconds: Infinity if it is off. */
export function orNever(timeoutMs: number): number {
  return timeoutMs === 0 ? Infinity : timeoutMs;
}

function isLimit(name: string): name is keyof Limits {
  return Object.hasOwn(RANGES, name);
}

function unknownLimit(name: string): string {
  const meant = nearestName(name, Object.keys(RANGES));
  return `there is no limit ${JSON.stringify(name)}${meant === undefined ? '' : `; is ${meant} meant?`}`;
}

/** Errors: RangeError. */
function checked(name: keyof Limits, value: unknown): number {
  const { least, most, canBeOff = false } = RANGES[name];
  if (canBeOff && value === Infinity) return 0;
  if (typeof value === 'number' && Number.isInteger(value) && value >= least && value <= most) return value;
  const off = canBeOff ? ', or Infinity (off, like 0)' : '';
  const shown = typeof value === 'number' ? String(value) : `a value of type ${typeof value}`;
  throw new RangeError(`${name} is ${shown}, and must be a whole number from ${least} to ${most}${off}`);
}
