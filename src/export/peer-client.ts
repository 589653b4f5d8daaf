/**
 * A peer as the client it is, also when it comes back: NBD has no name for it. On a unix socket it is the process, on TCP the
 * address with what TLS has proven. Owns that choice; docs/clients.md tells people of it.
 */
import type { Peer } from 'nbd-server-ts';
import type { Client } from '../vdi/client-use.js';
import { bootId, processKey } from '../system/process-identity.js';

/** Undefined for commands of our own, which never come back by themselves. */
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
  // In another PID namespace the kernel has no number for it.
  if (pid <= 0) return { id: `unix uid ${uid}`, label: `a process of uid ${uid}`, isExact: false };
  // Hidden from us (ProtectProc= of systemd, hidepid= of /proc): numbers are given out again, but not soon.
  if (startTime === undefined) {
    return { id: `unix ${bootId}:${pid} uid ${uid}`, label: `process ${pid} of uid ${uid}`, isExact: true };
  }
  const name = command === undefined ? '' : ` (${printable(command)})`;
  const process = processKey(pid, startTime);
  return { id: `unix ${process}`, label: `process ${pid}${name}`, isExact: true, process };
}

/** A process chooses its name. */
function printable(text: string): string {
  return text.replace(/[^\x20-\x7e]/g, '?');
}
