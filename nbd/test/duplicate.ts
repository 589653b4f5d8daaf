/** Duplicates a socket's descriptor, as a program that hands over a connection does. Node has no function for it. */

import net from 'node:net';
import koffi from 'koffi';

const dup = koffi.load('libc.so.6').func('int dup(int fd)') as (fd: number) => number;

/** A new descriptor of this process for the connection of `socket`. The caller owns it. */
export function duplicate(socket: net.Socket): number {
  const { _handle: handle } = socket as unknown as { _handle: { fd: number } | null };
  const fd = handle === null ? -1 : dup(handle.fd);
  if (fd < 0) throw new Error('the descriptor cannot be duplicated');
  return fd;
}

/** Another socket for the same connection. */
export function duplicateSocket(socket: net.Socket): net.Socket {
  return new net.Socket({ fd: duplicate(socket), readable: true, writable: true });
}
