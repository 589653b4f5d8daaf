/**
 * Paths of unix sockets as bind(2) and connect(2) take them, also where the path is longer than a socket address. Owns those
 * bounds. Binds and connects nothing.
 */
import fs from 'node:fs';
import path from 'node:path';
import { OperationError } from './operations.js';

/** sockaddr_un.sun_path holds 108 bytes including the terminating NUL. */
export const MAX_SOCKET_PATH_BYTES = 107;

/** Prefix of the last name of a longer path, with the largest possible descriptor. */
const DESCRIPTOR_PREFIX = '/proc/self/fd/4294967295/';
/** For the last name of a path that is longer than MAX_SOCKET_PATH_BYTES. */
export const MAX_SOCKET_NAME_BYTES = MAX_SOCKET_PATH_BYTES - DESCRIPTOR_PREFIX.length;

/** A unix socket's path in a form that bind(2) and connect(2) take, for paths of any length. */
export interface SocketAddress {
  readonly path: string;
  /** Call when neither bind nor connect will be tried again. */
  release(): void;
}

/** Errors: BAD_USAGE (no socket can have this path; Node would silently make one with a shorter name). */
export function checkSocketPath(socketPath: string): void {
  const bytes = Buffer.byteLength(socketPath);
  const nameBytes = Buffer.byteLength(path.basename(socketPath));
  if (bytes <= MAX_SOCKET_PATH_BYTES || nameBytes <= MAX_SOCKET_NAME_BYTES) return;
  throw new OperationError(
    'BAD_USAGE',
    `${socketPath}: the path has ${bytes} bytes, a unix socket's at most ${MAX_SOCKET_PATH_BYTES} (or a last name of ` +
      `${MAX_SOCKET_NAME_BYTES}, and this one has ${nameBytes}); choose a shorter one`,
  );
}

/**
 * A path that is too long for a socket address is reached through a descriptor of its directory; then only the last name has to
 * fit. Errors: BAD_USAGE; the system's (ENOENT, …) if the directory cannot be opened.
 */
export function socketAddress(socketPath: string): SocketAddress {
  checkSocketPath(socketPath);
  if (Buffer.byteLength(socketPath) <= MAX_SOCKET_PATH_BYTES) return { path: socketPath, release: () => undefined };
  const directory = fs.openSync(path.dirname(socketPath), fs.constants.O_RDONLY | fs.constants.O_DIRECTORY);
  return {
    path: `/proc/self/fd/${directory}/${path.basename(socketPath)}`,
    release: () => fs.closeSync(directory),
  };
}
