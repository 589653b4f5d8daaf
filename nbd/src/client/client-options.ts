/** Where the client connects to, and how: its options, and what they come to. It connects nothing. */

import type { Duplex } from 'node:stream';
import { checkClientTls, type ClientTls } from '../protocol/tls.js';
import { parseNbdUri } from '../protocol/uri.js';
import { checkObject, kindOf } from '../kinds.js';
import { checkBytes, checkedMs, checkSignal } from './argument-checks.js';
import type { ReplyLevel } from './reply-reader.js';

/** How long connect() may take by default, milliseconds. */
export const DEFAULT_CONNECT_TIMEOUT_MS = 30_000;
/**
 * How long the server may be silent after an option by default, milliseconds. Longer than this library's server may take to
 * open an export (`openTimeoutMs`, 120 s).
 */
export const DEFAULT_OPTION_TIMEOUT_MS = 150_000;

/**
 * Where the server is: a unix socket, a TCP port (of localhost without `host`), an NBD URI, or a connected stream (`head`:
 * bytes already received on it), which belongs to the client from then on.
 */
export type ServerAddress =
  | { readonly path: string }
  | { readonly host?: string; readonly port: number }
  | { readonly uri: string }
  | { readonly socket: Duplex; readonly head?: Uint8Array };

/** How a client connects, and what it allows the server. Times in milliseconds; 0 means never. */
export interface ConnectionOptions {
  /** The required kind of replies. By default the best that the server has: extended, else structured, else simple. */
  readonly replies?: ReplyLevel;
  /** Require TLS: connect() fails if the server has none or does not prove itself. `{}` with an `nbds` URI by default. */
  readonly tls?: ClientTls;
  /** Ends connect(); it has no effect afterwards. */
  readonly signal?: AbortSignal;
  /** For connect(): the connection, the greeting and TLS. By default 30 s. */
  readonly connectTimeoutMs?: number;
  /**
   * How long the server may be silent. After an option: until the next part of its answer, by default 150 s. After a
   * request: while no part of the answer to the oldest one arrives, and no byte of it leaves; by default for ever, as libnbd
   * and qemu do, because remote storage may retry for minutes. Longer than the largest write takes to send. When it is over,
   * everything pending fails with TIMED_OUT and the connection is closed.
   */
  readonly timeoutMs?: number;
}

/** The options of NbdClient.connect. */
export type ClientOptions = ServerAddress & ConnectionOptions;

/** The options, checked, with their defaults. */
export interface CheckedOptions {
  readonly address:
    | { readonly path: string }
    | { readonly host: string; readonly port: number }
    | { readonly socket: Duplex; readonly head: Buffer | undefined };
  /** For messages. */
  readonly where: string;
  readonly replies: ReplyLevel | undefined;
  readonly tls: ClientTls | undefined;
  /** The name that the server's certificate must be for, unless `tls` has another. */
  readonly tlsHost: string;
  /** The export that the URI names. */
  readonly exportName: string | undefined;
  readonly signal: AbortSignal | undefined;
  readonly connectTimeoutMs: number;
  readonly optionTimeoutMs: number;
  readonly requestTimeoutMs: number;
}

const LEVELS: readonly unknown[] = [undefined, 'simple', 'structured', 'extended'];

/** Errors: TypeError, RangeError. */
export function checkClientOptions(options: ClientOptions): CheckedOptions {
  checkObject(options, 'the options of connect()');
  if (options.tls !== undefined) checkClientTls(options.tls);
  if (!LEVELS.includes(options.replies)) {
    throw new TypeError(`replies must be 'simple', 'structured' or 'extended', not ${String(options.replies)}`);
  }
  checkSignal(options.signal);
  const { timeoutMs } = options;
  return {
    ...checkAddress(options),
    replies: options.replies,
    signal: options.signal,
    connectTimeoutMs: checkedMs(options.connectTimeoutMs, 'connectTimeoutMs', DEFAULT_CONNECT_TIMEOUT_MS),
    optionTimeoutMs: checkedMs(timeoutMs, 'timeoutMs', DEFAULT_OPTION_TIMEOUT_MS),
    requestTimeoutMs: checkedMs(timeoutMs, 'timeoutMs', 0),
  };
}

type Place = Pick<CheckedOptions, 'address' | 'where' | 'tls' | 'tlsHost' | 'exportName'>;

function checkAddress(options: ClientOptions): Place {
  const given = (['path', 'port', 'uri', 'socket'] as const).filter(
    (name) => (options as { readonly [N in typeof name]?: unknown })[name] !== undefined,
  );
  if (given.length !== 1) {
    const found = given.length === 0 ? 'none of them' : given.join(' and ');
    throw new TypeError(`connect() needs one of path, port, uri and socket; it was given ${found}`);
  }
  const { tls } = options;
  if ('uri' in options && given[0] === 'uri') return placeOfUri(options.uri, tls);
  const common = { tls, exportName: undefined };
  if ('socket' in options && given[0] === 'socket') {
    const { socket, head } = options;
    if (typeof (socket as Partial<Duplex> | null)?.write !== 'function') {
      throw new TypeError(`socket must be a duplex stream, not ${kindOf(socket)}`);
    }
    if (head !== undefined) checkBytes(head, 'head');
    const bytes = head && Buffer.from(head.buffer, head.byteOffset, head.byteLength);
    return { ...common, address: { socket, head: bytes }, where: 'the given socket', tlsHost: 'localhost' };
  }
  if ('path' in options && given[0] === 'path') {
    const { path } = options;
    if (typeof path !== 'string' || path === '') {
      throw new TypeError(`path must be the path of a unix socket, not ${kindOf(path)}`);
    }
    return { ...common, address: { path }, where: path, tlsHost: 'localhost' };
  }
  const { host = 'localhost', port } = options as { readonly host?: string; readonly port: number };
  if (typeof host !== 'string' || host === '') {
    throw new TypeError(`host must be a name or an address, not ${kindOf(host)}`);
  }
  return { ...common, ...tcpPlace(host, port) };
}

/** Errors: TypeError, RangeError. */
function placeOfUri(uri: string, given: ClientTls | undefined): Place {
  const parts = parseNbdUri(uri);
  // Keys are given in `tls`: a URI may come from elsewhere and must not make this program read files. And a connection that
  // proves nothing is not made because a URI says so.
  const unsupported =
    (parts.tlsVerifyPeer === false && 'tls-verify-peer=0') ||
    (parts.tlsType === 'anon' && 'tls-type=anon') ||
    (given === undefined &&
      ((parts.tlsCertificates !== undefined && 'tls-certificates') ||
        (parts.tlsPskFile !== undefined && 'tls-psk-file') ||
        (parts.tlsType === 'psk' && 'tls-type=psk')));
  if (unsupported) {
    throw new TypeError(`the client does not follow ${unsupported} of a URI: give certificates or keys in \`tls\``);
  }
  let tls = given ?? (parts.tls ? {} : undefined);
  if (tls !== undefined && !('psk' in tls) && tls.serverName === undefined && parts.tlsHostname !== undefined) {
    tls = { ...tls, serverName: parts.tlsHostname };
  }
  const common = { tls, exportName: parts.exportName };
  if (parts.transport === 'unix') {
    return { ...common, address: { path: parts.path }, where: parts.path, tlsHost: 'localhost' };
  }
  return { ...common, ...tcpPlace(parts.host, parts.port) };
}

function tcpPlace(host: string, port: number): Pick<Place, 'address' | 'where' | 'tlsHost'> {
  if (typeof port !== 'number') throw new TypeError(`port must be a number, not ${kindOf(port)}`);
  if (!Number.isInteger(port) || port < 1 || port > 65535) throw new RangeError(`port must be 1 to 65535, not ${port}`);
  return {
    address: { host, port },
    where: host.includes(':') ? `[${host}]:${port}` : `${host}:${port}`,
    tlsHost: host,
  };
}
