/** Where a node is reached, and the one way in which its address is written. Owns no syntax of options. */

export interface NodeAddress {
  readonly host: string;
  readonly port: number;
}

/** An IPv6 address without brackets in its canonical form; any other host as it is. A zone ("%eth0") stays. */
export function canonicalHost(host: string): string {
  if (!host.includes(':')) return host;
  const [address = '', ...zone] = host.split('%');
  if (!URL.canParse(`http://[${address}]`)) return host;
  return [new URL(`http://[${address}]`).hostname.slice(1, -1), ...zone].join('%');
}

/** HOST:PORT, or [HOST]:PORT for an IPv6 address. */
export function addressLabel({ host, port }: NodeAddress): string {
  return host.includes(':') ? `[${host}]:${port}` : `${host}:${port}`;
}
