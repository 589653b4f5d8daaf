/**
 * Which objects the VDIs and snapshots of a cluster refer to, each of them once however many share it: a bit for each, by
 * owner. Owns those bits and what is known of the owners (how many copies there should be); reads no data.
 */
import type { StoreError } from '../../object-store.js';
import type { ClusterClient } from '../cluster-client.js';
import { labelsOf } from '../labels.js';
import { MAX_BLOCK_SIZE_SHIFT, MAX_DATA_OBJECTS, MIN_BLOCK_SIZE_SHIFT } from '../../../sheepdog/protocol.js';
import { STRIPE_BYTES } from '../../../sheepdog/erasure-code.js';
import { stripsOf } from '../../../sheepdog/copy-policy.js';
import { entryOffset, INODE_BYTES, objectCount, referenceOffset, TABLE_OFFSET } from '../../../sheepdog/inode-table.js';
import { INDEX_NODE_BYTES } from '../../../sheepdog/btree.js';
import type { Inode } from '../../../sheepdog/inode.js';
import { leafHigh, inodeHigh } from '../../../sheepdog/object-ids.js';
import { inParallel } from '../../../system/in-parallel.js';

const PARALLEL_INODES = 16;
/** In which pieces of the disk, or of an inode, objects are compared: a stripe, which is a sector too. */
export const UNIT_BYTES = STRIPE_BYTES;

/** What an object is a part of. */
export type Part = 'data' | 'inode' | 'index';

/** An object that several nodes have copies of, or one strip each. */
export interface Target {
  readonly part: Part;
  /** Halves of its oid. */
  readonly high: number;
  readonly low: number;
  /** So many nodes should have it. */
  readonly copies: number;
  /** Strips of data; 0: all are copies of the whole. */
  readonly dataStrips: number;
  /** Of what one node has. */
  readonly copyBytes: number;
  /** What one node has of a unit. */
  readonly unitBytes: number;
  /** The units that are compared, [from, to). */
  readonly spans: readonly (readonly [from: number, to: number])[];
}

interface OwnerLayout {
  readonly copies: number;
  readonly copyPolicy: number;
  readonly blockSizeShift: number;
}

interface Owned {
  readonly layout: OwnerLayout;
  readonly isInUse: Uint8Array;
}

export class ObjectsInUse {
  readonly #cluster: ClusterClient;
  readonly #owners = new Map<number, Owned>();
  /** Owners whose inodes are being read. */
  readonly #layouts = new Map<number, Promise<OwnerLayout>>();
  readonly #inodes: Inode[] = [];
  readonly #leaves: { readonly vid: number; readonly low: number; readonly copies: number }[] = [];
  /** Vids of VDIs that are not deleted and whose inode no node has. */
  readonly lostInodes: number[] = [];
  /** VDIs whose objects are not known, and why: their inodes or indexes are damaged. */
  readonly unread: string[] = [];
  dataObjects = 0;
  /** To be read of all copies. */
  bytes = 0;

  constructor(cluster: ClusterClient) {
    this.#cluster = cluster;
  }

  get vdis(): number {
    return this.#inodes.length + this.lostInodes.length;
  }

  /** What the tables say now. Errors: StoreError. */
  async collect(): Promise<void> {
    this.#inodes.push(...(await readLiveInodes(this.#cluster, (vid) => this.lostInodes.push(vid))));
    const labels = labelsOf(this.#inodes);
    await inParallel(PARALLEL_INODES, this.#inodes, async (inode) => {
      const label = labels.get(inode.vid) as string;
      let map: Uint32Array;
      if (!isSound(inode)) {
        this.unread.push(`${label}: its inode is damaged (objects of 2^${inode.blockSizeShift} bytes)`);
        return;
      }
      try {
        if (inode.storePolicy !== 0) await this.#collectLeaves(inode);
        map = await this.#cluster.readOwners(inode);
      } catch (error) {
        const { code, message } = error as StoreError;
        // One copy of several may be; which one, its own comparison says.
        if (code === 'DAMAGED' || code === 'UNSUPPORTED') this.unread.push(`${label}: ${message}`);
        else if (code !== 'GONE') throw error;
        // Deleted meanwhile; what is lost of an inode, or an index, its own comparison says.
        return;
      }
      await this.#collectMap(inode, map);
    });
    for (const target of this.targets()) this.bytes += bytesOf(target);
  }

  async #collectLeaves(inode: Inode): Promise<void> {
    const { leaves } = await this.#cluster.readIndexRoot(inode.vid);
    for (const { low } of leaves ?? []) this.#leaves.push({ vid: inode.vid, low, copies: inode.copies });
  }

  async #collectMap(inode: Inode, map: Uint32Array): Promise<void> {
    for (let idx = 0; idx < map.length; idx++) {
      const vid = map[idx] as number;
      if (vid === 0) continue;
      let owned = this.#owners.get(vid);
      if (!owned || owned.isInUse.length * 8 <= idx) {
        const layout = owned?.layout ?? (await this.#layoutOf(vid, inode));
        owned = this.#grow(vid, layout, map.length);
      }
      const { isInUse } = owned;
      const bit = 1 << (idx & 7);
      if (((isInUse[idx >> 3] as number) & bit) === 0) this.dataObjects++;
      isInUse[idx >> 3] = (isInUse[idx >> 3] as number) | bit;
    }
  }

  #grow(vid: number, layout: OwnerLayout, count: number): Owned {
    // Another table may have made or lengthened it meanwhile.
    const known = this.#owners.get(vid);
    const isInUse = new Uint8Array(Math.max(Math.ceil(count / 8), known?.isInUse.length ?? 0));
    if (known) isInUse.set(known.isInUse);
    const owned = { layout, isInUse };
    this.#owners.set(vid, owned);
    return owned;
  }

  /** The nodes go by the owner, also when it is deleted. */
  #layoutOf(vid: number, user: Inode): Promise<OwnerLayout> {
    let layout = this.#layouts.get(vid);
    if (!layout) {
      layout = this.#readLayout(vid, user);
      this.#layouts.set(vid, layout);
    }
    return layout;
  }

  async #readLayout(vid: number, user: Inode): Promise<OwnerLayout> {
    if (vid === user.vid) return user;
    try {
      const inode = await this.#cluster.readInode(vid);
      return isSound(inode) ? inode : user;
    } catch (error) {
      if ((error as StoreError).code !== 'GONE') throw error;
      return user;
    }
  }

  /** Everything that is to be compared: inodes, indexes, data by owner. */
  *targets(): Generator<Target> {
    for (const inode of this.#inodes) yield inodeTarget(inode);
    for (const { vid, low, copies } of this.#leaves)
      yield wholeTarget('index', leafHigh(vid), low, copies, INDEX_NODE_BYTES);
    for (const [vid, { layout, isInUse }] of this.#owners) {
      for (let idx = 0; idx < isInUse.length * 8; idx++) {
        if (((isInUse[idx >> 3] as number) & (1 << (idx & 7))) !== 0) yield dataTarget(vid, idx, layout);
      }
    }
  }
}

/** Inodes of all VDIs and snapshots that are not deleted. */
export async function readLiveInodes(cluster: ClusterClient, lost: (vid: number) => void): Promise<Inode[]> {
  const inodes: Inode[] = [];
  await inParallel(PARALLEL_INODES, (await cluster.vids()).live(), async (vid) => {
    try {
      const inode = await cluster.readInode(vid);
      if (inode.name !== '') inodes.push(inode);
    } catch (error) {
      if ((error as StoreError).code !== 'GONE') throw error;
      lost(vid);
    }
  });
  return inodes.sort((a, b) => a.vid - b.vid);
}

export function bytesOf({ copies, spans, unitBytes }: Target): number {
  return copies * spans.reduce((sum, [from, to]) => sum + (to - from) * unitBytes, 0);
}

/** Whether what it says of its objects can be so. */
function isSound({ blockSizeShift, copyPolicy }: OwnerLayout): boolean {
  return (
    blockSizeShift >= MIN_BLOCK_SIZE_SHIFT &&
    blockSizeShift <= MAX_BLOCK_SIZE_SHIFT &&
    (copyPolicy === 0 || copyPolicy > 15)
  );
}

function wholeTarget(part: Part, high: number, low: number, copies: number, bytes: number): Target {
  const spans = [[0, Math.ceil(bytes / UNIT_BYTES)]] as const;
  return { part, high, low, copies, dataStrips: 0, copyBytes: bytes, unitBytes: UNIT_BYTES, spans };
}

function dataTarget(vid: number, idx: number, { copies, copyPolicy, blockSizeShift }: OwnerLayout): Target {
  const bytes = 2 ** blockSizeShift;
  const whole = wholeTarget('data', vid, idx, copies, bytes);
  const strips = stripsOf(copyPolicy);
  if (!strips) return whole;
  const { data } = strips;
  return { ...whole, dataStrips: data, copyBytes: bytes / data, unitBytes: UNIT_BYTES / data };
}

/** Of its table what the VDI's size needs; behind that nothing is read. */
function inodeTarget(inode: Inode): Target {
  const count = Math.min(objectCount(inode.size, inode.blockSizeShift), MAX_DATA_OBJECTS);
  const whole = wholeTarget('inode', inodeHigh(inode.vid), 0, inode.copies, INODE_BYTES);
  const isTable = inode.storePolicy === 0;
  const tableEnd = unitsTo(isTable ? entryOffset(count) : TABLE_OFFSET + INDEX_NODE_BYTES);
  const references = Math.floor(referenceOffset(0) / UNIT_BYTES);
  const end = unitsTo(referenceOffset(count));
  if (!isTable || count === 0) return { ...whole, spans: [[0, tableEnd]] };
  if (references <= tableEnd) return { ...whole, spans: [[0, end]] };
  return {
    ...whole,
    spans: [
      [0, tableEnd],
      [references, end],
    ],
  };
}

function unitsTo(bytes: number): number {
  return Math.ceil(bytes / UNIT_BYTES);
}
