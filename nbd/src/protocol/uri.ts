/**
 * NBD URIs (the NBD project's URI specification, beside proto.md): where a server is and which export is meant, in one
 * string that other programs understand too (`nbdinfo`, `nbdcopy`, `qemu-img`). It owns the grammar and its errors; it
 * connects nothing and reads no files.
 *
 * Not Node's URL: it removes `.` and `..` from paths, which are legal in the names of exports.
 */

import net from 'node:net';
import { MAX_STRING_BYTES } from './wire.js';

/** The port that IANA has assigned to NBD; the default of URIs. */
export const NBD_PORT = 10809;

/** What a URI says about TLS beside its scheme. */
export interface NbdUriTls {
  /** How the sides prove themselves (`tls-type`). */
  readonly tlsType?: 'anon' | 'x509' | 'psk';
  /** The name that the server's certificate must be for (`tls-hostname`). */
  readonly tlsHostname?: string;
  /** Whether the client checks the server's certificate (`tls-verify-peer`). */
  readonly tlsVerifyPeer?: boolean;
  /** A directory with certificates (`tls-certificates`, of libnbd). */
  readonly tlsCertificates?: string;
  /** A file with pre-shared keys (`tls-psk-file`, of libnbd). */
  readonly tlsPskFile?: string;
  /** The user of a pre-shared key: `USER@` in front of the host, or `tls-username`. */
  readonly tlsUsername?: string;
}

/** The parts that every URI has. */
interface AnyUri extends NbdUriTls {
  /** '' is the default export. */
  readonly exportName: string;
  /** `nbds` and `nbds+unix`: the connection must use TLS. */
  readonly tls: boolean;
  /** Experimental parameters (`x-…`), by name. */
  readonly extra?: Readonly<Record<string, string>>;
}

/** A server on a TCP port: `nbd://HOST:PORT/NAME`. */
export interface TcpNbdUri extends AnyUri {
  readonly transport: 'tcp';
  /** A name or an address, IPv6 without brackets; 'localhost' if the URI has none. */
  readonly host: string;
  /** 0 to 65535; 0 means any free port, for a server that listens. */
  readonly port: number;
}

/** A server on a unix socket: `nbd+unix:///NAME?socket=PATH`. */
export interface UnixNbdUri extends AnyUri {
  readonly transport: 'unix';
  /** The socket's path, absolute or relative to the working directory; a leading NUL is Linux's abstract namespace. */
  readonly path: string;
}

/** The parts of an NBD URI. */
export type NbdUri = TcpNbdUri | UnixNbdUri;

/** The forms, for messages. */
const FORMS = 'nbd://HOST[:PORT]/NAME or nbd+unix:///NAME?socket=PATH (nbds and nbds+unix with TLS)';

const SCHEMES: ReadonlyMap<string, { readonly transport: NbdUri['transport']; readonly tls: boolean }> = new Map([
  ['nbd', { transport: 'tcp', tls: false }],
  ['nbds', { transport: 'tcp', tls: true }],
  ['nbd+unix', { transport: 'unix', tls: false }],
  ['nbds+unix', { transport: 'unix', tls: true }],
]);

/** Parameter → property, for those that are plain text. */
const TEXT_PARAMETERS: ReadonlyMap<string, 'tlsHostname' | 'tlsCertificates' | 'tlsPskFile' | 'tlsUsername'> = new Map([
  ['tls-hostname', 'tlsHostname'],
  ['tls-certificates', 'tlsCertificates'],
  ['tls-psk-file', 'tlsPskFile'],
  ['tls-username', 'tlsUsername'],
]);

/** RFC 3986, section 3, for URIs with an authority: scheme, authority, path, query, fragment. */
const URI = /^([a-z][a-z0-9+.-]*):\/\/([^/?#]*)(\/[^?#]*)?(\?[^#]*)?(#.*)?$/is;

/**
 * The parts of the NBD URI `text`. Characters beyond ASCII may be written as they are or percent-encoded, as UTF-8.
 * Errors: TypeError if `text` is not a string; RangeError if it is not an NBD URI, with what is wrong in it.
 */
export function parseNbdUri(text: string): NbdUri {
  if (typeof text !== 'string') throw new TypeError(`an NBD URI is a string, not ${describeType(text)}`);
  // From here on every error names the URI.
  const wrong = (why: string): RangeError => new RangeError(`"${shortened(text)}" is not an NBD URI: ${why}`);
  const parts = URI.exec(text);
  const scheme = SCHEMES.get((parts?.[1] ?? '').toLowerCase());
  if (parts === null || scheme === undefined) throw wrong(`expected ${FORMS}`);
  const [, , authority = '', path = '', query = '', fragment] = parts;
  if (hasBlank(text)) throw wrong('blanks and control characters are written percent-encoded, a blank as %20');
  if (fragment !== undefined) throw wrong('"#" is written %23');

  const decode = (encoded: string, what: string): string => {
    try {
      return decodeURIComponent(encoded);
    } catch {
      throw wrong(`${what} is not percent-encoded UTF-8 (a percent sign is written %25)`);
    }
  };
  const exportName = decode(path.slice(1), 'the name of the export');
  if (exportName.includes('\0')) throw wrong('the name of an export cannot contain NUL');
  const nameBytes = Buffer.byteLength(exportName);
  if (nameBytes > MAX_STRING_BYTES) {
    throw wrong(`the name of the export has ${nameBytes} bytes, at most ${MAX_STRING_BYTES} are allowed`);
  }
  const { socket, ...parameters } = parseQuery(query.slice(1), decode, wrong);

  const at = authority.lastIndexOf('@');
  const user = at < 0 ? undefined : decode(authority.slice(0, at), 'the user name');
  if (user !== undefined && parameters.tlsUsername !== undefined) throw wrong('it has two user names');
  const common = { exportName, tls: scheme.tls, ...parameters, ...(user !== undefined && { tlsUsername: user }) };
  const hostAndPort = authority.slice(at + 1);

  if (scheme.transport === 'unix') {
    if (hostAndPort !== '') {
      throw wrong(
        `a unix socket has no host, and "${shortened(hostAndPort)}" stands in its place: write three slashes, ` +
          'nbd+unix:///NAME?socket=PATH',
      );
    }
    if (socket === undefined || socket === '') throw wrong('the path of the unix socket is missing: ?socket=PATH');
    if (socket.includes('\0', 1)) throw wrong('the path of a unix socket cannot contain NUL after its beginning');
    return { transport: 'unix', path: socket, ...common };
  }
  if (socket !== undefined) throw wrong('socket=PATH belongs to nbd+unix and nbds+unix');
  return { transport: 'tcp', ...parseHostAndPort(hostAndPort, decode, wrong), ...common };
}

type Decode = (encoded: string, what: string) => string;
type Wrong = (why: string) => RangeError;

function parseHostAndPort(text: string, decode: Decode, wrong: Wrong): { host: string; port: number } {
  const bracketed = /^\[([^\]]*)\](?::(.*))?$/s.exec(text);
  const plain = /^([^:[\]]*)(?::(.*))?$/s.exec(text);
  const [, rawHost = '', rawPort = ''] = bracketed ?? plain ?? [];
  if ((bracketed ?? plain) === null || /[[\]]/.test(rawPort)) {
    throw wrong('an address of IPv6 is written in brackets, [::1], and everything else is HOST or HOST:PORT');
  }
  if (rawPort !== '' && (!/^\d{1,5}$/.test(rawPort) || Number(rawPort) > 65535)) {
    const isIpv6 = bracketed === null && rawPort.includes(':');
    throw wrong(
      isIpv6
        ? 'an address of IPv6 is written in brackets: [::1]'
        : `"${shortened(rawPort)}" is not a port, 0 to 65535 in digits`,
    );
  }
  const port = rawPort === '' ? NBD_PORT : Number(rawPort);
  if (bracketed !== null) {
    // A zone is set off by %25 (RFC 6874).
    const host = rawHost.replace('%25', '%');
    if (!net.isIPv6(host)) throw wrong(`"${shortened(rawHost)}" is not an address of IPv6`);
    return { host, port };
  }
  const host = decode(rawHost, 'the host');
  if (hasBlank(host) || /[/?#@:[\]\\]/.test(host)) throw wrong(`"${shortened(rawHost)}" is not a host`);
  // As other programs do: qemu and libnbd connect to localhost.
  return { host: host === '' ? 'localhost' : host, port };
}

type Parameters = NbdUriTls & { socket?: string; extra?: Record<string, string> };

function parseQuery(query: string, decode: Decode, wrong: Wrong): Parameters {
  const found = new Map<string, string>();
  for (const pair of query.split('&')) {
    if (pair === '') continue;
    const equals = pair.indexOf('=');
    const name = decode(equals < 0 ? pair : pair.slice(0, equals), 'the name of a parameter');
    const value = equals < 0 ? '' : decode(pair.slice(equals + 1), `the value of ${shortened(name)}`);
    if (found.has(name)) throw wrong(`it has the parameter ${shortened(name)} twice`);
    found.set(name, value);
  }
  const parameters: { -readonly [K in keyof Parameters]: Parameters[K] } = {};
  for (const [name, value] of found) {
    const text = TEXT_PARAMETERS.get(name);
    if (text !== undefined) parameters[text] = value;
    else if (name === 'socket') parameters.socket = value;
    else if (name === 'tls-type') {
      if (value !== 'anon' && value !== 'x509' && value !== 'psk') throw wrong('tls-type is anon, x509 or psk');
      parameters.tlsType = value;
    } else if (name === 'tls-verify-peer') {
      if (value !== '0' && value !== '1') throw wrong('tls-verify-peer is 0 or 1');
      parameters.tlsVerifyPeer = value === '1';
    } else if (name.startsWith('x-')) {
      (parameters.extra ??= {})[name] = value;
    } else {
      // "Any other query parameters which the client does not understand SHOULD be diagnosed by the parser."
      const known = ['socket', 'tls-type', 'tls-verify-peer', ...TEXT_PARAMETERS.keys()].join(', ');
      throw wrong(`it has the unknown parameter "${shortened(name)}"; known are ${known}, and any x-…`);
    }
  }
  return parameters;
}

/** `formatNbdUri` takes what `parseNbdUri` returns, and less: what is missing has its default. */
export type NbdUriParts =
  | ({ readonly transport?: 'unix'; readonly path: string } & Partial<AnyUri>)
  | ({ readonly transport?: 'tcp'; readonly host?: string; readonly port?: number } & Partial<AnyUri>);

/**
 * The URI of `parts`, percent-encoded where other programs need it. `parseNbdUri` of the result returns the same parts.
 * Errors: TypeError for a part of the wrong type; RangeError for one that no URI can express.
 */
export function formatNbdUri(parts: NbdUriParts): string {
  const isUnix = 'path' in parts;
  checkParts(parts);
  const scheme = `nbd${parts.tls ? 's' : ''}${isUnix ? '+unix' : ''}`;
  const user = parts.tlsUsername === undefined ? '' : `${encode(parts.tlsUsername, '%2F')}@`;
  const authority = isUnix ? '' : formatHostAndPort(parts.host ?? 'localhost', parts.port ?? NBD_PORT);
  const query: string[] = [];
  const add = (name: string, value: string | undefined): void => {
    if (value !== undefined) query.push(`${encode(name)}=${encode(value)}`);
  };
  if (isUnix) add('socket', parts.path);
  add('tls-type', parts.tlsType);
  add('tls-hostname', parts.tlsHostname);
  add('tls-verify-peer', parts.tlsVerifyPeer === undefined ? undefined : parts.tlsVerifyPeer ? '1' : '0');
  add('tls-certificates', parts.tlsCertificates);
  add('tls-psk-file', parts.tlsPskFile);
  for (const [name, value] of Object.entries(parts.extra ?? {})) add(name, value);
  const text = `${scheme}://${user}${authority}/${encode(parts.exportName ?? '')}`;
  const uri = query.length === 0 ? text : `${text}?${query.join('&')}`;
  // Whatever cannot be read again is refused with the reason that a reader would give.
  parseNbdUri(uri);
  return uri;
}

function checkParts(parts: NbdUriParts): void {
  const texts = { ...('path' in parts ? { path: parts.path } : { host: parts.host }), exportName: parts.exportName };
  for (const [name, value] of Object.entries(texts)) {
    if (value !== undefined && typeof value !== 'string') {
      throw new TypeError(`${name} of an NBD URI is a string, not ${describeType(value)}`);
    }
  }
  if ('path' in parts) {
    if (parts.path === '' || parts.transport === ('tcp' as string)) {
      throw new RangeError('an NBD URI has either the path of a unix socket, which is not empty, or a host and a port');
    }
  } else if (parts.transport === ('unix' as string)) {
    throw new RangeError('an NBD URI of a unix socket needs its path');
  }
}

function formatHostAndPort(host: string, port: number): string {
  if (!Number.isInteger(port) || port < 0 || port > 65535) throw new RangeError(`${port} is not a port, 0 to 65535`);
  const name = net.isIPv6(host) ? `[${host.replace('%', '%25')}]` : encode(host, '%2F');
  return port === NBD_PORT ? name : `${name}:${port}`;
}

/** Percent-encoded; `slash`: how a slash is written, by default as itself, which is legal in paths and queries. */
function encode(text: string, slash: '/' | '%2F' = '/'): string {
  try {
    return encodeURIComponent(text).replaceAll('%2F', slash);
  } catch {
    throw new RangeError('a part of an NBD URI has half of a surrogate pair, which has no UTF-8');
  }
}

/** White space or a control character. */
function hasBlank(text: string): boolean {
  for (let at = 0; at < text.length; at++) {
    const code = text.charCodeAt(at);
    if (code <= 0x20 || code === 0x7f) return true;
  }
  return false;
}

function describeType(value: unknown): string {
  return value === null ? 'null' : Array.isArray(value) ? 'an array' : typeof value;
}

/** For messages, which may be shown in a terminal: no control characters, at most a line. */
function shortened(text: string): string {
  const shown = Array.from(text.slice(0, 200), (character) => (hasBlank(character) ? '·' : character)).join('');
  return text.length > 200 ? `${shown}…` : shown;
}
