/** Connects the client's socket: over TCP, or to a unix socket. */

import net from 'node:net';
import { socketPathProblem } from '../protocol/socket-path.js';
import { NbdClientError } from './client-error.js';

/** Errors: NbdClientError CLOSED (the connection failed, or the path is too long). */
export function connectSocket(address: { path: string } | { host: string; port: number }): Promise<net.Socket> {
  const problem = 'path' in address ? socketPathProblem(address.path) : undefined;
  if (problem !== undefined && 'path' in address) {
    return Promise.reject(new NbdClientError('CLOSED', `cannot connect to ${address.path}: ${problem}`));
  }
  return new Promise((resolve, reject) => {
    const socket = net.connect({ ...address, noDelay: true });
    const refuse = (error: Error): void => {
      const where = 'path' in address ? address.path : `${address.host}:${address.port}`;
      reject(new NbdClientError('CLOSED', `cannot connect to ${where}: ${error.message}`, { cause: error }));
    };
    socket.once('error', refuse);
    socket.once('connect', () => {
      socket.off('error', refuse);
      resolve(socket);
    });
  });
}
