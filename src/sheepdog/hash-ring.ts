/**
 * Placement: the ring of a cluster's nodes, which determines the nodes of an object's copies. The first of them answers a read
 * from its disk; any other node would have to fetch the object. Owns the arithmetic only. For reads through a cluster the
 * result is a hint: every node serves every object, and while members change it is wrong.
 *
 * Source: sheepdog_proto.h (sd_hash, sd_hash_oid: FNV-1a of 64 bits, once more over its own result) and sheep.h
 * (node_to_vnodes: as many points on the ring as a node has virtual nodes; node_disk_to_vnodes: as many as its disks have for
 * their size; oid_to_vnodes: the first point from the object's hash on, and then the next ones in zones that have no copy yet).
 */
import type { ClusterNode, NodeDisk } from './nodes.js';
import { oidKey } from './object-ids.js';

const FNV_INIT = 0xcbf29ce484222325n;
const FNV_PRIME = 0x100000001b3n;
const MASK = 0xffff_ffff_ffff_ffffn;
/** struct node_id up to its port. */
const NODE_ID_BYTES = 18;
const NODE_ID_PORT_OFFSET = 16;
const DISK_WEIGHT_BYTES = 2n ** 32n;
/** Most objects whose node is remembered. */
const MAX_REMEMBERED = 2 ** 16;

export class Placement {
  readonly #hashes: BigUint64Array;
  /** By point of the ring: position in `nodes`. */
  readonly #owners: Uint16Array;
  /** By position in `nodes`. */
  readonly #zones: readonly number[];
  readonly #remembered = new Map<number, number>();

  /** `byDisk`: the cluster is in disk mode (ClusterFlag.DISK_MODE). */
  constructor(nodes: readonly ClusterNode[], byDisk = false) {
    const points: { readonly hash: bigint; readonly node: number }[] = [];
    const addPoints = (from: bigint, count: number, node: number): void => {
      let hash = from;
      for (let n = 0; n < count; n++) points.push({ hash: (hash = hashOfHash(hash)), node });
    };
    for (const [node, { address, port, vnodes, disks }] of nodes.entries()) {
      const id = Buffer.alloc(NODE_ID_BYTES);
      address.copy(id);
      id.writeUInt16LE(port, NODE_ID_PORT_OFFSET);
      const hash = hashOfHash(fnv(id, FNV_INIT));
      if (!byDisk) addPoints(hash, vnodes, node);
      else for (const disk of disks) addPoints(fnv64(hash, disk.id), pointsOf(disk), node);
    }
    this.#zones = nodes.map(({ zone }) => zone);
    points.sort((a, b) => (a.hash < b.hash ? -1 : 1));
    this.#hashes = BigUint64Array.from(points, ({ hash }) => hash);
    this.#owners = Uint16Array.from(points, ({ node }) => node);
  }

  /** Position, in the constructor's list, of the node with the first copy of data object (vid, idx); -1: none. */
  nodeOf(vid: number, idx: number): number {
    const key = oidKey(vid, idx);
    let node = this.#remembered.get(key);
    if (node === undefined) {
      node = this.#owners[this.#find(vid, idx)] ?? -1;
      if (this.#remembered.size >= MAX_REMEMBERED) this.#remembered.clear();
      this.#remembered.set(key, node);
    }
    return node;
  }

  /**
   * Positions of the nodes that should have a copy, or the strips in order, of the object whose oid has these halves: `copies`
   * of them, or one in each zone if there are fewer zones.
   */
  holdersOf(high: number, low: number, copies: number): number[] {
    const holders: number[] = [];
    const zones = new Set<number>();
    const start = this.#find(high, low);
    for (let n = 0; n < this.#owners.length && holders.length < copies; n++) {
      const node = this.#owners[(start + n) % this.#owners.length] as number;
      const zone = this.#zones[node] as number;
      if (zones.has(zone)) continue;
      zones.add(zone);
      holders.push(node);
    }
    return holders;
  }

  /** Index of the first point of the ring at or after the object's hash. */
  #find(oidHigh: number, oidLow: number): number {
    const oid = Buffer.alloc(8);
    oid.writeUInt32LE(oidLow, 0);
    oid.writeUInt32LE(oidHigh, 4);
    const hash = hashOfHash(fnv(oid, FNV_INIT));
    let low = 0;
    let high = this.#hashes.length;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if ((this.#hashes[middle] as bigint) < hash) low = middle + 1;
      else high = middle;
    }
    return low === this.#hashes.length ? 0 : low;
  }
}

/** Whether objects are placed on the node. False for a gateway, which has no points on the ring. */
export function keepsObjects({ vnodes, disks }: ClusterNode, byDisk: boolean): boolean {
  return byDisk ? disks.length > 0 : vnodes > 0;
}

/** One for each started 4 GiB (internal_proto.h, WEIGHT_MIN). */
function pointsOf({ space }: NodeDisk): number {
  return Number((space + DISK_WEIGHT_BYTES - 1n) / DISK_WEIGHT_BYTES);
}

function fnv(bytes: Uint8Array, init: bigint): bigint {
  let hash = init;
  for (const byte of bytes) hash = ((hash ^ BigInt(byte)) * FNV_PRIME) & MASK;
  return hash;
}

function fnv64(value: bigint, init: bigint): bigint {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(value);
  return fnv(bytes, init);
}

/** The hash continued over its own bytes. */
function hashOfHash(hash: bigint): bigint {
  return fnv64(hash, hash);
}
