/**
 * Work on the table of an inode that more than one part does: writing scattered entries, clearing all of them, waiting
 * until what they referred to is gone. Owns no state.
 */
import type { StoreError } from '../object-store.js';
import type { Cluster } from './cluster.js';

/** Runs of table entries one batch writes at a time. */
const PARALLEL_RUNS = 8;
/** Table entries that one request clears: each makes the nodes give up a reference before they answer the next. */
const CLEAR_BATCH = 128;
/** How long a removed object may take to go: nodes give references up after they have answered. */
const RECLAIM_WAIT_MS = 10_000;
const RECLAIM_POLL_MS = 5;

/**
 * A hyper volume may have very many, and each is four bytes of memory here: 256 TiB in objects of 4 MiB. Others have
 * MAX_DATA_OBJECTS at most.
 */
export const MAX_OBJECTS = 2 ** 26;

/** One number for (vid, idx): both fit, 24 and 26 bits. */
export function objectKey(vid: number, idx: number): number {
  return vid * MAX_OBJECTS + idx;
}

export function objectCount(size: number, blockSizeShift: number): number {
  return Math.ceil(size / 2 ** blockSizeShift);
}

/** Whether the object is gone, after waiting for it for a while. */
export async function isRemoved(cluster: Cluster, vid: number, idx: number): Promise<boolean> {
  const sector = Buffer.alloc(512);
  for (const deadline = Date.now() + RECLAIM_WAIT_MS; ;) {
    try {
      await cluster.readData(vid, idx, 0, sector);
    } catch (error) {
      if ((error as StoreError).code === 'GONE') return true;
      throw error;
    }
    if (Date.now() >= deadline) return false;
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
  let next = 0;
  const worker = async (): Promise<void> => {
    while (next < runs.length) {
      const { idx, owners } = runs[next++] as { idx: number; owners: number[] };
      await write(idx, owners);
    }
  };
  const results = await Promise.allSettled(Array.from({ length: Math.min(PARALLEL_RUNS, runs.length) }, worker));
  for (const result of results) if (result.status === 'rejected') throw result.reason;
}

export function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

/** Give up all references of a table, in batches that the nodes digest one after the other. */
export async function clearTable(cluster: Cluster, vid: number, table: Uint32Array): Promise<void> {
  let batch: { idx: number; owner: number }[] = [];
  const write = (idx: number, owners: readonly number[]): Promise<void> => cluster.writeTable(vid, idx, owners);
  for (let idx = 0; idx < table.length; idx++) {
    if (table[idx] === 0) continue;
    batch.push({ idx, owner: 0 });
    if (batch.length < CLEAR_BATCH) continue;
    await inRuns(batch, write);
    batch = [];
  }
  if (batch.length > 0) await inRuns(batch, write);
}
