/**
 * Listening sockets: where a server listens, how an address is bound, and the peer of an accepted connection. It owns socket
 * files and their permissions; it never reads or writes an accepted connection.
 */

import { chmod, lstat, unlink } from 'node:fs/promises';
import net from 'node:net';
import { isMainThread } from 'node:worker_threads';
import type { Peer, PeerCredentials } from '../block-device.js';
import { brand } from '../brand.js';
import { socketPathProblem } from '../protocol/socket-path.js';

/**
 * Where to listen: a unix socket, with the permissions of its file, a TCP address (port 0: any free one), or a
 * descriptor of a socket of either kind that listens already (socket activation).
 */
export type ListenOptions =
  | { readonly path: string; readonly mode?: number }
  | { readonly host: string; readonly port: number }
  | {
      readonly fd: number;
      /** The path, for a unix socket: Node cannot determine it. */
      readonly path?: string;
    };

/** Where a server listens. */
export type BoundAddress =
  | { readonly transport: 'unix'; readonly path: string }
  | { readonly transport: 'tcp'; readonly host: string; readonly port: number };

/** Why a server could not listen. INVALID: the options make no sense. */
export type ListenErrorCode = 'IN_USE' | 'NOT_A_SOCKET' | 'CLOSED' | 'INVALID' | 'FAILED';

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
const MAX_FD = 2 ** 31 - 1;
const IPV4_MAPPED = '::ffff:';

/**
 * Bind `listener` and listen. A stale socket file is replaced; a socket that a process listens on, and any other kind of
 * file, is not.
 * Errors: ListenError.
 */
export async function bindListener(listener: net.Server, options: ListenOptions): Promise<BoundAddress> {
  const problem = listenProblem(options);
  if (problem !== undefined) throw new ListenError('INVALID', `cannot listen: ${problem}`);
  if ('fd' in options) return adopt(listener, options);
  return 'path' in options ? bindUnix(listener, options) : bindTcp(listener, options);
}

/** Why `options`, which may come from plain JavaScript or a configuration, name no address; undefined if they do. */
function listenProblem(options: unknown): string | undefined {
  if (typeof options !== 'object' || options === null) return 'there are no options';
  const { path, mode, host, port, fd } = options as Readonly<Record<string, unknown>>;
  if (fd !== undefined) return isWhole(fd, 0, MAX_FD) ? undefined : 'fd is not a descriptor, a whole number from 0 on';
  if (path !== undefined) {
    if (typeof path !== 'string' || path === '') return 'path is not the path of a socket';
    if (mode !== undefined && !isWhole(mode, 0, 0o777)) return 'mode is not a number from 0 to 0o777';
    return undefined;
  }
  if (!isWhole(port, 0, 65535)) return 'port is not a whole number from 0 to 65535 (and there is neither path nor fd)';
  // Node listens at every address of the machine without a host.
  if (typeof host !== 'string' || host === '') {
    return "host is missing: 'localhost' for this machine, '::' for all addresses";
  }
  return undefined;
}

function isWhole(value: unknown, least: number, most: number): boolean {
  return typeof value === 'number' && Number.isInteger(value) && value >= least && value <= most;
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

async function bindTcp(listener: net.Server, options: { host: string; port: number }): Promise<BoundAddress> {
  const { host, port } = options;
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
