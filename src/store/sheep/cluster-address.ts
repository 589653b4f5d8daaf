/**
 * The syntax of --cluster, HOST[:PORT][,HOST[:PORT]...], and of the location of a store in a cluster. Every command loads this
 * file, so it must not import what talks to a cluster.
 */
import { StoreError } from '../store-error.js';
import { addressLabel, canonicalHost, type NodeAddress } from '../../sheepdog/node-address.js';
import { DEFAULT_PORT } from '../../sheepdog/protocol.js';

// For src/cli, which must not import src/sheepdog.
export { addressLabel, type NodeAddress };

/** Marks a location as a cluster's; a directory never begins like this. */
const CLUSTER_SCHEME = 'sheepdog://';

/** "sheepdog://HOST:PORT,..." for the text of --cluster. Errors: ADDRESS (syntax). */
export function clusterLocation(text: string): string {
  return CLUSTER_SCHEME + parseClusterAddress(text).map(addressLabel).join(',');
}

export function isClusterLocation(location: string): boolean {
  return location.startsWith(CLUSTER_SCHEME);
}

/** The nodes in a location, with or without the scheme. IPv6 addresses need brackets. Errors: ADDRESS (syntax). */
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
