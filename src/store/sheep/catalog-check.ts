/**
 * The check of a cluster's catalog: asks for every object that a table refers to. Only the cluster itself can find objects that
 * no table refers to. Changes nothing.
 */
import type { Inode } from '../../sheepdog/inode.js';
import { oidKey } from '../../sheepdog/object-ids.js';
import { inParallel } from '../../system/in-parallel.js';
import type { CheckReport, DamagedVdi } from '../object-store.js';
import { StoreError } from '../store-error.js';
import type { ClusterClient } from './cluster-client.js';
import { labelsOf } from './labels.js';
import { presentInLong } from './table-scan.js';

/** Findings that are listed; the rest is counted. */
const MAX_PROBLEMS = 1000;
const PARALLEL_READS = 64;
const SECTOR_BYTES = 512;

export function cannotRepair(): StoreError {
  return new StoreError(
    'UNSUPPORTED',
    'a cluster cannot be repaired from here: only its nodes can tell which of two copies is right, and which objects no ' +
      "table refers to ('dog vdi check NAME' restores copies); check without --repair lists what is lost, and " +
      "'serve --missing=zero' serves the rest",
  );
}

export async function checkCatalog(
  cluster: ClusterClient,
  inodes: readonly Inode[],
  damaged: readonly DamagedVdi[],
): Promise<CheckReport> {
  const labels = labelsOf(inodes);
  const problems: string[] = [];
  let hidden = 0;
  const known = new Map<number, boolean>();
  const sector = Buffer.alloc(SECTOR_BYTES);
  for (const { vid, likelyName, why } of damaged) {
    problems.push(
      `damaged: ${likelyName === undefined ? '' : `${likelyName}, probably, `}id ${vid.toString(16)}: ${why}`,
    );
  }
  for (const inode of inodes) {
    let map: Uint32Array;
    try {
      map = await cluster.readOwners(inode);
    } catch (error) {
      const { code } = error as StoreError;
      if (code !== 'GONE' && code !== 'DAMAGED') throw error;
      problems.push(`damaged: ${labels.get(inode.vid)}, id ${inode.vid.toString(16)}: ${(error as Error).message}`);
      continue;
    }
    const present = await presentInLong(map);
    await inParallel(PARALLEL_READS, present, async (idx) => {
      const owner = map[idx] as number;
      const key = oidKey(owner, idx);
      if (known.has(key)) return;
      known.set(key, await exists(cluster, owner, idx, sector));
    });
    const label = labels.get(inode.vid) ?? '';
    for (const idx of present) {
      if (known.get(oidKey(map[idx] as number, idx))) continue;
      const from = idx * 2 ** inode.blockSizeShift;
      const to = Math.min(from + 2 ** inode.blockSizeShift, inode.size) - 1;
      if (problems.length < MAX_PROBLEMS) problems.push(`lost: ${label} bytes ${from} to ${to}`);
      else hidden++;
    }
  }
  if (hidden > 0) problems.push(`... and ${hidden} more`);
  return {
    objects: known.size,
    vdis: inodes.length + damaged.length,
    problems,
    orphans: 0,
    orphanBytes: 0,
    repaired: 0,
  };
}

async function exists(cluster: ClusterClient, vid: number, idx: number, sector: Buffer): Promise<boolean> {
  try {
    await cluster.readData(vid, idx, 0, sector);
    return true;
  } catch (error) {
    if ((error as StoreError).code !== 'GONE') throw error;
    return false;
  }
}
