/**
 * What Node does not tell of a socket's output, and the orderly end of a socket: the last bytes leave before it is closed.
 */

import type net from 'node:net';
import type { Duplex } from 'node:stream';

/**
 * Bytes of all that was written to `stream` that the system has taken. A long reply, or a batch of short ones, is one write,
 * which a slow client takes in the course of minutes: counting completed writes does not show its progress. Undefined if
 * Node does not tell.
 */
export function bytesTakenBySystem(stream: Duplex): number | undefined {
  const { _handle: handle } = stream as { _handle?: { bytesWritten?: unknown; writeQueueSize?: unknown } | null };
  if (typeof handle?.bytesWritten !== 'number' || typeof handle.writeQueueSize !== 'number') return undefined;
  return handle.bytesWritten - handle.writeQueueSize;
}

/** Bytes written to `socket` that the system has not taken. */
export function unsentBytes(socket: net.Socket): number {
  return socket.bytesWritten - (bytesTakenBySystem(socket) ?? socket.bytesWritten);
}

/**
 * Close `socket`, which has no listener for 'data' any more, once its output has left and the client has closed its side; after
 * `lingerMs` in any case.
 */
export function closeAfterOutput(socket: Duplex, lingerMs: number): void {
  const timer = setTimeout(() => socket.destroy(), lingerMs);
  socket.once('close', () => clearTimeout(timer));
  // Read to the client's own end and discard the input: a TCP socket that is closed with input unread, or that receives some
  // afterwards, sends a reset, and the client may lose the replies it has not read yet.
  const closeIfBothEnded = (): void => {
    if (socket.writableFinished && socket.readableEnded) socket.destroy();
  };
  socket.on('end', closeIfBothEnded);
  socket.resume();
  socket.end(closeIfBothEnded);
}

/**
 * `onStuck` is called when output waits in `socket` and the client has taken nothing for `lingerMs`. `transport`: the socket
 * below TLS, or the same one. `isWanted`: false ends the watch.
 */
export function watchOutput(
  socket: Duplex,
  transport: Duplex,
  lingerMs: number,
  isWanted: () => boolean,
  onStuck: () => void,
): void {
  const taken = bytesTakenBySystem(transport);
  setTimeout(() => {
    if (socket.destroyed || !isWanted() || socket.writableLength === 0) return;
    if (bytesTakenBySystem(transport) !== taken) watchOutput(socket, transport, lingerMs, isWanted, onStuck);
    else onStuck();
  }, lingerMs).unref();
}
