/**
 * Work on the table of an inode that more than one part does: writing scattered entries, clearing all of them, waiting
 * until what they referred to is gone. Owns no state.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { inParallel } from '../../system/in-parallel.js';
import type { StoreError } from '../store-error.js';
import type { ClusterClient } from './cluster-client.js';
import { TableWriter } from './table-writer.js';

/** Runs of table entries one batch writes at a time. */
const PARALLEL_RUNS = 8;
/** Table entries that one request clears: each makes the nodes give up a reference before they answer the next. */
const CLEAR_BATCH = 128;
/** How long a removed object may take to go: nodes give references up after they have answered. */
const RECLAIM_WAIT_MS = 10_000;
const RECLAIM_POLL_MS = 5;
/** Where not all nodes can be asked, the last strip of an object is taken to be gone so long after the first. */
const LAST_STRIP_MS = 1_000;

/**
 * Whether nothing of the object is left, after waiting for it for a while. `copyPolicy` is the inode's; 0 says that it keeps
 * plain copies. Errors: StoreError IO, CLOSED.
 */
export async function isRemoved(
  cluster: ClusterClient,
  vid: number,
  idx: number,
  copyPolicy: number,
): Promise<boolean> {
  const deadline = performance.now() + RECLAIM_WAIT_MS;
  if (!(await untilNot(deadline, () => cluster.isFound(vid, idx)))) return false;
  if (copyPolicy === 0) return true;
  // An erasure-coded object is not found any more with its first strip; the others go by themselves.
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

/** Neighbouring entries in one request; gaps are left alone. */
export async function inRuns(
  changes: readonly { readonly idx: number; readonly owner: number }[],
  write: (idx: number, owners: readonly number[]) => Promise<void>,
): Promise<void> {
  const sorted = [...changes].sort((a, b) => a.idx - b.idx);
  const runs: { idx: number; owners: number[] }[] = [];
  for (const { idx, owner } of sorted) {
    const last = runs.at(-1);
    if (last && last.idx + last.owners.length === idx) last.owners.push(owner);
    else runs.push({ idx, owners: [owner] });
  }
  await inParallel(PARALLEL_RUNS, runs, (run) => write(run.idx, run.owners));
}

/** Give up all references of a table, in batches that the nodes digest one after the other. */
export async function clearTable(cluster: ClusterClient, vid: number, table: Uint32Array): Promise<void> {
  let batch: { idx: number; owner: number }[] = [];
  const writer = new TableWriter(cluster, vid, table.slice());
  const write = (idx: number, owners: readonly number[]): Promise<void> => writer.set(idx, owners);
  for (let idx = 0; idx < table.length; idx++) {
    if (table[idx] === 0) continue;
    batch.push({ idx, owner: 0 });
    if (batch.length < CLEAR_BATCH) continue;
    await inRuns(batch, write);
    batch = [];
  }
  if (batch.length > 0) await inRuns(batch, write);
}
