/**
 * The locks of a cluster that enforces them (`dog cluster format -l`): whoever writes a VDI holds the one of its vid. Nodes
 * leave a lock where it is when a snapshot is taken, so the working VDI, which has a new vid then, looks free until its holder
 * has followed. Owns the order in which locks are taken and given up; which VDIs are open is the store's to know.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { StoreError } from '../object-store.js';
import { lockByName } from './by-name.js';
import type { ClusterClient } from './cluster-client.js';
import { goneIsNone } from './deleted-vdi.js';
import type { Inode } from '../../sheepdog/inode.js';
import { inParallel } from '../../system/in-parallel.js';

/** Who finds that a disk is somebody else's after all gives its new lock back in that time. */
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
   * For whoever is about to write the working VDI `inode`. Errors: LOCKED, also by one who had it open when a snapshot was
   * taken and has not moved on to the working VDI yet; IO if somebody takes a snapshot at this moment.
   */
  async take(inode: Inode): Promise<void> {
    if (!this.#isEnforced) return;
    await this.#lock(inode);
    try {
      // Before its first snapshot there was no other vid to lock.
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
      `"${name}" is locked by somebody else in the cluster: it was open when its snapshot ${first.snapId} was taken, and the ` +
        `lock is still there; if nobody has it open any more, 'sheepgate vdi lock unlock @${first.vid.toString(16)}' ends that lock`,
    );
  }

  async #lock(inode: Inode): Promise<void> {
    try {
      await lockByName(this.#cluster, inode, this.#recyclesVids);
    } catch (error) {
      const { code, message } = error as StoreError;
      // Who opens a VDI looks it up again by himself.
      if (code === 'MOVED') throw new StoreError('IO', message, { cause: error });
      if (code !== 'DAMAGED') throw error;
      throw new StoreError('DAMAGED', `${message}; --missing=zero reads without a lock what there is`, {
        cause: error,
      });
    }
  }

  /**
   * The VDI goes on as `next`, and we hold its lock until now. Errors: LOCKED if somebody else has taken that one, MOVED if
   * the VDI has another vid again.
   */
  async takeNext(next: Inode): Promise<void> {
    if (!this.#isEnforced) return;
    const deadline = performance.now() + NEXT_LOCK_MS;
    for (;;) {
      try {
        // Where vids are used again the nodes may find the snapshot by its name, whose lock is ours.
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

  /** Do away with the working VDI `inode`, which nobody else may have open. Errors: those of `take`. */
  async toEnd(inode: Inode, work: () => Promise<void>): Promise<void> {
    await this.take(inode);
    let isDone = false;
    try {
      await work();
      isDone = true;
    } finally {
      // A vid that is used again is another VDI's by now, and its lock too; any other stays locked at worst, and unused.
      if (!isDone || !this.#recyclesVids) await this.release(inode.vid).catch(() => undefined);
    }
  }
}

/** Better a disk that can be opened than none, in a cluster that has had very many. */
function tooManyIsNone(error: unknown): number[] {
  if ((error as StoreError).code !== 'LIMIT') throw error;
  return [];
}
