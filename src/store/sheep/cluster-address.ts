/** What --cluster says: HOST[:PORT], several separated by commas. Owns the syntax, nothing else. */
import { StoreError } from '../object-store.js';
import type { NodeAddress } from './connection.js';
import { DEFAULT_PORT } from './protocol.js';

/** Errors: StoreError ADDRESS with what is wrong. IPv6 addresses go in brackets. */
export function parseClusterAddress(text: string): NodeAddress[] {
  const addresses = text.split(',').map((part) => parseNode(part.trim(), text));
  if (addresses.length === 0) throw badAddress(text, 'there is no node in it');
  return addresses;
}

function parseNode(text: string, whole: string): NodeAddress {
  const match = /^(?:\[([0-9A-Fa-f:.]+)\]|([^\s:[\]/@]+))(?::(\d{1,5}))?$/.exec(text);
  if (!match) throw badAddress(whole, `"${text}" is no HOST or HOST:PORT`);
  const port = match[3] === undefined ? DEFAULT_PORT : Number(match[3]);
  if (port < 1 || port > 65_535) throw badAddress(whole, `${port} is no port`);
  return { host: match[1] ?? match[2] ?? '', port };
}

function badAddress(text: string, why: string): StoreError {
  return new StoreError('ADDRESS', `cluster "${text}": ${why}; give HOST[:PORT][,HOST[:PORT]...]`);
}
