/** Reads what VDIs and snapshots of a cluster use. The counting is in usage-count.ts. */
import { objectCount } from '../../sheepdog/inode-table.js';
import type { Inode } from '../../sheepdog/inode.js';
import { inParallel } from '../../system/in-parallel.js';
import type { Usage } from '../object-store.js';
import { StoreError } from '../store-error.js';
import type { ClusterClient } from './cluster-client.js';
import { inTurns } from './table-scan.js';
import { UsageCount } from './usage-count.js';

/** Tables that are in memory at a time while their entries are counted. Each has 4 MiB at most. */
const PARALLEL_TABLES = 16;
/** Tables that are read at a time to compare them with one table; nothing of them stays in memory. */
const PARALLEL_READS = 64;

/**
 * What all VDIs and snapshots use, in one pass. Errors: as reading inodes and tables; a VDI that is lost or damaged says so in
 * its usage.
 */
export async function countUsages(
  cluster: ClusterClient,
  readInodes: () => Promise<readonly Inode[]>,
): Promise<ReadonlyMap<number, Usage>> {
  const counts = new UsageCount();
  let counting: Promise<void> = Promise.resolve();
  await inParallel(PARALLEL_TABLES, await readInodes(), async (inode) => {
    let map: Uint32Array;
    try {
      map = await cluster.readOwners(inode);
    } catch (error) {
      if (!(error instanceof StoreError)) throw error;
      if (error.code === 'GONE' || error.code === 'DAMAGED') {
        if ((await cluster.vids()).isLive(inode.vid)) counts.noteDamage(inode, error.message);
        return;
      }
      // A result without it would read as if the disk did not exist.
      const { code, message } = error;
      throw new StoreError(code, `what ${inode.name} uses cannot be counted: ${message}`, { cause: error });
    }
    // One table at a time: otherwise each would take a slice of every turn.
    counting = counting.then(() => countTable(counts, inode, map));
    await counting;
  });
  return counts.result();
}

/** What one uses. Errors: GONE, and as reading tables. */
export async function countUsage(
  cluster: ClusterClient,
  vid: number,
  readInodes: () => Promise<readonly Inode[]>,
): Promise<Usage> {
  const inode = await cluster.readInode(vid);
  const map = await cluster.readOwners(inode);
  const count = map.length;
  const shared = new Uint8Array(count);
  if (inode.isSnapshot) {
    // No other table has the objects that a working VDI owns. A snapshot's objects may be in any table.
    const others = (await readInodes()).filter((other) => other.vid !== vid && other.storePolicy === 0);
    await inParallel(PARALLEL_READS, others, async (other) => {
      const table = await tableOrNothing(
        cluster,
        other.vid,
        Math.min(count, objectCount(other.size, other.blockSizeShift)),
      );
      for (let idx = 0; idx < table.length; idx++) if (table[idx] !== 0 && table[idx] === map[idx]) shared[idx] = 1;
    });
  }
  let allocated = 0;
  let exclusive = 0;
  for (let idx = 0; idx < count; idx++) {
    if (map[idx] === 0) continue;
    allocated++;
    if (inode.isSnapshot ? shared[idx] === 0 : map[idx] === vid) exclusive++;
  }
  return { allocated, exclusive };
}

/** Empty if the inode is gone: deleted or lost. */
async function tableOrNothing(cluster: ClusterClient, vid: number, count: number): Promise<Uint32Array> {
  try {
    return await cluster.readTable(vid, count);
  } catch (error) {
    if ((error as StoreError).code !== 'GONE') throw error;
    return new Uint32Array(0);
  }
}

async function countTable(counts: UsageCount, inode: Inode, map: Uint32Array): Promise<void> {
  await inTurns(map.length, (from, to) => counts.add(inode, map, from, to));
  counts.note(inode);
}
