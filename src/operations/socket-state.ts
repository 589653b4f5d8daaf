/**
 * Whether a process listens on a unix socket, or a dead process has left it behind. Removes only sockets (and links to them), and
 * only if no process listens there.
 */
import fs from 'node:fs';
import net from 'node:net';
import { CONNECT_TIMEOUT_MS } from './control-protocol.js';
import { OperationError } from './operations.js';
import { socketAddress, type SocketAddress } from './socket-address.js';

export type SocketState = 'absent' | 'stale' | 'alive' | 'not a socket';

/** What is at `socketPath`. Errors: PERMISSION (not allowed to connect), IO. */
export async function socketState(socketPath: string): Promise<SocketState> {
  const status = lookAt(socketPath);
  if (!status) return 'absent';
  if (!status.isSocket() && !status.isSymbolicLink()) return 'not a socket';
  const code = await tryConnect(socketPath);
  switch (code) {
    case 'connected':
    case 'EAGAIN': // its backlog is full
    case 'timeout':
      return 'alive';
    case 'ECONNREFUSED':
    case 'ENOENT':
      return 'stale';
    case 'ENOTSOCK':
      return 'not a socket';
    case 'EACCES':
    case 'EPERM':
      throw noPermission(socketPath);
    default:
      throw new OperationError('IO', `cannot find out whether a process listens on ${socketPath}: ${code}`);
  }
}

function lookAt(socketPath: string): fs.Stats | undefined {
  try {
    return fs.lstatSync(socketPath, { throwIfNoEntry: false });
  } catch (error) {
    // Its directory cannot be entered.
    if ((error as NodeJS.ErrnoException).code === 'EACCES') throw noPermission(socketPath);
    throw error;
  }
}

function noPermission(socketPath: string): OperationError {
  return new OperationError('PERMISSION', `no permission to connect to ${socketPath}; it belongs to another user`);
}

/** Remove a stale socket, before listening on `socketPath`. Errors: IN_USE (a process listens there, or it is not a socket). */
export async function removeStaleSocket(socketPath: string): Promise<void> {
  await refuseUsedSocket(socketPath);
  fs.rmSync(socketPath, { force: true });
}

/** Fails if `socketPath` cannot be listened on; changes nothing. Errors: IN_USE (a process listens there, or it is not a socket). */
export async function refuseUsedSocket(socketPath: string): Promise<void> {
  const state = await socketState(socketPath);
  if (state === 'not a socket')
    throw new OperationError('IN_USE', `${socketPath} exists and is not a socket; choose another path`);
  if (state === 'alive')
    throw new OperationError('IN_USE', `another process listens on ${socketPath}; stop it or choose another path`);
}

function tryConnect(socketPath: string): Promise<string> {
  let address: SocketAddress;
  try {
    address = socketAddress(socketPath);
  } catch (error) {
    return Promise.resolve((error as NodeJS.ErrnoException).code ?? 'EIO');
  }
  const socket = net.connect({ path: address.path });
  return new Promise<string>((resolve) => {
    socket.setTimeout(CONNECT_TIMEOUT_MS, () => resolve('timeout'));
    socket.once('connect', () => resolve('connected'));
    socket.on('error', (error: NodeJS.ErrnoException) => resolve(error.code ?? 'EIO'));
  }).finally(() => {
    socket.destroy();
    address.release();
  });
}
