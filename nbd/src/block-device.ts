/**
 * The full interface of an export, which a user of the library implements: offsets and lengths, nothing of the wire. Methods may
 * answer synchronously or with a promise: the request loop awaits only promises. `Device` (device.ts) is the small one.
 *
 * A device needs a size and four methods: read, write, flush, close. Its geometry announces everything else, and it has the
 * method for each.
 */

import { brand } from './brand.js';
import type { TlsIdentity } from './protocol/tls-identity.js';

/** An answer at once, or a promise of one. */
export type Awaitable<T> = T | Promise<T>;

/** What a client is told about an export, fixed for the life of one connection. Sizes in bytes. */
export interface Geometry {
  readonly size: number;
  /** 1 to 65536, a power of two. Requests need not be aligned to anything below it. */
  readonly minimumBlockSize: number;
  readonly preferredBlockSize: number;
  readonly readOnly: boolean;
  readonly canFlush: boolean;
  /** `write`, `zero` and `trim` obey `fua`: durable before the answer. */
  readonly canFua: boolean;
  /** There is a method `trim`. */
  readonly canTrim: boolean;
  /** There is a method `zero`. */
  readonly canZero: boolean;
  /** A FAST_ZERO request is answered quickly or refused with ENOTSUP; zeros are never written for it. */
  readonly canFastZero: boolean;
  /** There is a method `cache`. */
  readonly canCache: boolean;
  /** Several connections see each other's completed writes, and a flush on one covers all. */
  readonly multiConn: boolean;
  readonly rotational: boolean;
  /**
   * The meta contexts that `extents` answers for, each named NAMESPACE:LEAF (proto.md, "Metadata querying"): 'base:allocation'
   * if the device can tell holes from data, and any of its own. `extents` is called for selected contexts, which come from the
   * geometry of `describe`.
   */
  readonly contexts: readonly string[];
  /** Those of `contexts` whose flags need more than 32 bits; only clients with extended headers can select them. */
  readonly wideContexts?: readonly string[];
}

/**
 * The geometry that a device gives: its size, and what differs from the defaults, a writable disk with blocks of any size
 * (preferably 4096 bytes) that can flush and nothing else. Further abilities must be given, so that the server announces
 * nothing by accident.
 */
export type DeviceGeometry = Pick<Geometry, 'size'> & Partial<Geometry>;

/** How `zero` makes a range read as zeros. */
export interface ZeroMode {
  /** The range must stay allocated (NBD_CMD_FLAG_NO_HOLE). */
  readonly noHole: boolean;
  /** Durable before the answer (NBD_CMD_FLAG_FUA). */
  readonly fua: boolean;
  /** Fail with ENOTSUP rather than be as slow as writing (NBD_CMD_FLAG_FAST_ZERO). */
  readonly fastZero: boolean;
}

/** The meta context that NBD defines: which ranges are allocated, and which read as zeros. */
export const ALLOCATION_CONTEXT = 'base:allocation';
/** Flag of `base:allocation`: not allocated; a write may need new space. */
export const STATE_HOLE = 1 << 0;
/** Flag of `base:allocation`: reads as zeros. */
export const STATE_ZERO = 1 << 1;

/**
 * Receives extents in ascending order, each beginning where the last one ended. The context defines `flags`: 32 bits, or up to
 * 2^53-1 for one of `wideContexts`. Neighbours may have the same flags. Returns false when it needs no more.
 */
export type ExtentSink = (offset: number, length: number, flags: number) => boolean;

/**
 * What `read` and `write` return, or resolve with: nothing if they have done all of it; or how many bytes they have done, as
 * a number or as Node's FileHandle does. Any other count than the one asked for is a failure, answered EIO.
 */
// `void` and not undefined: a function without a return statement may be given as a method.
// eslint-disable-next-line @typescript-eslint/no-invalid-void-type
export type Transferred = void | number | { readonly bytesRead: number } | { readonly bytesWritten: number };

/**
 * An export, opened for one connection. Every range is validated against `geometry` before a method is called. Errors are
 * thrown (or rejected) as `DeviceError`; an error of the system (`code` 'ENOSPC', 'EACCES', …) is answered with the NBD error
 * for it, anything else with EIO. All of them are reported to the observer.
 *
 * `signal` is one for the whole connection: it is aborted when the client is gone or is closed. Work for a client that is gone
 * may then be given up, and its method must still settle.
 */
export interface BlockDevice {
  readonly geometry: DeviceGeometry;
  /**
   * `read` fills all of `into`, or fails. Otherwise `into` is zeroed before each read, so that a device which fills too little
   * of it shows no other client's data.
   */
  readonly fillsBuffer?: boolean;
  /**
   * Fill `into` with the bytes at `offset`. It must not be touched once the returned promise has settled. It is a view of a
   * larger block of the server: never transfer its ArrayBuffer.
   */
  read(offset: number, into: Buffer, signal?: AbortSignal): Awaitable<Transferred>;
  /**
   * The device may use `data` until the returned promise settles, not longer: the memory is used again then. What it keeps, or
   * sends to another thread, is a copy (`new Uint8Array(data)`): `data` is a view of a larger block of the server.
   */
  write(offset: number, data: Buffer, fua: boolean, signal?: AbortSignal): Awaitable<Transferred>;
  /** When it answers, all writes answered before this call are durable. */
  flush(signal?: AbortSignal): Awaitable<void>;
  /**
   * Called once for each device that was opened, when its connection is over and no request is in flight; for a device behind
   * several connections when the last of them is over (`shared`), or the server is closed (`serve`). An object that a provider
   * itself gives to several connections gets it from each. `ending`: whether the client may reconnect.
   */
  close(ending: Ending): Awaitable<void>;
  /** The range reads as zeros afterwards. With `canZero`. */
  zero?(offset: number, length: number, mode: ZeroMode, signal?: AbortSignal): Awaitable<void>;
  /** The range is no longer needed, and may read as anything. With `canTrim`. */
  trim?(offset: number, length: number, fua: boolean, signal?: AbortSignal): Awaitable<void>;
  /** Bring the range into cache; a hint. With `canCache`. */
  cache?(offset: number, length: number, signal?: AbortSignal): Awaitable<void>;
  /**
   * With `contexts`. Report the extents of [offset, offset+length) in `context`, which the client has selected, to `sink`,
   * from `offset` on, without reading data. It may stop before the end, but not before the first extent; an extent may
   * reach beyond the end. Extents should begin and end at multiples of the minimum block size.
   */
  extents?(context: string, offset: number, length: number, sink: ExtentSink, signal?: AbortSignal): Awaitable<void>;
  /**
   * Whether the range is known, from memory alone, to read as zeros. Called before every read of a client that accepts
   * holes, so it must be cheap; false is always allowed.
   */
  isHole?(offset: number, length: number): boolean;
}

/** A device with a whole geometry and every method but `isHole`: for devices that wrap another one. */
export type CompleteDevice = BlockDevice &
  Required<Omit<BlockDevice, 'isHole' | 'fillsBuffer' | 'geometry'>> & { readonly geometry: Geometry };

/**
 * How a client left. 'disconnect': it sent NBD_CMD_DISC, and has finished. 'lost': anything else. The connection broke, the
 * client was killed or violated the protocol, or the server closed it; a client that reconnects automatically continues its
 * work.
 */
export type Ending = 'disconnect' | 'lost';

/** The causes of a failed request; the server maps them to NBD error values in one table. */
export type DeviceErrorCode = 'EPERM' | 'EIO' | 'ENOMEM' | 'EINVAL' | 'ENOSPC' | 'EOVERFLOW' | 'ENOTSUP' | 'ESHUTDOWN';

const DEVICE_ERROR_CODES: ReadonlySet<unknown> = new Set<DeviceErrorCode>([
  ...(['EPERM', 'EIO', 'ENOMEM', 'EINVAL', 'ENOSPC', 'EOVERFLOW', 'ENOTSUP', 'ESHUTDOWN'] as const),
]);

/** Whether `code` is one of DeviceErrorCode. An error may come from another copy of the package, or be changed once made. */
export function isDeviceErrorCode(code: unknown): code is DeviceErrorCode {
  return DEVICE_ERROR_CODES.has(code);
}

/** A failed request. `message` is sent to clients with chunked replies: it should be meaningful to the user of the export. */
export class DeviceError extends Error {
  static {
    brand(this, 'DeviceError');
  }

  /** The offset in the export at which it failed, if known: the part of the request's range before it has succeeded. */
  readonly offset: number | undefined;

  /** Errors: TypeError (there is no such code). */
  constructor(
    readonly code: DeviceErrorCode,
    message: string,
    options?: ErrorOptions & { readonly offset?: number },
  ) {
    super(message, options);
    if (!isDeviceErrorCode(code)) throw unknownCode('DeviceError', code, DEVICE_ERROR_CODES);
    this.name = 'DeviceError';
    this.offset = options?.offset;
  }
}

function unknownCode(name: string, code: unknown, known: ReadonlySet<unknown>): TypeError {
  const given = typeof code === 'string' ? JSON.stringify(code) : `a value of type ${typeof code}`;
  return new TypeError(`${name}: ${given} is not a code; there are ${[...known].join(', ')}`);
}

/** The process at the other end of a unix socket, as the kernel knows it (SO_PEERCRED). */
export interface PeerCredentials {
  readonly pid: number;
  readonly uid: number;
  readonly gid: number;
  /** Supplementary groups, if they are known. */
  readonly groups?: readonly number[];
  /** When the process began, in the kernel's clock ticks since the boot: with the pid it identifies one process. */
  readonly startTime?: number;
  /** The program's name as the process reports it: for people only. */
  readonly command?: string;
}

/** The client at the other end, for logs and authorisation. */
export interface Peer {
  readonly transport: 'tcp' | 'unix' | 'internal';
  /** "127.0.0.1:4242", or the socket path for unix peers. */
  readonly address: string;
  /** The IP address alone, for tcp peers; IPv4 always in its own form. */
  readonly host?: string;
  /** For unix peers, if the embedding program asks the kernel (ServerOptions.peerCredentials). */
  readonly credentials?: PeerCredentials;
  /** What the TLS handshake has proven; undefined while the connection is in the clear. */
  readonly tls?: TlsIdentity;
}

/** An export as clients see it. */
export interface ExportInfo {
  readonly name: string;
  /** For people. */
  readonly description: string;
  /**
   * A common key, if several names lead to the same export: a client's violations of the protocol are counted for all of them
   * together. By default its name.
   */
  readonly countedAs?: string;
}

/**
 * Why an export was not opened; `UNKNOWN` and `POLICY` become NBD_REP_ERR_UNKNOWN and _POLICY. `TLS_REQUIRED`: it can be opened
 * over TLS only; for a server that offers TLS and a peer that has not begun it.
 */
export type ExportErrorCode = 'UNKNOWN' | 'POLICY' | 'TLS_REQUIRED' | 'SHUTDOWN' | 'FAILED';

const EXPORT_ERROR_CODES: ReadonlySet<unknown> = new Set<ExportErrorCode>([
  ...(['UNKNOWN', 'POLICY', 'TLS_REQUIRED', 'SHUTDOWN', 'FAILED'] as const),
]);

/** An export was not opened. `message` is sent to the client. `FAILED` is an error, and reported; the others are answers. */
export class ExportError extends Error {
  static {
    brand(this, 'ExportError');
  }

  /** Errors: TypeError (there is no such code). */
  constructor(
    readonly code: ExportErrorCode,
    message: string,
    options?: ErrorOptions,
  ) {
    super(message, options);
    if (!EXPORT_ERROR_CODES.has(code)) throw unknownCode('ExportError', code, EXPORT_ERROR_CODES);
    this.name = 'ExportError';
  }
}

/** The connection that an export is opened, or described, for. */
export interface OpenContext {
  /** The id of the connection, as in ConnectionInfo. */
  readonly id: number;
  /**
   * Aborted when the client is gone, or the connection is closed; the same that the device's methods get. A listener that
   * throws ends the process, unless that handles uncaught exceptions: Node reports it so, and the server cannot catch it.
   */
  readonly signal: AbortSignal;
}

/**
 * The exports of a server. `Device`: their type when opened, for programs that use more of a device than the server does, or
 * the small interface (see `Device` of device.ts), which the server completes.
 */
export interface ExportProvider<Device extends object = BlockDevice> {
  /** Any iterable: it is iterated as the client reads, with other connections served in between. */
  list(peer: Peer): Awaitable<Iterable<ExportInfo>>;
  /**
   * For NBD_OPT_INFO, and for meta contexts: what `open` would return, without opening. `contexts`: the client's queries
   * when it lists or selects meta contexts. An export with very many may leave some out of `geometry.contexts`, but none
   * that is queried by its name. A server always gives `context`.
   * Errors: ExportError.
   */
  describe(
    name: string,
    peer: Peer,
    contexts?: readonly string[],
    context?: OpenContext,
  ): Awaitable<{
    readonly geometry: Device extends { readonly geometry: infer Whole } ? Whole : DeviceGeometry;
    readonly info: ExportInfo;
  }>;
  /**
   * For NBD_OPT_GO and NBD_OPT_EXPORT_NAME; the device is closed with the connection. A server always gives `context`.
   * Errors: ExportError.
   */
  open(
    name: string,
    peer: Peer,
    context?: OpenContext,
  ): Awaitable<{ readonly device: Device; readonly info: ExportInfo }>;
  /**
   * The connection on which `describe` or `open` were called is over: resources held for it can be released. `peer` is the same
   * object that was passed to them: one per connection, and another one once TLS has begun. Called after the device is closed;
   * the connection counts as over when it has answered.
   */
  left?(peer: Peer): Awaitable<void>;
}
