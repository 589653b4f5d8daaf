/**
 * What the server asks of an export. This is the one interface a user of the library implements; it knows offsets and
 * lengths and nothing of the wire. Methods may answer synchronously or later: the request loop awaits only promises.
 *
 * A device needs a size and four methods: read, write, flush, close. What else it can do it says in its geometry, and has
 * the method for it.
 */

import type { TlsIdentity } from './protocol/tls.js';

/** An answer at once, or a promise of it. */
export type Awaitable<T> = T | Promise<T>;

/** How an export looks to a client for the life of one connection. Sizes in bytes. */
export interface Geometry {
  readonly size: number;
  /** 1 to 65536, a power of two. Requests need not be aligned to anything below it. */
  readonly minimumBlockSize: number;
  readonly preferredBlockSize: number;
  readonly readOnly: boolean;
  readonly canFlush: boolean;
  /** `write`, `zero` and `trim` do as their `fua` says: durable before the answer. */
  readonly canFua: boolean;
  /** There is a method `trim`. */
  readonly canTrim: boolean;
  /** There is a method `zero`. */
  readonly canZero: boolean;
  /** A FAST_ZERO request is answered quickly or refused with ENOTSUP; never by writing zeros. */
  readonly canFastZero: boolean;
  /** There is a method `cache`. */
  readonly canCache: boolean;
  /** Several connections see each other's completed writes, and a flush on one covers all. */
  readonly multiConn: boolean;
  readonly rotational: boolean;
  /**
   * The meta contexts `extents` answers for, each named NAMESPACE:LEAF (proto.md, "Metadata querying"): 'base:allocation'
   * if the device can tell holes from data, and any of its own. `extents` is asked for those that were selected, which
   * are those that `describe` had.
   */
  readonly contexts: readonly string[];
  /** Those of `contexts` whose flags need more than 32 bits; only clients with extended headers can select them. */
  readonly wideContexts?: readonly string[];
}

/**
 * What a device says of itself: its size, and what differs from a writable disk in blocks of any size (preferably 4096
 * bytes) that can flush and nothing else. Whatever else it can do it has to say, so that the server announces nothing that
 * nobody has thought of.
 */
export type DeviceGeometry = Pick<Geometry, 'size'> & Partial<Geometry>;

/** How the zeros of a `zero` are to be made. */
export interface ZeroMode {
  /** The range must stay allocated (NBD_CMD_FLAG_NO_HOLE). */
  readonly noHole: boolean;
  /** Durable before the answer (NBD_CMD_FLAG_FUA). */
  readonly fua: boolean;
  /** Fail with ENOTSUP rather than be as slow as writing (NBD_CMD_FLAG_FAST_ZERO). */
  readonly fastZero: boolean;
}

/** The one meta context that NBD itself defines: what is allocated, and what reads as zeros. */
export const ALLOCATION_CONTEXT = 'base:allocation';
/** Flag of `base:allocation`: not allocated; a write may need new space. */
export const STATE_HOLE = 1 << 0;
/** Flag of `base:allocation`: reads as zeros. */
export const STATE_ZERO = 1 << 1;

/**
 * Receives extents in ascending order, each beginning where the last one ended. `flags` are the context's own: 32 bits,
 * or up to 2^53-1 for one of `wideContexts`. Neighbours may have the same flags. Returns false when it has enough.
 */
export type ExtentSink = (offset: number, length: number, flags: number) => boolean;

/**
 * An export, opened for one connection. Every range passed in is already validated against `geometry`. Errors are thrown
 * (or rejected) as `DeviceError`; anything else is answered EIO and logged.
 */
export interface BlockDevice {
  readonly geometry: DeviceGeometry;
  /** Fill `into` with the bytes at `offset`. */
  read(offset: number, into: Buffer): Awaitable<void>;
  /** `data` is the device's to use until the returned promise settles, not longer. */
  write(offset: number, data: Buffer, fua: boolean): Awaitable<void>;
  /** Everything answered before this call is durable when it answers. */
  flush(): Awaitable<void>;
  /** Called once, when the connection is gone and no request is in flight. `ending`: whether the client may come back. */
  close(ending: Ending): Awaitable<void>;
  /** The range reads as zeros afterwards. With `canZero`. */
  zero?(offset: number, length: number, mode: ZeroMode): Awaitable<void>;
  /** The range is not needed any more, and may read as anything. With `canTrim`. */
  trim?(offset: number, length: number, fua: boolean): Awaitable<void>;
  /** Bring the range into cache; a hint. With `canCache`. */
  cache?(offset: number, length: number): Awaitable<void>;
  /**
   * With `contexts`. What `context`, one that the client has selected, says of [offset, offset+length), reported to `sink` from `offset` on,
   * without reading data. May stop before the end, but not before the first extent; an extent may reach beyond the end.
   * Extents should begin and end at multiples of the minimum block size.
   */
  extents?(context: string, offset: number, length: number, sink: ExtentSink): Awaitable<void>;
  /**
   * Whether the range is known, from memory alone, to read as zeros. Asked before every read of a client that takes
   * holes, so it must be cheap; false is always allowed.
   */
  isHole?(offset: number, length: number): boolean;
}

/** A device that says all of its geometry and has every method but `isHole`: what wraps another one may rely on that. */
export type CompleteDevice = BlockDevice &
  Required<Omit<BlockDevice, 'isHole' | 'geometry'>> & { readonly geometry: Geometry };

/**
 * How a client left. 'disconnect': it said NBD_CMD_DISC, and has all it wanted. 'lost': anything else. The connection broke,
 * the client was killed or broke the protocol, or the server ended it; a client that connects again by itself takes up its
 * work where it was.
 */
export type Ending = 'disconnect' | 'lost';

/** Causes a device may give for a failed request; the server maps them to NBD error values in one table. */
export type DeviceErrorCode = 'EPERM' | 'EIO' | 'ENOMEM' | 'EINVAL' | 'ENOSPC' | 'EOVERFLOW' | 'ENOTSUP' | 'ESHUTDOWN';

/** `message` is told to clients that can take it, so it should mean something to whoever uses the export. */
export class DeviceError extends Error {
  /** Where in the export it failed, if that is known: what lies before it in the request's range has succeeded. */
  readonly offset: number | undefined;

  constructor(
    readonly code: DeviceErrorCode,
    message: string,
    options?: ErrorOptions & { readonly offset?: number },
  ) {
    super(message, options);
    this.name = 'DeviceError';
    this.offset = options?.offset;
  }
}

/** The process at the other end of a unix socket, as the kernel knows it (SO_PEERCRED). */
export interface PeerCredentials {
  readonly pid: number;
  readonly uid: number;
  readonly gid: number;
  /** Supplementary groups, if they are known. */
  readonly groups?: readonly number[];
  /** When the process began, in the kernel's clock ticks since the boot: with the pid it names one process. */
  readonly startTime?: number;
  /** The program's name as the process gives it: for people only. */
  readonly command?: string;
}

/** Who is asking, for logs and authorisation. */
export interface Peer {
  readonly transport: 'tcp' | 'unix' | 'internal';
  /** "127.0.0.1:4242", or the socket path for unix peers. */
  readonly address: string;
  /** The IP address alone, for tcp peers; IPv4 always in its own form. */
  readonly host?: string;
  /** For unix peers, if the embedding program can ask the kernel. */
  readonly credentials?: PeerCredentials;
  /** What a TLS handshake has proven; undefined while the connection is in the clear. */
  readonly tls?: TlsIdentity;
}

/** What a client is told of an export. */
export interface ExportInfo {
  readonly name: string;
  /** For people. */
  readonly description: string;
  /**
   * What the export is one of, if several names lead to the same: a client's breaches of the protocol are counted for all
   * of them together. By default its name.
   */
  readonly countedAs?: string;
}

/**
 * Why an export was not opened; `UNKNOWN` and `POLICY` become NBD_REP_ERR_UNKNOWN and _POLICY. `TLS_REQUIRED`: it may be
 * opened over TLS; only for a server that offers TLS and a peer that has not begun it.
 */
export class ExportError extends Error {
  constructor(
    readonly code: 'UNKNOWN' | 'POLICY' | 'TLS_REQUIRED' | 'SHUTDOWN' | 'FAILED',
    message: string,
    options?: ErrorOptions,
  ) {
    super(message, options);
    this.name = 'ExportError';
  }
}

/** The exports of a server. `Device`: what they are opened as, for whoever asks more of a device than the server does. */
export interface ExportProvider<Device extends BlockDevice = BlockDevice> {
  /** Any iterable: of very many the next ones are asked for as the client reads, with others served in between. */
  list(peer: Peer): Awaitable<Iterable<ExportInfo>>;
  /**
   * For NBD_OPT_INFO, and for meta contexts: what `open` would give, without opening. `contexts`: what the client asks for
   * when it lists or selects meta contexts. An export with very many may leave some out of `geometry.contexts`, but none
   * that is asked for by its name. Throws ExportError.
   */
  describe(
    name: string,
    peer: Peer,
    contexts?: readonly string[],
  ): Awaitable<{ readonly geometry: Device['geometry']; readonly info: ExportInfo }>;
  /** For NBD_OPT_GO and NBD_OPT_EXPORT_NAME; the device is closed with the connection. Throws ExportError. */
  open(name: string, peer: Peer): Awaitable<{ readonly device: Device; readonly info: ExportInfo }>;
  /**
   * The connection is over on which `describe` or `open` were asked: what was held for its sake can go. `peer` is the very
   * object that was given to them; it is one per connection, and another one once TLS has begun. Called after the device is
   * closed.
   */
  left?(peer: Peer): void;
}
