/** Waits until nodes have removed an object whose last reference was given up. Owns no state. */
import { setTimeout as sleep } from 'node:timers/promises';
import type { StoreError } from '../store-error.js';
import type { ObjectClient } from './object-client.js';

/** How long a removed object may take to go: nodes give references up after they have answered. */
const RECLAIM_WAIT_MS = 10_000;
const RECLAIM_POLL_MS = 5;
/** Where not all nodes can be asked, the last strip of an object counts as gone this long after the first. */
const LAST_STRIP_MS = 1_000;

/**
 * Waits until the object is gone; false if it is still there after a while. `copyPolicy`: the inode's; 0 means plain copies.
 * Errors: IO, CLOSED.
 */
export async function isRemoved(cluster: ObjectClient, vid: number, idx: number, copyPolicy: number): Promise<boolean> {
  const deadline = performance.now() + RECLAIM_WAIT_MS;
  if (!(await untilNot(deadline, () => cluster.isFound(vid, idx)))) return false;
  if (copyPolicy === 0) return true;
  // An erasure-coded object is not found once its first strip is gone; the other strips are removed separately.
  try {
    return await untilNot(deadline, () => cluster.isAnywhere(vid, idx));
  } catch (error) {
    if ((error as StoreError).code !== 'IO') throw error;
    await sleep(LAST_STRIP_MS);
    return true;
  }
}

async function untilNot(deadline: number, isSo: () => Promise<boolean>): Promise<boolean> {
  for (;;) {
    if (!(await isSo())) return true;
    if (performance.now() >= deadline) return false;
    await sleep(RECLAIM_POLL_MS);
  }
}
