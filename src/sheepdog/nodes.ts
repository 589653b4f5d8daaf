/**
 * The list of a cluster's nodes (internal_proto.h, struct sd_node) and the addresses in it. Owns their byte offsets.
 */
import { blob, nu64, struct, u16, u32 } from 'buffer-layout';
import { FormatError } from './format-error.js';
import { canonicalHost } from './node-address.js';
import { NODE_BYTES } from './protocol.js';

export interface ClusterNode {
  readonly host: string;
  readonly port: number;
  readonly vnodes: number;
  readonly zone: number;
  readonly space: number;
  /** The 16 bytes of its address, which placement hashes. */
  readonly address: Buffer;
  /** Only of nodes built with disk vnodes: placement goes by these, if the cluster is formatted so. */
  readonly disks: readonly NodeDisk[];
}

/** struct disk_info. */
export interface NodeDisk {
  readonly id: bigint;
  /** Bytes. */
  readonly space: bigint;
}

interface NodeLayout {
  addr: Buffer;
  port: number;
  nrVnodes: number;
  zone: number;
  space: number;
}

/** struct sd_node: a red-black tree's links, which mean nothing on the wire, then struct node_id. */
const nodeLayout = struct<NodeLayout>([
  blob(24, 'rb'),
  blob(16, 'addr'),
  u16('port'),
  blob(16, 'ioAddr'),
  u16('ioPort'),
  blob(4, 'pad'),
  u16('nrVnodes'),
  blob(2, 'pad2'),
  u32('zone'),
  nu64('space'),
]);

/** struct disk_info, and how many follow each node that is built with --enable-diskvnodes (DISK_MAX). */
const DISK_BYTES = 16;
const MAX_DISKS = 32;
const NODE_WITH_DISKS_BYTES = NODE_BYTES + MAX_DISKS * DISK_BYTES;

/** Errors: FormatError if entries have a length that no nodes are known to have. */
export function decodeNodes(bytes: Buffer, count: number): ClusterNode[] {
  const nodes: ClusterNode[] = [];
  // The header does not tell how the nodes were built.
  const entryBytes = count === 0 ? NODE_BYTES : bytes.length / count;
  if (entryBytes !== NODE_BYTES && entryBytes !== NODE_WITH_DISKS_BYTES) {
    throw new FormatError(
      `the cluster's list of ${count} nodes has ${bytes.length} bytes: entries of ${NODE_BYTES} or ${NODE_WITH_DISKS_BYTES} ` +
        'bytes are known (sheep built without and with --enable-diskvnodes)',
    );
  }
  for (let n = 0; n < count; n++) {
    const entry = bytes.subarray(n * entryBytes, (n + 1) * entryBytes);
    const { addr, port, nrVnodes, zone, space } = nodeLayout.decode(entry);
    const disks = decodeDisks(entry.subarray(NODE_BYTES));
    nodes.push({ host: addressText(addr), port, vnodes: nrVnodes, zone, space, address: Buffer.from(addr), disks });
  }
  return nodes;
}

function decodeDisks(bytes: Buffer): NodeDisk[] {
  const disks: NodeDisk[] = [];
  for (let at = 0; at < bytes.length; at += DISK_BYTES) {
    const id = bytes.readBigUInt64LE(at);
    if (id !== 0n) disks.push({ id, space: bytes.readBigUInt64LE(at + 8) });
  }
  return disks;
}

/**
 * addr of struct node_id: IPv6, or IPv4 in the last four bytes with zeros before. As the nodes tell one from the other
 * (lib/net.c, addr_to_str): ::1 begins with as many zeros, but no IPv4 address begins with one more.
 */
export function addressText(addr: Buffer): string {
  if (addr[12] !== 0 && addr.subarray(0, 12).every((byte) => byte === 0)) return addr.subarray(12).join('.');
  const groups: string[] = [];
  for (let at = 0; at < 16; at += 2) groups.push(addr.readUInt16BE(at).toString(16));
  return canonicalHost(groups.join(':'));
}
