/**
 * The addresses that `--listen` takes, "unix:PATH" and "tcp:HOST:PORT", and the NBD URIs for them. Owns the syntax; never opens a
 * socket.
 */
import net from 'node:net';
import path from 'node:path';
import { MAX_SOCKET_PATH_BYTES } from '../operations/socket-address.js';

const DEFAULT_PORT = 10809; // NBD's, assigned by IANA

export type ListenAddress =
  | { readonly transport: 'unix'; readonly path: string }
  | { readonly transport: 'tcp'; readonly host: string; readonly port: number };

/** For text that is not a listen address; the message says what was given and what is accepted. */
export class AddressError extends Error {}

/** "unix:PATH", "tcp:HOST:PORT", "tcp:[V6]:PORT"; the port may be left out. Errors: AddressError. */
export function parseListenAddress(text: string): ListenAddress {
  const colon = text.indexOf(':');
  const scheme = text.slice(0, Math.max(colon, 0));
  const rest = text.slice(colon + 1);
  if (scheme === 'unix') return unixAddress(text, rest);
  if (scheme === 'tcp') return tcpAddress(text, rest);
  if (scheme === 'vsock') {
    throw new AddressError(
      `"${text}": vsock is not supported, Node has no such sockets; let socat VSOCK-LISTEN:PORT,fork forward to unix:PATH`,
    );
  }
  throw new AddressError(`"${text}" is not a listen address; give unix:PATH or tcp:HOST:PORT`);
}

function unixAddress(text: string, socketPath: string): ListenAddress {
  if (socketPath === '' || socketPath.includes('\0')) throw new AddressError(`"${text}": a path must follow unix:`);
  const absolute = path.resolve(socketPath);
  const bytes = Buffer.byteLength(absolute);
  if (bytes > MAX_SOCKET_PATH_BYTES) {
    throw new AddressError(
      `"${text}": the path has ${bytes} bytes, a unix socket's at most ${MAX_SOCKET_PATH_BYTES}; choose a shorter one`,
    );
  }
  return { transport: 'unix', path: absolute };
}

function tcpAddress(text: string, rest: string): ListenAddress {
  const match = /^(?:\[([0-9A-Fa-f:.%\w]+)\]|([^:[\]]+))(?::(\d{1,5}))?$/.exec(rest);
  const host = match?.[1] ?? match?.[2];
  if (!match || !host) {
    throw new AddressError(
      `"${text}": give tcp:HOST:PORT, for example tcp:127.0.0.1:${DEFAULT_PORT} or tcp:[::1]:${DEFAULT_PORT}`,
    );
  }
  const port = match[3] === undefined ? DEFAULT_PORT : Number(match[3]);
  if (port > 65535) throw new AddressError(`"${text}": port ${port} is above 65535`);
  return { transport: 'tcp', host, port };
}

/** As `--listen` takes it. */
export function formatListenAddress(address: ListenAddress): string {
  if (address.transport === 'unix') return `unix:${address.path}`;
  return `tcp:${bracketed(address.host)}:${address.port}`;
}

/** The URI of an export there (the NBD URI specification, https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md). */
export function exportUri(address: ListenAddress, exportName: string, overTls = false): string {
  const scheme = overTls ? 'nbds' : 'nbd';
  const name = encodeURIComponent(exportName).replaceAll('%40', '@');
  if (address.transport === 'unix') {
    return `${scheme}+unix:///${name}?socket=${encodeURIComponent(address.path).replaceAll('%2F', '/')}`;
  }
  // A client cannot connect to the wildcard address.
  const host = address.host === '0.0.0.0' ? '127.0.0.1' : address.host === '::' ? '::1' : address.host;
  const port = address.port === DEFAULT_PORT ? '' : `:${address.port}`;
  return `${scheme}://${bracketed(host)}${port}/${name}`;
}

/** Whether only this machine can reach the address. */
export function isLocalOnly(address: ListenAddress): boolean {
  if (address.transport === 'unix') return true;
  const { host } = address;
  return host === 'localhost' || host === '::1' || (net.isIPv4(host) && host.startsWith('127.'));
}

function bracketed(host: string): string {
  return host.includes(':') ? `[${host}]` : host;
}
