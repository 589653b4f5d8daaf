/**
 * NBD connections as the control API shows them, and the disconnect of one. Owns how long a disconnect waits for the connection's
 * requests. Refuses no client itself: src/export/writers.ts does, when a client opens an export.
 */
import type { ConnectionInfo, NbdServer } from 'nbd-server-ts';
import { clientOf } from '../../export/peer-client.js';
import type { Claim } from '../../export/writer-claim.js';
import type { Writers } from '../../export/writers.js';
import { DISCONNECT_WAIT_MS, type ConnectionStatus, type Disconnected } from '../../operations/control-protocol.js';
import { OperationError } from '../../operations/operations.js';
import { labelOfPeer } from '../log/connection-log.js';

/** Cut a connection off. Resolves when it is over, or after DISCONNECT_WAIT_MS. Errors: NO_CLIENT. */
export async function disconnect(
  nbd: NbdServer,
  writers: Writers,
  id: number,
  keepOutMs: number,
): Promise<Disconnected> {
  const found = nbd.connections.get(id);
  if (found === undefined) {
    throw new OperationError(
      'NO_CLIENT',
      `there is no connection ${id}; 'sheepgate client list' shows all connections`,
    );
  }
  const connection = statusOf(found, writers);
  writers.keepOut(found.peer, keepOutMs);
  const over = nbd.disconnect(id, 'disconnected by the operator');
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<boolean>((resolve) => {
    timer = setTimeout(() => resolve(false), DISCONNECT_WAIT_MS);
  });
  const isOver = await Promise.race([over.then(() => true), late]);
  clearTimeout(timer);
  return { connection, isOver, inFlight: isOver ? 0 : found.inFlight };
}

export function statusOf(connection: ConnectionInfo, writers: Writers): ConnectionStatus {
  const { peer, exportName } = connection;
  return {
    id: connection.id,
    peer: labelOfPeer(peer),
    export: exportName ?? null,
    client: clientOf(peer)?.label ?? null,
    access: exportName === undefined || peer.transport === 'internal' ? null : accessOf(writers.claimOf(peer)),
    openedAt: new Date(connection.openedAt).toISOString(),
    bytesRead: connection.bytesRead,
    bytesWritten: connection.bytesWritten,
    requests: connection.requests,
  };
}

function accessOf(claim: Claim | undefined): ConnectionStatus['access'] {
  if (claim === undefined || !claim.mayWrite) return 'read-only';
  return claim.isExclusive ? 'exclusive' : 'read-write';
}
