/**
 * The warning about a listener that other users or machines can reach with neither TLS nor an access file in the way. Owns its
 * conditions and its text. Refuses nothing: listeners.ts does.
 */
import fs from 'node:fs';
import path from 'node:path';
import { formatListenAddress, isLocalOnly, type ListenAddress } from '../listen-address.js';
import type { SecurityConfiguration } from './security.js';

const WRITTEN_BY_ALL = 0o002;
const ENTERED_BY_ALL = 0o001;

/**
 * The warning for an address where others can read and write every VDI; undefined if no others can reach it, or they are kept
 * out.
 */
export function exposureOf(address: ListenAddress, security: SecurityConfiguration = {}): string | undefined {
  if (security.access !== undefined) return undefined;
  const who = othersAt(address);
  if (who === undefined) return undefined;
  const reach = `${formatListenAddress(address)}: ${who} can read and write every VDI there`;
  const { tls } = security;
  if (tls?.mode === 'on') {
    return `${reach}: clients may connect without TLS (unless --tls require is given), and there is no access file (docs/access.md, docs/tls.md)`;
  }
  if (tls?.mode !== 'require') {
    return `${reach}, because it has neither TLS nor an access file (docs/access.md, docs/tls.md)`;
  }
  // With certificates and pre-shared keys, a client needs neither of them unless --tls-verify-peer is given.
  const provesClients = tls.verifyPeer || tls.certificates === undefined;
  if (provesClients) return undefined;
  return `${reach}: its TLS encrypts, but clients need no certificate (--tls-verify-peer), and there is no access file`;
}

function othersAt(address: ListenAddress): string | undefined {
  if (address.transport === 'tcp') {
    return isLocalOnly(address) ? 'every user of this machine' : 'everybody who can reach this address';
  }
  return isOpenToAll(address.path) ? 'every user of this machine' : undefined;
}

/** Whether every user may connect to a unix socket: that takes write permission, and access to each directory on the way. */
function isOpenToAll(socketPath: string): boolean {
  // An abstract name has no owner and no mode: unix(7).
  if (socketPath.startsWith('@')) return true;
  try {
    if ((fs.statSync(socketPath).mode & WRITTEN_BY_ALL) === 0) return false;
    for (let entry = socketPath; entry !== path.dirname(entry); entry = path.dirname(entry)) {
      if ((fs.statSync(path.dirname(entry)).mode & ENTERED_BY_ALL) === 0) return false;
    }
    return true;
  } catch {
    return false;
  }
}
