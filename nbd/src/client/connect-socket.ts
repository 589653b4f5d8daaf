/** Connects the client's socket: over TCP, or to a unix socket. */

import net from 'node:net';
import { socketPathProblem } from '../protocol/socket-path.js';
import { NbdClientError } from './client-error.js';

/** After so long without input TCP asks whether the other machine is still there, milliseconds. */
const KEEP_ALIVE_MS = 30_000;

/**
 * @param onSocket is given the socket at once, to destroy it if the caller gives up
 * Errors: NbdClientError CLOSED (the connection failed, or the path is too long).
 */
export function connectSocket(
  address: { path: string } | { host: string; port: number },
  where: string,
  onSocket: (socket: net.Socket) => void,
): Promise<net.Socket> {
  const problem = 'path' in address ? socketPathProblem(address.path) : undefined;
  if (problem !== undefined) {
    return Promise.reject(new NbdClientError('CLOSED', `cannot connect to ${where}: ${problem}`));
  }
  return new Promise((resolve, reject) => {
    const socket = net.connect({
      ...address,
      noDelay: true,
      keepAlive: true,
      keepAliveInitialDelay: KEEP_ALIVE_MS,
    });
    onSocket(socket);
    const refuse = (error?: Error): void => {
      // Every address of a host may have failed: the errors are in it, and its own message is empty.
      const causes = error instanceof AggregateError ? (error.errors as Error[]).map(({ message }) => message) : [];
      const why = error === undefined ? 'closed' : error.message || causes.join(', ');
      reject(new NbdClientError('CLOSED', `cannot connect to ${where}: ${why}`, { cause: error }));
    };
    socket.once('error', refuse);
    socket.once('close', () => refuse());
    socket.once('connect', () => {
      socket.off('error', refuse);
      resolve(socket);
    });
  });
}
