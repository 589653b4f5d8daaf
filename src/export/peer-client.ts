/**
 * Which client a peer is, so that it is recognised when it reconnects: NBD has no name for clients. On a unix socket the client
 * is the process, on TCP the address with the name that TLS has proven. Owns that choice; docs/clients.md explains it.
 */
import type { Peer } from 'nbd-server-ts';
import type { Client } from '../vdi/client-use.js';
import { bootId, processKey } from '../system/process-identity.js';

/** Undefined for our own commands, which never reconnect by themselves. */
export function clientOf(peer: Peer): Client | undefined {
  if (peer.transport === 'internal') return undefined;
  if (peer.transport === 'unix') return ofUnix(peer);
  const host = peer.host ?? peer.address;
  const proven = peer.tls?.pskUser ?? peer.tls?.certificateNames[0];
  if (proven === undefined) return { id: `tcp ${host}`, label: `tcp ${host}`, isExact: false };
  return { id: `tcp ${host} ${proven}`, label: `tcp ${host} (${proven})`, isExact: false };
}

function ofUnix({ credentials }: Peer): Client {
  if (credentials === undefined) return { id: 'unix', label: 'a unix socket client', isExact: false };
  const { pid, uid, startTime, command } = credentials;
  // A process in another PID namespace has no pid here.
  if (pid <= 0) return { id: `unix uid ${uid}`, label: `a process of uid ${uid}`, isExact: false };
  // Hidden from us (ProtectProc= of systemd, hidepid= of /proc). The kernel reuses pids, but not soon.
  if (startTime === undefined) {
    return { id: `unix ${bootId}:${pid} uid ${uid}`, label: `process ${pid} of uid ${uid}`, isExact: true };
  }
  const name = command === undefined ? '' : ` (${printable(command)})`;
  const process = processKey(pid, startTime);
  return { id: `unix ${process}`, label: `process ${pid}${name}`, isExact: true, process };
}

/** A process chooses its own name, so it may hold anything. */
function printable(text: string): string {
  return text.replace(/[^\x20-\x7e]/g, '?');
}
