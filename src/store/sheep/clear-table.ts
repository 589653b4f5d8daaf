/** Clears the whole table of an inode, so that nodes give up every reference in it. Owns no state. */
import type { ClusterClient } from './cluster-client.js';
import { inRuns, type EntryChange } from './table-runs.js';
import { TableWriter } from './table-writer.js';

/** Table entries that one request clears: each makes the nodes give up a reference before they answer the next. */
const CLEAR_BATCH = 128;

/** Clears all entries, in batches, one after the other. Errors: as requests on objects; can be repeated then. */
export async function clearTable(cluster: ClusterClient, vid: number, table: Uint32Array): Promise<void> {
  let batch: EntryChange[] = [];
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
