/**
 * Who can reach a listener for whom it was perhaps not meant, and what stands in their way. Owns the warning that is given at
 * the start; whoever reads it decides. What is refused outright is the daemon's affair.
 */
import fs from 'node:fs';
import path from 'node:path';
import { formatListenAddress, isLocalOnly, type ListenAddress } from '../listen-address.js';
import type { SecurityConfiguration } from './security.js';

const WRITTEN_BY_ALL = 0o002;
const ENTERED_BY_ALL = 0o001;

/** What to tell of an address where others can do everything, or undefined if there are none, or something keeps them out. */
export function exposureOf(address: ListenAddress, security: SecurityConfiguration = {}): string | undefined {
  if (security.access !== undefined) return undefined;
  const who = othersAt(address);
  if (who === undefined) return undefined;
  const reach = `${formatListenAddress(address)}: ${who} can read and write every VDI there`;
  const { tls } = security;
  if (tls?.mode === 'on') {
    return `${reach}: its TLS may be left out (--tls require), and there is no access file (docs/access.md, docs/tls.md)`;
  }
  if (tls?.mode !== 'require') {
    return `${reach}, for it has neither TLS nor an access file (docs/access.md, docs/tls.md)`;
  }
  // With certificates beside the keys, a client needs neither unless it is asked to show one.
  const provesClients = tls.verifyPeer || tls.certificates === undefined;
  if (provesClients) return undefined;
  return `${reach}: its TLS encrypts, but asks nobody who he is (--tls-verify-peer), and there is no access file`;
}

function othersAt(address: ListenAddress): string | undefined {
  if (address.transport === 'tcp') {
    return isLocalOnly(address) ? 'every user of this machine' : 'everybody who can reach this address';
  }
  return isOpenToAll(address.path) ? 'every user of this machine' : undefined;
}

/** Whether every user may connect to a unix socket: to connect is to write, on the way there each directory is entered. */
function isOpenToAll(socketPath: string): boolean {
  // An abstract name has no owner and no mode: unix(7).
  if (socketPath.startsWith('@')) return true;
  try {
    if ((fs.statSync(socketPath).mode & WRITTEN_BY_ALL) === 0) return false;
    for (let place = socketPath; place !== path.dirname(place); place = path.dirname(place)) {
      if ((fs.statSync(path.dirname(place)).mode & ENTERED_BY_ALL) === 0) return false;
    }
    return true;
  } catch {
    return false;
  }
}
