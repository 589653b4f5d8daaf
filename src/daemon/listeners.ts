/**
 * The NBD listeners of the daemon: addresses of --listen, and sockets from systemd. Owns the rule that an address which other
 * machines can reach is not served without TLS, unless that is asked for. Serves nothing itself.
 */
import path from 'node:path';
import { ListenError, type NbdServer } from 'nbd-server-ts';
import { makeSocketDirectory } from '../operations/default-paths.js';
import { OperationError } from '../operations/operations.js';
import { boundAddress } from '../system/socket-calls.js';
import { formatListenAddress, isLocalOnly, type ListenAddress } from './listen-address.js';
import type { InheritedSocket } from './systemd.js';

/** Permissions of unix sockets: this user only. --socket-mode lets other users in. */
export const DEFAULT_SOCKET_MODE = 0o600;

/** Errors: PLAINTEXT (other machines can reach the address). */
export function refusePlaintext(address: ListenAddress): void {
  if (isLocalOnly(address)) return;
  throw new OperationError(
    'PLAINTEXT',
    `${formatListenAddress(address)} can be reached from other machines, and NBD in the clear has neither passwords ` +
      'nor encryption: give --tls require with --tls-certificates or --tls-psk, or --allow-plaintext if the network is trusted',
  );
}

/** Listen on an address of --listen. Errors: those of ListenError. */
export async function listen(nbd: NbdServer, address: ListenAddress, socketMode: number): Promise<ListenAddress> {
  if (address.transport === 'unix') makeSocketDirectory(path.dirname(address.path));
  try {
    return await nbd.listen(
      address.transport === 'unix'
        ? { path: address.path, mode: socketMode }
        : { host: address.host, port: address.port },
    );
  } catch (error) {
    if (!(error instanceof ListenError)) throw error;
    throw new OperationError(error.code, `${error.message}; choose another address with --listen`, { cause: error });
  }
}

/** Listen on a socket from systemd. Errors: ACTIVATION (it cannot be served), PLAINTEXT. */
export async function adopt(
  nbd: NbdServer,
  { fd, name }: InheritedSocket,
  mayBePublic: boolean,
): Promise<ListenAddress> {
  const bound = boundAddress(fd);
  const unusable = (why: string, cause?: unknown): OperationError =>
    new OperationError(
      'ACTIVATION',
      `descriptor ${fd}, "${name}" of the socket unit, ${why}; give ListenStream= a path or ADDRESS:PORT`,
      { cause },
    );
  // Node cannot adopt other families, AF_VSOCK among them.
  if (bound === undefined) throw unusable('is neither a unix nor an IP socket');
  if (!mayBePublic && 'host' in bound) refusePlaintext({ transport: 'tcp', ...bound });
  try {
    return await nbd.listen('path' in bound ? { fd, path: bound.path } : { fd });
  } catch (error) {
    if (!(error instanceof ListenError)) throw error;
    throw unusable(`cannot be listened on (${error.message})`, error);
  }
}
