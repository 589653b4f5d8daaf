/**
 * Which objects the VDIs and snapshots of a cluster refer to, each of them once, however many share it: a bit for each, by
 * owner. Owns these bits and what is known of the owners (how many copies there should be); reads no data.
 */
import type { StoreError } from '../../store-error.js';
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
/** Objects are compared in units: a stripe, which is a sector, too. */
export const UNIT_BYTES = STRIPE_BYTES;

/** What kind of object it is. */
export type Part = 'data' | 'inode' | 'index';

/** An object to compare: several nodes have copies of it, or one strip each. */
export interface Target {
  readonly part: Part;
  /** Halves of its oid. */
  readonly high: number;
  readonly low: number;
  /** Nodes that should have it. */
  readonly copies: number;
  /** Data strips; 0: whole copies. */
  readonly dataStrips: number;
  /** Bytes of what one node has. */
  readonly copyBytes: number;
  /** Bytes that one node has of a unit. */
  readonly unitBytes: number;
  /** The units to compare, [from, to). */
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
  /** Vids of live VDIs whose inode is lost. */
  readonly lostInodes: number[] = [];
  /** Labels of VDIs whose objects are unknown, with the reason: a damaged inode or index. */
  readonly unread: string[] = [];
  dataObjects = 0;
  /** Bytes to be read, of all copies. */
  bytes = 0;

  constructor(cluster: ClusterClient) {
    this.#cluster = cluster;
  }

  get vdis(): number {
    return this.#inodes.length + this.lostInodes.length;
  }

  /** Reads all tables. Errors: as reading inodes and tables. */
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
        // Perhaps only one of several copies is damaged; comparing the inode or index tells which.
        if (code === 'DAMAGED' || code === 'UNSUPPORTED') this.unread.push(`${label}: ${message}`);
        else if (code !== 'GONE') throw error;
        // GONE: deleted meanwhile, or lost, which comparing the inode or index reports.
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
    // Another table may have added or lengthened it meanwhile.
    const known = this.#owners.get(vid);
    const isInUse = new Uint8Array(Math.max(Math.ceil(count / 8), known?.isInUse.length ?? 0));
    if (known) isInUse.set(known.isInUse);
    const owned = { layout, isInUse };
    this.#owners.set(vid, owned);
    return owned;
  }

  /** The number of copies follows the owner's inode, also when the owner is deleted. */
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

  /** All objects to compare: inodes, indexes, data by owner. */
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

/** Inodes of all live VDIs and snapshots. `lost` is called with the vids of lost ones. Errors: as readInode, except GONE. */
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

/** Whether its fields about objects are possible. */
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

/** Of its table, the entries that the VDI's size needs; no client reads more. */
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
