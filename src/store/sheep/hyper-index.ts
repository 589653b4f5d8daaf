/**
 * Changes the index of a hyper volume (btree.ts). Every leaf has an entry for each idx of its region and is an object of its
 * own, so that an entry is overwritten in place: a new object costs a write of eight bytes. An index of another shape is
 * rewritten in this shape before its first change. Other tools read this shape like any other; if they change it, it is
 * rewritten again. Owns which leaf has which region. One change at a time.
 *
 * Nodes treat every write that lies within the table's bytes as a change of a table, and give up the references that they
 * believe to be there (sheep_priv.h, is_data_vid_update), also where these bytes are a tree. So writes to the root begin before
 * the table.
 */
import { BTREE_COUNTER_BYTES, decodeBtreeCounter, encodeBtreeCounter } from '../../sheepdog/inode.js';
import type { StoreError } from '../store-error.js';
import {
  eachEntry,
  encodeEntries,
  encodeLeaf,
  encodeRoot,
  LEAF_ENTRY_BYTES,
  NODE_HEADER_BYTES,
  type IndexRoot,
  type LeafPointer,
} from '../../sheepdog/btree.js';
import type { ClusterClient } from './cluster-client.js';
import { inRuns, type EntryChange } from './table-runs.js';
import { indexPartKey } from '../../sheepdog/object-ids.js';
import type { WriteOrder } from './write-order.js';
import { type Inode, INODE_BTREE_COUNTER_OFFSET } from '../../sheepdog/inode.js';
import { leafHigh } from '../../sheepdog/object-ids.js';
import { inParallel } from '../../system/in-parallel.js';

/** Entries of a leaf: 512 KiB for 256 GiB of disk. Nodes would allow eight times as many. */
const REGION = 2 ** 16;
/** Requests at a time. */
const PARALLEL_LEAVES = 8;
const PARALLEL_REMOVALS = 64;
/** The root, as a part of the index; leaf n is part n + 1. */
const ROOT_KEY = 0;

/** What a HyperIndex needs of its store. */
export interface HyperIndexHost {
  readonly cluster: ClusterClient;
  readonly order: WriteOrder;
  /** Repeats the request while objects seem to be missing because nodes come and go. */
  unlessGone(request: () => Promise<void>): Promise<void>;
  log(line: string, details?: object): void;
}

export class HyperIndex {
  readonly #host: HyperIndexHost;
  readonly #vid: number;
  /** By region: the number of its leaf. Undefined while it is not known whether all leaves have this shape. */
  #leaves: Map<number, number> | undefined;

  constructor(host: HyperIndexHost, vid: number) {
    this.#host = host;
    this.#vid = vid;
  }

  /**
   * Sets entries, each idx once. `map`: all owners as they were before. After an error any part of the change may have been made.
   * Errors: as requests on objects.
   */
  async set(changes: readonly EntryChange[], map: Uint32Array): Promise<void> {
    try {
      const leaves = (this.#leaves ??= (await this.#recognise()) ?? (await this.#layOut(map)));
      const byRegion = new Map<number, EntryChange[]>();
      for (const change of changes) {
        const region = regionOf(change.idx);
        const part = byRegion.get(region);
        if (part) part.push(change);
        else byRegion.set(region, [change]);
      }
      const fresh = [...byRegion].filter(([region]) => !leaves.has(region));
      const known = [...byRegion].filter(([region]) => leaves.has(region));
      await inParallel(PARALLEL_LEAVES, known, ([region, part]) =>
        inRuns(part, (idx, owners) => this.#overwrite(leaves.get(region) as number, idx, owners)),
      );
      const used = fresh.filter(([, part]) => part.some(({ owner }) => owner !== 0));
      if (used.length > 0) await this.#addLeaves(leaves, used);
    } catch (error) {
      // What the cluster has now is unknown: recognise the index again next time.
      this.#leaves = undefined;
      throw error;
    }
  }

  #overwrite(leaf: number, idx: number, owners: readonly number[]): Promise<void> {
    const { cluster } = this.#host;
    const data = encodeEntries(idx, owners);
    const offset = NODE_HEADER_BYTES + (idx % REGION) * LEAF_ENTRY_BYTES;
    return this.#ordered(leaf + 1, offset, data.length, () =>
      cluster.writeObject(leafHigh(this.#vid), leaf, offset, data),
    );
  }

  async #addLeaves(leaves: Map<number, number>, regions: readonly [number, EntryChange[]][]): Promise<void> {
    const made = await this.#makeLeaves(
      regions.map(([region, changes]) => {
        const owners = new Uint32Array(REGION);
        for (const { idx, owner } of changes) owners[idx % REGION] = owner;
        return [region, owners];
      }),
    );
    const all = new Map([...leaves, ...made]);
    await this.#writeRoot(all);
    this.#leaves = all;
  }

  /** Writes leaves that the root does not point to yet. If that fails, what is left over is removed with the volume. */
  async #makeLeaves(regions: readonly (readonly [number, Uint32Array])[]): Promise<Map<number, number>> {
    const { cluster } = this.#host;
    const first = await this.#takeNumbers(regions.length);
    const numbered = regions.map(([region, owners], n) => ({ region, owners, leaf: first + n }));
    await inParallel(PARALLEL_LEAVES, numbered, ({ region, owners, leaf }) => {
      const data = encodeLeaf(region * REGION, owners);
      return this.#ordered(leaf + 1, 0, data.length, () => cluster.createObject(leafHigh(this.#vid), leaf, data));
    });
    return new Map(numbered.map(({ region, leaf }) => [region, leaf]));
  }

  /** Counts in the inode before the numbers are used, so that deleting the volume can find every leaf that may exist. */
  async #takeNumbers(count: number): Promise<number> {
    const { cluster } = this.#host;
    const counter = Buffer.alloc(BTREE_COUNTER_BYTES);
    await cluster.readInodeBytes(this.#vid, INODE_BTREE_COUNTER_OFFSET, counter);
    const first = decodeBtreeCounter(counter);
    const next = encodeBtreeCounter(first + count);
    await this.#ordered(ROOT_KEY, 0, 1, () => cluster.writeInodeBytes(this.#vid, INODE_BTREE_COUNTER_OFFSET, next));
    return first;
  }

  async #writeRoot(leaves: ReadonlyMap<number, number>): Promise<void> {
    const { cluster } = this.#host;
    const pointers = [...leaves].sort(([a], [b]) => a - b).map(([region, leaf]) => this.#pointer(region, leaf));
    await this.#ordered(ROOT_KEY, 0, 1, () => cluster.writeTableBytes(this.#vid, encodeRoot(pointers)));
  }

  #pointer(region: number, leaf: number): LeafPointer {
    return { lastIdx: (region + 1) * REGION - 1, high: leafHigh(this.#vid), low: leaf };
  }

  /** The leaves, if all have the shape that this class writes; undefined otherwise. */
  async #recognise(): Promise<Map<number, number> | undefined> {
    const { cluster } = this.#host;
    const root = await cluster.readIndexRoot(this.#vid);
    if (!root.leaves) return undefined;
    const leaves = new Map<number, number>();
    for (const { lastIdx, high, low } of root.leaves) {
      if (high !== leafHigh(this.#vid) || lastIdx % REGION !== REGION - 1) return undefined;
      leaves.set(regionOf(lastIdx), low);
    }
    let isOurs = leaves.size === root.leaves.length;
    await inParallel(PARALLEL_LEAVES, root.leaves, async (pointer) => {
      if (!isWhole(await cluster.readIndexLeaf(this.#vid, pointer), pointer.lastIdx)) isOurs = false;
    });
    return isOurs ? leaves : undefined;
  }

  /** Writes new leaves, then the root, then removes the old leaves: at any time the index is complete. */
  async #layOut(map: Uint32Array): Promise<Map<number, number>> {
    const { cluster } = this.#host;
    const before = await cluster.readIndexRoot(this.#vid);
    const regions: [number, Uint32Array][] = [];
    for (let region = 0; region * REGION < map.length; region++) {
      const part = map.subarray(region * REGION, (region + 1) * REGION);
      if (part.every((owner) => owner === 0)) continue;
      const owners = new Uint32Array(REGION);
      owners.set(part);
      regions.push([region, owners]);
    }
    const leaves = await this.#makeLeaves(regions);
    await this.#writeRoot(leaves);
    await this.#removeLeaves(before);
    return leaves;
  }

  async #removeLeaves({ leaves = [] }: IndexRoot): Promise<void> {
    const { cluster } = this.#host;
    try {
      await inParallel(PARALLEL_LEAVES, leaves, ({ high, low }) => cluster.removeObject(high, low));
    } catch (error) {
      this.#host.log(`a part of the old index of vid ${this.#vid.toString(16)} is left over`, { err: error });
    }
  }

  #ordered(part: number, from: number, length: number, write: () => Promise<void>): Promise<void> {
    const { order } = this.#host;
    return order.run(indexPartKey(this.#vid, part), from, length, () => this.#host.unlessGone(write));
  }
}

/**
 * Removes the objects of a hyper volume and its index, and leaves its inode as if nothing had been written. Nodes themselves
 * leave the leaves behind when they delete such a volume. Can be repeated after a failure.
 */
export async function clearHyper(cluster: ClusterClient, { vid }: Inode): Promise<void> {
  const root = await cluster.readIndexRoot(vid);
  if (root.entries) await removeOwned(cluster, vid, root.entries);
  for (const leaf of root.leaves ?? []) {
    let entries: Buffer;
    try {
      entries = await cluster.readIndexLeaf(vid, leaf);
    } catch (error) {
      if ((error as StoreError).code !== 'GONE') throw error;
      continue;
    }
    await removeOwned(cluster, vid, entries);
  }
  await cluster.writeTableBytes(vid, encodeLeaf(0, []));
  const counter = Buffer.alloc(BTREE_COUNTER_BYTES);
  await cluster.readInodeBytes(vid, INODE_BTREE_COUNTER_OFFSET, counter);
  const numbers = Array.from({ length: decodeBtreeCounter(counter) }, (_, leaf) => leaf);
  await inParallel(PARALLEL_REMOVALS, numbers, (leaf) => cluster.removeObject(leafHigh(vid), leaf));
}

/** Removes the objects that this vid owns, and no others. */
async function removeOwned(cluster: ClusterClient, vid: number, entries: Buffer): Promise<void> {
  const owned: number[] = [];
  eachEntry(entries, (idx, owner) => {
    if (owner === vid) owned.push(idx);
  });
  await inParallel(PARALLEL_REMOVALS, owned, (idx) => cluster.removeData(vid, idx));
}

function regionOf(idx: number): number {
  return Math.floor(idx / REGION);
}

/** Whether there is an entry for each idx up to `lastIdx` of its region, in order. */
function isWhole(entries: Buffer, lastIdx: number): boolean {
  let isInOrder = entries.length === REGION * LEAF_ENTRY_BYTES;
  let next = lastIdx - REGION + 1;
  eachEntry(entries, (idx) => (isInOrder = isInOrder && idx === next++));
  return isInOrder;
}
