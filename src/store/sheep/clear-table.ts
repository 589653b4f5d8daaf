/** Clears the whole table of an inode, so that nodes give up every reference in it. Owns no state. */
import type { ClusterClient } from './cluster-client.js';
import { inRuns } from './table-runs.js';
import { presentIn } from './table-scan.js';
import { TableWriter } from './table-writer.js';

/** Table entries that one request clears: each makes the nodes give up a reference before they answer the next. */
const CLEAR_BATCH = 128;

/**
 * Clears all entries, in batches, one after the other. `table`: what the nodes have; it is kept up to date, and empty at the
 * end. Errors: as requests on objects; can be repeated then, with a table that is read anew.
 */
export async function clearTable(cluster: ClusterClient, vid: number, table: Uint32Array): Promise<void> {
  const writer = new TableWriter(cluster, vid, table);
  const write = (idx: number, owners: readonly number[]): Promise<void> => writer.set(idx, owners);
  const present = presentIn(table);
  for (let from = 0; from < present.length; from += CLEAR_BATCH) {
    const batch = present.slice(from, from + CLEAR_BATCH).map((idx) => ({ idx, owner: 0 }));
    await inRuns(batch, write);
  }
}
