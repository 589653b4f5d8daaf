/**
 * The locks of a cluster that enforces them (`dog cluster format -l`): the writer of a VDI holds the lock of its vid. A snapshot
 * gives the working VDI a new vid, and the lock stays on the old one: the working VDI looks free until the holder has followed.
 * Owns the order in which locks are taken and released; the store knows which VDIs are open.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { StoreError } from '../store-error.js';
import { lockByName } from './by-name.js';
import type { ClusterClient } from './cluster-client.js';
import { goneIsNone } from './deleted-vdi.js';
import type { Inode } from '../../sheepdog/inode.js';
import { inParallel } from '../../system/in-parallel.js';

/** A client that takes the lock of the new vid by mistake finds the old lock, and releases the new one within this time. */
const NEXT_LOCK_MS = 2_000;
const NEXT_LOCK_POLL_MS = 50;
const PARALLEL_READS = 64;

export class Locks {
  readonly #cluster: ClusterClient;
  readonly #isEnforced: boolean;
  readonly #recyclesVids: boolean;

  constructor(cluster: ClusterClient, options: { readonly isEnforced: boolean; readonly recyclesVids: boolean }) {
    this.#cluster = cluster;
    this.#isEnforced = options.isEnforced;
    this.#recyclesVids = options.recyclesVids;
  }

  /**
   * Call before the working VDI `inode` is written. Errors: LOCKED (another client holds it, or holds the vid that it had
   * before a snapshot), IO (another client is taking a snapshot).
   */
  async take(inode: Inode): Promise<void> {
    if (!this.#isEnforced) return;
    await this.#lock(inode);
    try {
      // Without a parent it never had another vid that could be locked.
      if (inode.parentVid !== 0) await this.#mustNotBeHeldBefore(inode);
    } catch (error) {
      await this.release(inode.vid).catch(() => undefined);
      throw error;
    }
  }

  /** Errors: LOCKED if a snapshot of it is locked. */
  async #mustNotBeHeldBefore({ name, vid }: Inode): Promise<void> {
    const locked = (await this.#cluster.lockedVids().catch(tooManyIsNone)).filter((other) => other !== vid);
    const held: Inode[] = [];
    await inParallel(PARALLEL_READS, locked, async (other) => {
      const inode = await this.#cluster.readInode(other).catch(goneIsNone);
      if (inode?.name === name && inode.isSnapshot) held.push(inode);
    });
    const [first] = held.sort((a, b) => b.snapId - a.snapId);
    if (!first) return;
    throw new StoreError(
      'LOCKED',
      `"${name}" is locked by another client of the cluster: it was open when its snapshot ${first.snapId} was taken, and the ` +
        `lock is still there; if no client has it open any more, 'sheepgate vdi lock unlock @${first.vid.toString(16)}' ends it`,
    );
  }

  async #lock(inode: Inode): Promise<void> {
    try {
      await lockByName(this.#cluster, inode, this.#recyclesVids);
    } catch (error) {
      const { code, message } = error as StoreError;
      // MOVED means: look at the map again. A VDI that is being opened has none yet.
      if (code === 'MOVED') throw new StoreError('IO', message, { cause: error });
      if (code !== 'DAMAGED') throw error;
      throw new StoreError('DAMAGED', `${message}; --missing=zero reads the rest without a lock`, {
        cause: error,
      });
    }
  }

  /**
   * The VDI continues as `next`; we hold the lock of its old vid. Errors: LOCKED (another client has taken the lock of `next`),
   * MOVED (the VDI has another vid again).
   */
  async takeNext(next: Inode): Promise<void> {
    if (!this.#isEnforced) return;
    const deadline = performance.now() + NEXT_LOCK_MS;
    for (;;) {
      try {
        // Where vids are reused the nodes may find the snapshot by its name; that lock is ours.
        return void (await lockByName(this.#cluster, next, this.#recyclesVids));
      } catch (error) {
        if ((error as StoreError).code !== 'LOCKED' || performance.now() >= deadline) throw error;
      }
      await sleep(NEXT_LOCK_POLL_MS);
    }
  }

  async release(vid: number): Promise<void> {
    if (this.#isEnforced) await this.#cluster.release(vid);
  }

  /** Runs `work`, which ends the working VDI `inode`, under its lock. Errors: those of `take` and of `work`. */
  async toEnd(inode: Inode, work: () => Promise<void>): Promise<void> {
    await this.take(inode);
    let isDone = false;
    try {
      await work();
      isDone = true;
    } finally {
      // The vid may have been reused, and its lock may then belong to another VDI. Elsewhere the worst case is a lock on an
      // unused vid.
      if (!isDone || !this.#recyclesVids) await this.release(inode.vid).catch(() => undefined);
    }
  }
}

/** A cluster with too many VDIs to ask for all locks: opening the disk matters more than this check. */
function tooManyIsNone(error: unknown): number[] {
  if ((error as StoreError).code !== 'LIMIT') throw error;
  return [];
}
