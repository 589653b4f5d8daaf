/**
 * What --cluster says, HOST[:PORT] and several of them separated by commas, and the location of a store that comes of
 * it. Owns the syntax, nothing else; every command reads it, so it loads nothing of what speaks to a cluster.
 */
import { StoreError } from '../object-store.js';
import { addressLabel, canonicalHost, type NodeAddress } from '../../sheepdog/node-address.js';
import { DEFAULT_PORT } from '../../sheepdog/protocol.js';

export { addressLabel, type NodeAddress };

/** Marks a location as a cluster's; a directory never begins like this. */
const CLUSTER_SCHEME = 'sheepdog://';

/** "sheepdog://HOST:PORT,...", for what --cluster says. Errors: StoreError ADDRESS. */
export function clusterLocation(text: string): string {
  return CLUSTER_SCHEME + parseClusterAddress(text).map(addressLabel).join(',');
}

export function isClusterLocation(location: string): boolean {
  return location.startsWith(CLUSTER_SCHEME);
}

/** The nodes in it, with or without the scheme. Errors: StoreError ADDRESS. IPv6 addresses go in brackets. */
export function parseClusterAddress(location: string): NodeAddress[] {
  const text = isClusterLocation(location) ? location.slice(CLUSTER_SCHEME.length) : location;
  return text.split(',').map((part) => parseNode(part.trim(), text));
}

function parseNode(text: string, whole: string): NodeAddress {
  const match = /^(?:\[([^\s[\]/@]*)\]|([^\s:[\]/@]+))(?::(\d{1,5}))?$/.exec(text);
  if (!match)
    throw badAddress(
      whole,
      `"${text}" is no HOST or HOST:PORT${isAddress(text) ? `; an IPv6 address goes in brackets, "[${text}]"` : ''}`,
    );
  if (match[1] !== undefined && !isAddress(match[1])) throw badAddress(whole, `"${match[1]}" is no IPv6 address`);
  const port = match[3] === undefined ? DEFAULT_PORT : Number(match[3]);
  if (port < 1 || port > 65_535) throw badAddress(whole, `${port} is no port`);
  return { host: canonicalHost(match[1] ?? match[2] ?? ''), port };
}

function isAddress(text: string): boolean {
  return text.includes(':') && URL.canParse(`http://[${text.split('%')[0]}]`);
}

function badAddress(text: string, why: string): StoreError {
  return new StoreError('ADDRESS', `cluster "${text}": ${why}; give HOST[:PORT][,HOST[:PORT]...]`);
}
