/**
 * The bounds of a server: what one connection may hold, how long it may take. Every queue and loop of the library ends
 * at one of these. This file owns the numbers and why they are what they are; it enforces nothing.
 */

/** The bounds of a server. Bytes and milliseconds where the names say so. */
export interface Limits {
  /**
   * Connections from listeners open at the same time; further ones are closed at once. With a unix socket beside TCP, an
   * eighth of them is for unix sockets only. Of those that were handed over (internal peers) there may be as many again.
   */
  readonly maxConnections: number;
  /** Of those, connections of one peer: of one address (tcp) or one user (unix). By default DEFAULT_SHARE_OF_ONE_PEER of them. */
  readonly maxConnectionsPerPeer: number;
  /**
   * Of those, connections that have chosen no export, and whose clients are waited for. With one more, the one that has been
   * quiet for longest, of the peer that has most of them, is closed.
   */
  readonly maxHandshakes: number;
  /** Nothing asked and nothing to answer for so long ends a connection, milliseconds; 0: never. */
  readonly idleTimeoutMs: number;
  /** A TCP peer that has said nothing for so long is asked whether it is there, milliseconds; ten seconds later it is given up. */
  readonly keepAliveMs: number;
  /**
   * From accept to the end of option haggling, and for each option, milliseconds. What the server takes for its own part is
   * not counted: see `openTimeoutMs`.
   */
  readonly handshakeTimeoutMs: number;
  /** So much longer for each export that a client was told of: it may ask about every one, on this connection. */
  readonly handshakeMsPerListedExport: number;
  /** For the server to open or describe one export, or to list all, milliseconds. */
  readonly openTimeoutMs: number;
  /** Data of one option that is looked at, bytes. More is drained and answered NBD_REP_ERR_TOO_BIG. */
  readonly maxOptionBytes: number;
  /** Data of one option that is drained, bytes. More closes the connection. */
  readonly maxDrainedOptionBytes: number;
  /** Payload of a refused write that is drained, bytes. More closes the connection. */
  readonly maxDrainedPayloadBytes: number;
  /** Requests of one connection the device works on at the same time. */
  readonly maxInFlightRequests: number;
  /** Bytes of those requests. One request may overshoot it, so that the largest one always fits. */
  readonly maxInFlightBytes: number;
  /** Reply bytes of one connection that the socket has not taken yet; beyond it no further request is started. */
  readonly maxUnsentBytes: number;
  /**
   * Memory for the requests and replies of all connections, bytes: a read until the client has taken its reply, a write until
   * it is done. Who asks for more waits. Beside it every connection has 128 KiB, so that small requests always go on. At
   * least MIN_MEMORY_BYTES.
   */
  readonly maxMemoryBytes: number;
  /**
   * While others wait for memory, a connection that holds some and whose client does not take its replies, or does not send the
   * rest of a payload, is closed after so long, milliseconds: if it has moved less than MIN_MOVED_BYTES in that time.
   */
  readonly memoryStallMs: number;
  /** The same for everybody at any time, who has moved nothing at all, milliseconds; 0: never. */
  readonly stallTimeoutMs: number;
  /**
   * A client that breaks the protocol again and again is closed later each time, up to this many milliseconds; 0: at once.
   * Its socket, all that is left of it, is none of `maxConnections`.
   */
  readonly maxViolationDelayMs: number;
  /** How long a connection being closed may take to receive its last replies, milliseconds. */
  readonly lingerMs: number;
}

/** Less than this would not do for two of the longest requests at a time. */
export const MIN_MEMORY_BYTES = 96 * 1024 * 1024;
/** Of memoryStallMs: what a line of 64 kbit/s moves in ten seconds. */
export const MIN_MOVED_BYTES = 64 * 1024;

/** The bounds of a server that is not given others. */
export const DEFAULT_LIMITS: Limits = {
  maxConnections: 1024,
  maxConnectionsPerPeer: 768,
  // A handshake takes some round trips. When hundreds of clients come back at once no more than some dozens are in it.
  maxHandshakes: 256,
  // A disk may be mounted and quiet for days.
  idleTimeoutMs: 0,
  keepAliveMs: 60_000,
  handshakeTimeoutMs: 30_000,
  // `nbdinfo --list` and `qemu-nbd --list` ask two to four options for each export, one after the other.
  handshakeMsPerListedExport: 20,
  // More than a cluster may take to be asked again and again before it says no: the client hears that.
  openTimeoutMs: 120_000,
  // A name of 4096 bytes and 65535 information requests do not quite fit; no client asks for more than a dozen.
  maxOptionBytes: 64 * 1024,
  maxDrainedOptionBytes: 1024 * 1024,
  // Twice the payload that proto.md says is never an attack ("Size constraints").
  maxDrainedPayloadBytes: 64 * 1024 * 1024,
  // Linux queues 128 requests per nbd connection, libnbd's tools 64.
  maxInFlightRequests: 256,
  maxInFlightBytes: 64 * 1024 * 1024,
  maxUnsentBytes: 2 * 1024 * 1024,
  // A program that embeds the server knows better what there is.
  maxMemoryBytes: 1024 * 1024 * 1024,
  memoryStallMs: 10_000,
  // A client that is stopped (a frozen guest, a debugger) is served when it goes on; memory that others need it loses anyway.
  stallTimeoutMs: 0,
  // A guest that hangs on a request that no server takes hangs no better for being told so more often.
  maxViolationDelayMs: 10_000,
  lingerMs: 5_000,
};

/** Whoever takes all connections that one peer may have leaves some for the others. */
export const DEFAULT_SHARE_OF_ONE_PEER = 3 / 4;

/** `given`, and the defaults for what is not. An option that is there but undefined is one that is not given. */
export function limitsFrom(given: Partial<Limits> = {}): Limits {
  const entries: [string, number | undefined][] = Object.entries(given);
  const said = Object.fromEntries(entries.filter(([, value]) => value !== undefined)) as Partial<Limits>;
  const maxConnections = said.maxConnections ?? DEFAULT_LIMITS.maxConnections;
  const maxConnectionsPerPeer = Math.ceil(maxConnections * DEFAULT_SHARE_OF_ONE_PEER);
  return { ...DEFAULT_LIMITS, maxConnectionsPerPeer, ...said };
}
