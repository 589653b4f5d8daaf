/**
 * What other clients of the cluster do to a VDI while it is open here: they resize it, change its copies, take a snapshot (the
 * VDI then continues under another vid), delete it, or replace it. Owns how the open VDI learns of this, and the move to its next
 * vid. Never moves on to a VDI that does not descend from the one that was opened: that would mix two disks.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { StoreError } from '../store-error.js';
import type { VdiRecord } from '../vdi-record.js';
import type { ClusterClient } from './cluster-client.js';
import { isDeleted, isSameVdi, removeLeftObjects } from './deleted-vdi.js';
import { MAX_GENERATIONS } from './table-repair.js';
import { objectCount } from '../../sheepdog/inode-table.js';
import type { Inode } from '../../sheepdog/inode.js';

const FOLLOW_POLL_MS = 20;
const NONE = new Uint32Array(0);

export interface FollowingHost {
  readonly cluster: ClusterClient;
  /** Formatted with -R. */
  readonly recyclesVids: boolean;
  /** The vid of the working VDI of this name; 0 if there is none. */
  workingVid(name: string): Promise<number>;
  log(line: string, details?: object): void;
}

/** The open VDI, as far as following changes it. */
export interface FollowedVdi {
  readonly record: VdiRecord;
  readonly map: Uint32Array;
  readonly inode: Inode;
  readonly failure: StoreError | undefined;
  readonly isHyper: boolean;
  /** Raised whenever this process changes what the inode says: an inode that was read before then is stale. */
  readonly changes: number;
  /** Continue as `inode`, whose table is `map`. Errors: MOVED (another snapshot was taken), LOCKED. */
  become(inode: Inode, map: Uint32Array): Promise<void>;
  /** The inode has another size. */
  resized(inode: Inode): void;
  /** The inode has another number of copies. */
  recopied(inode: Inode): void;
  /** Everything fails from now on. Returns the error that it fails with. */
  fail(error: StoreError): StoreError;
}

export class VdiFollowing {
  readonly #host: FollowingHost;
  readonly #vdi: FollowedVdi;
  #moving: Promise<void> | undefined;
  /** This process is taking a snapshot, and moves the VDI on itself. Never fails. */
  #switching: Promise<void> | undefined;
  #isClosed = false;

  constructor(host: FollowingHost, vdi: FollowedVdi) {
    this.#host = host;
    this.#vdi = vdi;
  }

  /** No move begins after this; one that is under way ends first. */
  async close(): Promise<void> {
    this.#isClosed = true;
    await this.#moving?.catch(() => undefined);
  }

  /** `work` takes a snapshot of the VDI: nothing is followed before the VDI has its new vid. */
  async switching<T>(work: () => Promise<T>): Promise<T> {
    const done = work();
    const settled = done.then(nothing, nothing);
    this.#switching = settled;
    try {
      return await done;
    } finally {
      if (this.#switching === settled) this.#switching = undefined;
    }
  }

  /** See VdiControl.look. Errors: the VDI's failure, and the cluster's. */
  async look(): Promise<void> {
    const vdi = this.#vdi;
    if (vdi.failure) throw vdi.failure;
    while (this.#switching) await this.#switching;
    const { vid, isSnapshot } = vdi.record;
    if (isSnapshot || this.#isClosed) return;
    const { changes } = vdi;
    const inode = await this.readInode(vid);
    if (vdi.record.vid !== vid || vdi.changes !== changes) return;
    if (!inode || inode.isSnapshot) return this.follow(vid);
    await this.adopt(inode);
  }

  /** The inode of the VDI; undefined if `vid` is another VDI's now. */
  async readInode(vid: number): Promise<Inode | undefined> {
    try {
      const inode = await this.#host.cluster.readInode(vid);
      return isSameVdi(inode, this.#vdi.inode) ? inode : undefined;
    } catch (error) {
      // Only nodes that reuse vids remove inodes. Elsewhere the inode is lost, and the disk is still usable.
      if ((error as StoreError).code === 'GONE' && this.#host.recyclesVids) return undefined;
      throw error;
    }
  }

  /** `inode` is the VDI's, perhaps with another size or another number of copies. */
  async adopt(inode: Inode): Promise<void> {
    const vdi = this.#vdi;
    if (inode.size !== vdi.inode.size) {
      const count = objectCount(inode.size, inode.blockSizeShift);
      const before = vdi.map.length;
      const { changes } = vdi;
      // A part that was cut off and added again may have other objects than before.
      const added =
        count > before && !vdi.isHyper ? await this.#host.cluster.readTable(inode.vid, count - before, before) : NONE;
      if (vdi.changes !== changes || vdi.record.vid !== inode.vid) return;
      const { name, size } = vdi.record;
      this.#host.log(`${name} was resized by another client: it has ${inode.size} bytes now, and had ${size}`);
      vdi.resized(inode);
      for (const [n, owner] of added.entries()) vdi.map[before + n] = owner;
      return;
    }
    if (inode.copies !== vdi.inode.copies || inode.copyPolicy !== vdi.inode.copyPolicy) vdi.recopied(inode);
  }

  /**
   * Continue as the working VDI that has taken the place of `from`: another client has made `from` a snapshot. Does nothing if
   * the VDI has another vid already. Errors: IO (there is no working VDI, or it does not descend from `from`).
   */
  async follow(from: number): Promise<void> {
    while (this.#switching) await this.#switching;
    const vdi = this.#vdi;
    if (vdi.failure) throw vdi.failure;
    if (this.#isClosed || vdi.record.vid !== from) return;
    if (vdi.isHyper) {
      if (await isDeleted(this.#host.cluster, vdi.inode)) throw await this.#wasDeleted();
      const what = `${vdi.record.name} is a hyper volume, and has become read-only in the cluster`;
      throw new StoreError('IO', `${what}: nothing more is written to it`);
    }
    this.#moving ??= this.#move(from).finally(() => (this.#moving = undefined));
    await this.#moving;
  }

  async #move(from: number): Promise<void> {
    const { cluster } = this.#host;
    const vdi = this.#vdi;
    const { name } = vdi.record;
    const deadline = performance.now() + cluster.pool.retryMs;
    for (;;) {
      const vid = await this.#host.workingVid(name);
      if (vid !== 0 && vid !== from) {
        const inode = await cluster.readInode(vid);
        if (inode.name === name && !inode.isSnapshot) {
          await this.#checkDescent(inode, from);
          const map = await cluster.readTable(vid, objectCount(inode.size, inode.blockSizeShift));
          if (this.#isClosed) return;
          try {
            await vdi.become(inode, map);
          } catch (error) {
            if ((error as StoreError).code === 'MOVED') continue; // snapshotted again
            throw error;
          }
          this.#host.log(`another client has taken a snapshot of ${name}, which continues as vid ${vid.toString(16)}`);
          return;
        }
      }
      if (this.#isClosed) return;
      if (await isDeleted(cluster, vdi.inode)) throw await this.#wasDeleted();
      if (performance.now() >= deadline) {
        throw new StoreError(
          'IO',
          `${name} (vid ${from.toString(16)}) has become read-only in the cluster, and no working VDI has taken its place; ` +
            'it may have been deleted, or cloned from, while it was in use',
          { forClients: `${name} has become read-only: it was deleted, or cloned from, while it was in use` },
        );
      }
      await sleep(FOLLOW_POLL_MS);
    }
  }

  /** Another client has deleted the VDI: objects that were made meanwhile are removed as well. */
  async #wasDeleted(): Promise<StoreError> {
    const { inode } = this.#vdi;
    const { name, vid } = this.#vdi.record;
    const failure = this.#vdi.fail(
      new StoreError('IO', `${name} (vid ${vid.toString(16)}) was deleted by another client while it was in use`, {
        forClients: `${name} was deleted while it was in use`,
      }),
    );
    await removeLeftObjects(this.#host.cluster, inode).catch((error: unknown) => {
      this.#host.log(`objects of ${name}, which was deleted, may be left over`, { err: error });
    });
    return failure;
  }

  /** Fails the VDI if `inode` does not descend from `from`: it was rolled back, or another VDI has its name now. */
  async #checkDescent(inode: Inode, from: number): Promise<void> {
    let { parentVid } = inode;
    for (let n = 0; parentVid !== from; n++) {
      if (parentVid === 0 || n === MAX_GENERATIONS) {
        const failure = this.#vdi.fail(
          new StoreError(
            'IO',
            `${inode.name} is another disk now (vid ${inode.vid.toString(16)} does not descend from ${from.toString(16)}): ` +
              'it was rolled back or replaced while it was in use; disconnect and connect again',
            {
              forClients: `${inode.name} was rolled back or replaced while it was in use; disconnect and connect again`,
            },
          ),
        );
        await removeLeftObjects(this.#host.cluster, this.#vdi.inode).catch(() => undefined);
        throw failure;
      }
      ({ parentVid } = await this.#host.cluster.readInode(parentVid));
    }
  }
}

function nothing(): void {}

/** The VDI has another vid than the caller expected. */
export function movedError(record: VdiRecord): StoreError {
  return new StoreError('MOVED', `${record.name} continues as vid ${record.vid.toString(16)}`);
}
