/**
 * Changes of the map of an open VDI: entries are set in batches, in the table of the inode or in the index of a hyper volume,
 * also while other clients resize, snapshot or delete the VDI. Owns the queue of changes, which entries are in doubt, and which
 * objects were dropped. After an error the map says what the nodes have; an entry whose change may have reached a node is never
 * written a second time, because the node would give up the reference of the old entry twice.
 */
import { behindEndError, StoreError } from '../store-error.js';
import type { VdiRecord } from '../vdi-record.js';
import { removeLeftObjects } from './deleted-vdi.js';
import { HyperIndex, type HyperIndexHost } from './hyper-index.js';
import { isRemoved } from './object-removal.js';
import { InDoubt } from './stalled-nodes.js';
import { carryOver, confirmEntries } from './table-repair.js';
import { inRuns, type EntryChange } from './table-runs.js';
import { movedError, type VdiFollowing } from './vdi-following.js';
import { oidKey } from '../../sheepdog/object-ids.js';
import type { Inode } from '../../sheepdog/inode.js';
import { inParallel } from '../../system/in-parallel.js';

/** Objects that one batch removes at a time. */
const PARALLEL_REMOVALS = 16;

export interface TableHost extends HyperIndexHost {
  /** Formatted with -R. */
  readonly recyclesVids: boolean;
}

/** The open VDI, as far as changes of its map need it. */
export interface TableVdi {
  readonly record: VdiRecord;
  readonly map: Uint32Array;
  readonly inode: Inode;
  readonly failure: StoreError | undefined;
  /** Resolves when the VDI may be changed. */
  getReady(): Promise<void>;
  /** Temporary snapshots that share the VDI's own object at idx get a copy of it. */
  preserve(idx: number): Promise<void>;
}

interface QueuedChange extends EntryChange {
  readonly resolve: () => void;
  readonly reject: (error: unknown) => void;
}

export class TableChanges {
  readonly #host: TableHost;
  readonly #vdi: TableVdi;
  readonly #following: VdiFollowing;
  /** In place of a table, in a hyper volume. */
  readonly #index: HyperIndex | undefined;
  #queue: QueuedChange[] = [];
  #isWriting = false;
  /** Entries whose change was given up while a node could still carry it out. */
  readonly #doubtful = new Set<number>();
  /** The VDI's own objects that were dropped and may not be removed yet. */
  readonly #dropped = new Set<number>();
  /** Objects that were made, and whose entry could not be set or whose data is not complete: no table may have them. */
  readonly #unlisted = new Set<number>();

  constructor(host: TableHost, vdi: TableVdi, following: VdiFollowing) {
    this.#host = host;
    this.#vdi = vdi;
    this.#following = following;
    this.#index = vdi.inode.storePolicy === 0 ? undefined : new HyperIndex(host, vdi.inode.vid);
  }

  /** Resolves when the inode has the entry and is still the working VDI's. Errors: MOVED, and the cluster's. */
  set(idx: number, owner: number): Promise<void> {
    if (this.#doubtful.has(idx)) return Promise.reject(doubtfulError(this.#vdi.record, idx));
    if (this.#vdi.map[idx] === owner) return Promise.resolve(); // a node gives up the reference of an entry that it rewrites
    return new Promise((resolve, reject) => {
      this.#queue.push({ idx, owner, resolve, reject });
      if (!this.#isWriting) void this.#writeQueue();
    });
  }

  /** Errors: IO (an earlier change of the entry may still be carried out). */
  assertKnown(idx: number): void {
    if (this.#doubtful.has(idx)) throw doubtfulError(this.#vdi.record, idx);
  }

  get hasDropped(): boolean {
    return this.#dropped.size > 0;
  }

  get hasUnlisted(): boolean {
    return this.#unlisted.size > 0;
  }

  /** The VDI's own object at idx was made, and the write that made it has failed. */
  noteUnlisted(idx: number): void {
    this.#unlisted.add(idx);
  }

  isDropped(idx: number): boolean {
    return this.#dropped.has(idx);
  }

  /** The VDI has another vid: its objects of the old vid are the snapshot's. */
  forgetDropped(): void {
    this.#dropped.clear();
    this.#unlisted.clear();
  }

  /**
   * Removes objects that were dropped and that nodes may have forgotten to remove: they repeat a table entry when members change
   * meanwhile, and then find no change in it (sheep/gateway.c, prepare_obj_refcnt). No other table has these objects.
   */
  async removeDropped(): Promise<void> {
    const { map, record } = this.#vdi;
    const left = [...this.#dropped].filter((idx) => map[idx] === 0 && !this.#doubtful.has(idx));
    await inParallel(PARALLEL_REMOVALS, left, (idx) => this.#remove(record.vid, idx));
  }

  /**
   * Removes objects that a failed write has made and no later one has put into the table: deletion would not find them. Asks for
   * each entry first: if setting it failed without an answer, the nodes may have it all the same.
   */
  async removeUnlisted(): Promise<void> {
    const { map, record, inode } = this.#vdi;
    const { cluster } = this.#host;
    const left = [...this.#unlisted].filter((idx) => map[idx] !== record.vid && !this.#doubtful.has(idx));
    const owners = this.#index && (await cluster.readOwners(inode));
    await inParallel(PARALLEL_REMOVALS, left, async (idx) => {
      const owner = owners ? owners[idx] : await cluster.readEntry(record.vid, idx);
      if (owner !== record.vid) await this.#remove(record.vid, idx);
    });
  }

  /**
   * A node answers the clearing of an entry before it removes the object. An object that is created meanwhile under the same id
   * would be removed in its place.
   */
  async waitForRemoval(vid: number, idx: number): Promise<void> {
    const { inode, record } = this.#vdi;
    if (!(await isRemoved(this.#host.cluster, vid, idx, inode.copyPolicy)))
      this.#host.log(`object ${idx} of ${record.name} was dropped, and the nodes still have it; it is replaced`);
    this.#dropped.delete(idx);
  }

  /** Removes objects that no table has: made under a vid that is a snapshot's now, or behind the end. Never fails. */
  async removeOrphans(made: readonly EntryChange[]): Promise<void> {
    const { cluster } = this.#host;
    for (const { idx, owner } of made) {
      if (owner === 0 || (owner === this.#vdi.record.vid && idx < this.#vdi.map.length)) continue;
      try {
        if ((await cluster.readEntry(owner, idx)) !== owner) await cluster.removeData(owner, idx);
      } catch (error) {
        this.#host.log(`object ${idx} of vid ${owner.toString(16)} may be left over`, { err: error });
      }
    }
  }

  /** Writes the queue as one batch. Changes that arrive meanwhile are the next batch. */
  async #writeQueue(): Promise<void> {
    this.#isWriting = true;
    // Objects whose creation ends in the same round of the event loop share a batch.
    await Promise.resolve();
    while (this.#queue.length > 0) {
      const batch = this.#queue;
      this.#queue = [];
      try {
        if (this.#index) await this.#writeIndex(this.#index, batch);
        else await this.#writeTable(batch);
        for (const { resolve } of batch) resolve();
      } catch (error) {
        const vdi = this.#vdi;
        if ((error as StoreError).code === 'GONE') await this.#following.look().catch(() => undefined);
        if (vdi.failure) await this.#removeOfDeleted(batch);
        else if ((error as StoreError).code === 'MOVED' || batch.some(({ idx }) => idx >= vdi.map.length))
          await this.removeOrphans(batch);
        for (const { reject } of batch) reject(vdi.failure ?? error);
      }
    }
    this.#isWriting = false;
  }

  /**
   * Whether `vid` is still the working VDI. Errors: NO_SPACE (an entry lies behind the end of what another client has cut off:
   * objects there are not found when the VDI is deleted).
   */
  async #mayChange(vid: number, batch: readonly EntryChange[]): Promise<boolean> {
    const vdi = this.#vdi;
    const [isReadOnly, inode] = await Promise.all([
      this.#host.cluster.isReadOnly(vid, (batch[0] as EntryChange).idx),
      this.#following.readInode(vid),
    ]);
    if (isReadOnly || !inode) return false;
    if (inode.size !== vdi.inode.size) await this.#following.adopt(inode);
    if (batch.some(({ idx, owner }) => owner !== 0 && idx >= vdi.map.length))
      throw behindEndError(vdi.record, 'NO_SPACE');
    return true;
  }

  async #writeTable(batch: readonly EntryChange[]): Promise<void> {
    const { cluster } = this.#host;
    const vdi = this.#vdi;
    const { vid } = vdi.record;
    await vdi.getReady();
    if (vdi.failure) throw vdi.failure;
    if (vdi.record.vid !== vid) throw movedError(vdi.record);
    if (batch.some(({ owner }) => owner !== 0 && owner !== vid)) throw movedError(vdi.record);
    for (const { idx, owner } of batch) if (owner === 0 && vdi.map[idx] === vid) await vdi.preserve(idx);
    // Nodes accept writes to the inode of a snapshot, too. While they make the VDI a snapshot they read the inode, change it and
    // write it back: an entry written in between is undone, but the reference that it replaced stays given up.
    if (!(await this.#mayChange(vid, batch))) return this.#moveOn(vid);
    const { epoch } = cluster.recovery;
    try {
      await inRuns(batch, (idx, owners) => cluster.writeTable(vid, idx, owners));
    } catch (error) {
      // The nodes may have some of the entries, which must not be written a second time.
      await this.#readBack(batch, error);
      throw error;
    }
    // Before the question whether a snapshot was taken: carryOver corrects the counts of a snapshot that is taken meanwhile.
    if (cluster.recovery.epoch !== epoch) await confirmEntries(cluster, vid, vdi.map, batch);
    if (await this.#wasSnapshotted(vid)) {
      await this.#following.follow(vid);
      await carryOver(cluster, vid, vdi.record.vid, batch);
      for (const { idx, owner } of batch) vdi.map[idx] = owner;
      return;
    }
    const { map } = vdi;
    for (const { idx, owner } of batch) {
      if (map[idx] === vid && owner === 0) this.#dropped.add(idx);
      map[idx] = owner;
    }
  }

  /**
   * In a hyper volume nodes count no references: objects that are dropped are removed here, after their entries. If the process
   * ends in between, an object is left over until the same place is written again.
   */
  async #writeIndex(index: HyperIndex, batch: readonly EntryChange[]): Promise<void> {
    const vdi = this.#vdi;
    const { vid } = vdi.record;
    await vdi.getReady();
    if (vdi.failure) throw vdi.failure;
    if (!(await this.#mayChange(vid, batch))) return this.#moveOn(vid);
    try {
      await index.set(batch, vdi.map);
    } catch (error) {
      await this.#readBack(batch, error);
      throw error;
    }
    const { map } = vdi;
    const removed = batch.filter(({ idx, owner }) => owner === 0 && map[idx] === vid);
    for (const { idx, owner } of batch) map[idx] = owner;
    await inParallel(PARALLEL_REMOVALS, removed, ({ idx }) => this.#remove(vid, idx));
  }

  #remove(vid: number, idx: number): Promise<void> {
    const { cluster, order } = this.#host;
    const length = 2 ** this.#vdi.record.blockSizeShift;
    return order.run(oidKey(vid, idx), 0, length, () => cluster.removeData(vid, idx));
  }

  /** A change that failed has cleared an entry all the same. The nodes remove the object of a table, and none of an index. */
  async #entryWasCleared(idx: number): Promise<void> {
    const { vid, name } = this.#vdi.record;
    if (!this.#index) {
      this.#dropped.add(idx);
      return;
    }
    await this.#remove(vid, idx).catch((error: unknown) => {
      this.#host.log(`object ${idx} of ${name} may be left over`, { err: error });
    });
  }

  /**
   * Reads what the nodes have made of entries whose change failed. If a node may still carry the change out, reads again when it
   * no longer can; until then the entries are in doubt.
   */
  async #readBack(batch: readonly EntryChange[], error: unknown): Promise<void> {
    const { cluster } = this.#host;
    const vdi = this.#vdi;
    const { inode } = vdi;
    const read = async (): Promise<void> => {
      const owners = this.#index && (await cluster.readOwners(inode).catch(() => vdi.map));
      for (const { idx } of batch) {
        const before = vdi.map[idx];
        const found = owners ? owners[idx] : await cluster.readEntry(inode.vid, idx).catch(() => before);
        const { map } = vdi;
        map[idx] = found as number;
        if (before === inode.vid && map[idx] === 0) await this.#entryWasCleared(idx);
      }
    };
    if (error instanceof InDoubt) {
      for (const { idx } of batch) this.#doubtful.add(idx);
      void error.settled.then(read).finally(() => {
        for (const { idx } of batch) this.#doubtful.delete(idx);
      });
    }
    await read();
  }

  /**
   * Whether another client has made `vid` a snapshot, or began to before this call. Nodes learn of a snapshot one after the other,
   * but they put look-ups and snapshots into one queue of the whole cluster, so a look-up on any node tells. Where vids are
   * reused a look-up costs too much (the nodes read every inode for it).
   */
  async #wasSnapshotted(vid: number): Promise<boolean> {
    const { cluster } = this.#host;
    if (this.#host.recyclesVids) return (await cluster.isReadOnly(vid, 0)) || !(await this.#following.readInode(vid));
    return (await cluster.lookup(this.#vdi.record.name)) !== vid;
  }

  /** Removes objects that were made when the VDI had been deleted; unless the vid is another VDI's now. Never fails. */
  async #removeOfDeleted(batch: readonly EntryChange[]): Promise<void> {
    const made = batch.filter(({ owner }) => owner !== 0);
    try {
      await removeLeftObjects(this.#host.cluster, this.#vdi.inode, made);
    } catch (error) {
      this.#host.log(`objects of ${this.#vdi.record.name}, which was deleted, may be left over`, { err: error });
    }
  }

  async #moveOn(vid: number): Promise<never> {
    await this.#following.follow(vid);
    throw movedError(this.#vdi.record);
  }
}

function doubtfulError(record: VdiRecord, idx: number): StoreError {
  return new StoreError(
    'IO',
    `object ${idx} of ${record.name} is in doubt: an earlier change of its map entry was given up, and a node may still carry it out`,
  );
}
