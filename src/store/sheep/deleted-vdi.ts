/**
 * VDIs that somebody else has deleted while they were in use here. What was made at that moment is in no table that anybody
 * will ever clear, and nodes delete a VDI with objects in its table by half only: it is gone from their lists, its inode keeps
 * its name, and the name stays taken (sheep/vdi.c, delete_vdi_work). Owns how both are brought to their end; state it has none.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { MAX_DATA_OBJECTS, type StoreError } from '../object-store.js';
import type { ClusterClient } from './cluster-client.js';
import { clearTable } from './clear-table.js';
import type { Inode } from '../../sheepdog/inode.js';
import { inParallel } from '../../system/in-parallel.js';

const PARALLEL_REMOVALS = 16;
/** A node answers that a VDI is deleted, and writes its inode, before all of them show its vid as deleted. */
const LIST_WAIT_MS = 1_000;
const LIST_POLL_MS = 50;

/** A snapshot or a resize leaves these as they are, and a vid that is used again has another time. */
export function isSameVdi(found: Inode, known: Inode): boolean {
  return found.vid === known.vid && found.name === known.name && found.createdAt === known.createdAt;
}

/**
 * Whether the VDI that had this inode is gone: its vid is another's, or the nodes count it as deleted. One inode that reads
 * otherwise proves nothing: a copy may be damaged.
 */
export async function isDeleted(cluster: ClusterClient, known: Inode): Promise<boolean> {
  const found = await cluster.readInode(known.vid).catch(goneIsNone);
  if (found && isSameVdi(found, known)) return false;
  if (found && found.name !== '' && found.createdAt !== known.createdAt) return true;
  const deadline = performance.now() + LIST_WAIT_MS;
  while (!(await countsAsDeleted(cluster, known.vid, found))) {
    if (performance.now() >= deadline) return false;
    await sleep(LIST_POLL_MS);
  }
  return true;
}

/**
 * Whether the nodes say that the VDI is deleted. That one of them does not know its vid proves nothing: one that has just
 * started knows those of the inodes on its own disk, until the others have told it of theirs, and answers meanwhile. Only
 * where vids are used again it is forgotten what was deleted, and then its inode is gone as well (sheep/vdi.c, do_vid_gc).
 */
async function countsAsDeleted(cluster: ClusterClient, vid: number, found: Inode | undefined): Promise<boolean> {
  const vids = await cluster.vids();
  return vids.isDeleted(vid) || (cluster.recyclesVids && !found && !vids.isUsed(vid));
}

/**
 * If the nodes count `inode`'s VDI as deleted: give up what its table refers to all the same, and remove `made`, objects of its
 * own that no table refers to. Nothing is touched if it is there, or if its vid is another VDI's by now. Errors: the cluster's.
 */
export async function removeLeftObjects(
  cluster: ClusterClient,
  inode: Inode,
  made: readonly { readonly idx: number }[] = [],
): Promise<void> {
  const { vid, name } = inode;
  const found = await cluster.readInode(vid).catch(goneIsNone);
  if (found && found.createdAt !== inode.createdAt) return;
  if (!(await countsAsDeleted(cluster, vid, found))) return;
  if (found?.storePolicy === 0) {
    await clearTable(cluster, vid, await cluster.readTable(vid, MAX_DATA_OBJECTS));
    const keepsName = found.name !== '';
    if (keepsName && (await cluster.lookup(name)) === vid) await cluster.deleteVdi(name, 0);
  }
  await inParallel(PARALLEL_REMOVALS, made, ({ idx }) => cluster.removeData(vid, idx));
}

/** Of an inode that may not be there any more. Errors: any other. */
export function goneIsNone(error: unknown): undefined {
  if ((error as StoreError).code !== 'GONE') throw error;
}
