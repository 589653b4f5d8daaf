/**
 * Sets tables right by hand where nodes may have applied a change of entries to some copies or some VDIs only. Writes the table as
 * plain bytes, for which no node gives up a reference, and the counts of the new entries. Holds no state.
 */
import { encodeReference } from '../../sheepdog/inode-table.js';
import type { ClusterClient } from './cluster-client.js';
import type { EntryChange } from './table-runs.js';

/** More snapshots than this of one VDI between two of our writes are taken for a fault. */
export const MAX_GENERATIONS = 4096;

/**
 * The members of the cluster changed while `changes` were written, and a copy of the inode may have missed them. `map`: the
 * owners before the changes.
 */
export async function confirmEntries(
  cluster: ClusterClient,
  vid: number,
  map: Uint32Array,
  changes: readonly EntryChange[],
): Promise<void> {
  const table = map.slice(0, lastOf(changes) + 1);
  for (const { idx, owner } of changes) table[idx] = owner;
  await cluster.fillTable(vid, table);
  for (const { idx } of changes) await cluster.writeReferences(vid, idx, encodeReference(0, 0));
}

/**
 * `changes` were written while the nodes made `from` a snapshot and `to` its working VDI. The nodes read the whole inode and
 * write it back, so each of the two may have the changes or not, with any count. The old references are given up in any case.
 * One state is right: the changes came before the snapshot, and all VDIs from `from` to `to` have them.
 */
export async function carryOver(
  cluster: ClusterClient,
  from: number,
  to: number,
  changes: readonly EntryChange[],
): Promise<void> {
  const lineage = await lineageOf(cluster, from, to);
  const count = lastOf(changes) + 1;
  for (const [generation, vid] of lineage.entries()) {
    const table = await cluster.readTable(vid, count);
    for (const { idx, owner } of changes) {
      table[idx] = owner;
      if (owner === 0) continue;
      const reference = encodeReference(generation, generation < lineage.length - 1 ? 1 : 0);
      await cluster.writeReferences(vid, idx, reference);
    }
    await cluster.fillTable(vid, table);
  }
}

/** The vids from the snapshot `from` to its descendant `to`, both included. */
async function lineageOf(cluster: ClusterClient, from: number, to: number): Promise<number[]> {
  const vids: number[] = [];
  for (let vid = to; vid !== from; vid = (await cluster.readInode(vid)).parentVid) {
    if (vid === 0 || vids.length === MAX_GENERATIONS) throw new Error('invariant: followed a VDI of another family');
    vids.push(vid);
  }
  return [...vids, from].reverse();
}

function lastOf(changes: readonly EntryChange[]): number {
  return changes.reduce((highest, { idx }) => Math.max(highest, idx), 0);
}
