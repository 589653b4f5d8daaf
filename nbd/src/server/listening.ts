/**
 * Listening sockets: where a server listens, how an address is bound, and the peer of an accepted connection. It owns socket
 * files and their permissions; it never reads or writes an accepted connection.
 */

import { chmod, lstat, unlink } from 'node:fs/promises';
import net from 'node:net';
import { dirname, resolve as resolvePath } from 'node:path';
import { isMainThread } from 'node:worker_threads';
import type { Peer, PeerCredentials } from '../block-device.js';
import { brand } from '../brand.js';
import { socketPathProblem } from '../protocol/socket-path.js';
import { parseNbdUri, type NbdUri } from '../protocol/uri.js';

/**
 * Where to listen: a unix socket, with the permissions of its file, a TCP address (port 0: any free one), or a
 * descriptor of a socket of either kind that listens already (socket activation).
 *
 * Without `host` only programs of this machine can connect, of all its users; '::' is every address of the machine. A relative
 * path is relative to the working directory. Without `mode` the umask decides, as for any file.
 */
export type ListenOptions =
  | { readonly path: string; readonly mode?: number }
  | { readonly port: number; readonly host?: string }
  | {
      readonly fd: number;
      /** The path, for a unix socket: Node cannot determine it. */
      readonly path?: string;
    };

/** Where to listen, also as an NBD URI, of which the address counts: its export and the parameters are for clients. */
export type ListenTarget = string | NbdUri | ListenOptions;

/** Where a server listens. */
export type BoundAddress =
  | { readonly transport: 'unix'; readonly path: string }
  | { readonly transport: 'tcp'; readonly host: string; readonly port: number };

/** Why a server could not listen. */
export type ListenErrorCode = 'IN_USE' | 'NOT_A_SOCKET' | 'CLOSED' | 'FAILED';

/** A server could not listen. */
export class ListenError extends Error {
  static {
    brand(this, 'ListenError');
  }

  constructor(
    readonly code: ListenErrorCode,
    message: string,
    options?: ErrorOptions,
  ) {
    super(message, options);
    this.name = 'ListenError';
  }
}

/** Pending connections that the kernel queues: all connections of a multi-conn client may arrive at once. */
const LISTEN_BACKLOG = 511;
/** The largest descriptor: a C int. */
const MAX_FD = 2 ** 31 - 1;
const IPV4_MAPPED = '::ffff:';
/** The host that is listened on if none is given: Node would take every address of the machine. */
const LOOPBACK = '127.0.0.1';
/** Permissions of a file. */
const MAX_MODE = 0o777;

/**
 * The place that `target` means, checked, and its URI if it is one.
 * Errors: TypeError (not a place to listen at), RangeError (not an NBD URI, a port or mode that does not exist).
 */
export function listenPlace(target: ListenTarget): { readonly options: ListenOptions; readonly uri?: NbdUri } {
  if (typeof target === 'string') return uriPlace(parseNbdUri(target));
  const any: unknown = target;
  if (typeof any !== 'object' || any === null) {
    throw new TypeError(`cannot listen on ${any === null || any === undefined ? any : `a ${typeof any}`}: ${PLACES}`);
  }
  if ('exportName' in target) return uriPlace(target);
  const given = ['path', 'port', 'fd'].filter((name) => (target as Record<string, unknown>)[name] !== undefined);
  if (given.length !== 1 && given.join() !== 'path,fd') {
    const what = given.length === 0 ? 'an object without any of path, port, fd' : given.join(' and ');
    throw new TypeError(`cannot listen on ${what}: ${PLACES}`);
  }
  return { options: checkedOptions(target) };
}

const PLACES = 'give an NBD URI, { path }, { port, host } or { fd }';

function uriPlace(uri: NbdUri): { readonly options: ListenOptions; readonly uri: NbdUri } {
  if (uri.transport === 'unix') return { options: checkedOptions({ path: uri.path }), uri };
  // Clients try both addresses of localhost; a server would get the first one, which may be that of IPv6 alone.
  const host = uri.host === 'localhost' ? LOOPBACK : uri.host;
  return { options: checkedOptions({ host, port: uri.port }), uri };
}

/** One of `path`, `port` and `fd` is there, of whatever type. */
function checkedOptions(options: ListenOptions): ListenOptions {
  const { path, mode, port, host = LOOPBACK, fd } = options as Readonly<Record<string, unknown>>;
  if (fd !== undefined) {
    if (isIntegerUpTo(fd, MAX_FD)) return { ...options, fd };
    throw new RangeError(`cannot listen on descriptor ${JSON.stringify(fd)}: it is not a descriptor's number`);
  }
  if (port !== undefined) {
    if (!isIntegerUpTo(port, 65535)) {
      throw new RangeError(`cannot listen on port ${JSON.stringify(port)}: it is not a number from 0 to 65535`);
    }
    // For an empty host Node takes every address of the machine: nobody should get that from a variable that is not set.
    if (typeof host === 'string' && host !== '') return { host, port };
    throw new TypeError('cannot listen on an empty host: leave it out for this machine alone, or give "::" for all');
  }
  if (typeof path !== 'string' || path === '') throw new TypeError('cannot listen on an empty path');
  if (mode !== undefined && !isIntegerUpTo(mode, MAX_MODE)) {
    throw new RangeError(`cannot listen on ${path}: mode ${JSON.stringify(mode)} is not a number from 0 to 0o777`);
  }
  if (mode !== undefined && path.startsWith('\0')) {
    throw new TypeError('mode is for the file of a unix socket, and an abstract one has none');
  }
  return { path: absolute(path), ...(mode !== undefined && { mode }) };
}

/** The path that is also right when the working directory has changed, unless a socket cannot have it. */
function absolute(path: string): string {
  const whole = path.startsWith('\0') ? path : resolvePath(path);
  return socketPathProblem(whole) === undefined ? whole : path;
}

function isIntegerUpTo(value: unknown, most: number): value is number {
  return typeof value === 'number' && Number.isInteger(value) && value >= 0 && value <= most;
}

/**
 * Bind `listener` and listen. A stale socket file is replaced; a socket that a process listens on, and any other kind of
 * file, is not.
 * Errors: ListenError.
 */
export async function bindListener(listener: net.Server, options: ListenOptions): Promise<BoundAddress> {
  if ('fd' in options) return adopt(listener, options);
  return 'path' in options ? bindUnix(listener, options) : bindTcp(listener, options);
}

/** The peer of `socket`, which `listener` has accepted. */
export function peerOf(
  socket: net.Socket,
  listener: net.Server,
  options: ListenOptions,
  credentialsOf: ((socket: net.Socket) => PeerCredentials | undefined) | undefined,
): Peer {
  const address = listener.address();
  if (address === null || typeof address === 'string') {
    const credentials = checkedCredentials(credentialsOf?.(socket));
    return { transport: 'unix', address: pathOf(options), ...(credentials !== undefined && { credentials }) };
  }
  const remote = socket.remoteAddress ?? 'unknown';
  const host =
    remote.startsWith(IPV4_MAPPED) && net.isIPv4(remote.slice(IPV4_MAPPED.length))
      ? remote.slice(IPV4_MAPPED.length)
      : remote;
  return { transport: 'tcp', address: `${remote}:${socket.remotePort ?? 0}`, host };
}

/** Errors: TypeError if they name no user: connections are counted, and rights are given, by it. */
function checkedCredentials(given: unknown): PeerCredentials | undefined {
  if (given === undefined || given === null) return undefined;
  const uid: unknown = typeof given === 'object' && 'uid' in given ? given.uid : undefined;
  if (typeof uid === 'number' && Number.isInteger(uid)) return given as PeerCredentials;
  throw new TypeError('peerCredentials returned neither undefined nor an object with the number uid');
}

async function adopt(listener: net.Server, options: { fd: number; path?: string }): Promise<BoundAddress> {
  try {
    await bind(listener, { fd: options.fd });
  } catch (error) {
    throw listenError(`descriptor ${options.fd}`, error);
  }
  return addressOf(listener, options);
}

/** The address of `listener`; Node has none for unix sockets that it did not bind. */
function addressOf(listener: net.Server, options: ListenOptions): BoundAddress {
  const address = listener.address();
  if (address === null || typeof address === 'string') return { transport: 'unix', path: pathOf(options) };
  return { transport: 'tcp', host: address.address, port: address.port };
}

function pathOf(options: ListenOptions): string {
  if ('path' in options && options.path !== undefined) return options.path;
  return 'fd' in options ? `descriptor ${options.fd}` : 'unknown';
}

async function bindTcp(listener: net.Server, options: { host?: string; port: number }): Promise<BoundAddress> {
  const { host = LOOPBACK, port } = options;
  try {
    await bind(listener, { host, port });
  } catch (error) {
    throw listenError(`${host}:${port}`, error);
  }
  return addressOf(listener, options);
}

async function bindUnix(listener: net.Server, options: { path: string; mode?: number }): Promise<BoundAddress> {
  const { path, mode } = options;
  const problem = socketPathProblem(path);
  if (problem !== undefined) throw new ListenError('FAILED', `cannot listen on ${path}: ${problem}`);
  try {
    await bind(listener, { path }, mode);
  } catch (error) {
    // Node reports a missing directory as a lack of permission (libuv, uv_pipe_bind).
    const directory = dirname(path);
    const isMissing = errorCode(error) === 'EACCES' && (await lstat(directory).catch(errorCode)) === 'ENOENT';
    if (isMissing) throw listenError(path, new Error(`there is no directory ${directory}`, { cause: error }));
    if (errorCode(error) !== 'EADDRINUSE') throw listenError(path, error);
    await removeStaleSocket(path);
    try {
      await bind(listener, { path }, mode);
    } catch (secondError) {
      throw listenError(path, secondError);
    }
  }
  return { transport: 'unix', path };
}

async function bind(
  listener: net.Server,
  address: { path: string } | { host: string; port: number } | { fd: number },
  mode?: number,
): Promise<void> {
  // The file must never exist with wider permissions than requested. It is created inside listen(), before that returns; a
  // worker thread cannot set the umask and relies on the chmod below.
  await new Promise<void>((resolve, reject) => {
    listener.once('error', reject);
    listener.once('listening', () => listener.off('error', reject));
    const umask = mode !== undefined && isMainThread ? process.umask(0o777 & ~mode) : undefined;
    try {
      listener.listen({ ...address, backlog: LISTEN_BACKLOG }, resolve);
    } finally {
      if (umask !== undefined) process.umask(umask);
    }
  }).finally(() => listener.removeAllListeners('listening'));
  if (mode !== undefined && 'path' in address) await chmod(address.path, mode);
}

/** Remove the socket file at `path` if no process listens on it. */
async function removeStaleSocket(path: string): Promise<void> {
  const found = await lstat(path).catch(() => undefined);
  if (found === undefined) return;
  if (!found.isSocket())
    throw new ListenError('NOT_A_SOCKET', `${path} exists and is not a socket; remove it yourself`);
  if (await isListenedOn(path)) throw new ListenError('IN_USE', `another server is listening on ${path}`);
  await unlink(path).catch((error: unknown) => {
    throw listenError(path, error);
  });
}

function isListenedOn(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const probe = net.connect({ path });
    probe.once('connect', () => {
      probe.destroy();
      resolve(true);
    });
    // Only a refusal proves that no process listens; anything else (EACCES, a full backlog) may be a live server.
    probe.once('error', (error) => resolve(errorCode(error) !== 'ECONNREFUSED'));
  });
}

function listenError(where: string, error: unknown): ListenError {
  if (error instanceof ListenError) return error;
  const message = error instanceof Error ? error.message : String(error);
  const code = errorCode(error) === 'EADDRINUSE' ? 'IN_USE' : 'FAILED';
  return new ListenError(code, `cannot listen on ${where}: ${message}`, { cause: error });
}

function errorCode(error: unknown): unknown {
  return error instanceof Error && 'code' in error ? error.code : undefined;
}
