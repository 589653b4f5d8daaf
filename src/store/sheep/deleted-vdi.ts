/**
 * VDIs that another client has deleted while they were in use here. Objects made at that moment are in no table that anybody
 * will clear. And nodes only half delete a VDI that has objects in its table: it is gone from their lists, but its inode keeps
 * the name, which stays taken (sheep/vdi.c, delete_vdi_work). Cleans up both. Holds no state.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import type { StoreError } from '../store-error.js';
import { MAX_DATA_OBJECTS } from '../vdi-record.js';
import type { ClusterClient } from './cluster-client.js';
import { clearTable } from './clear-table.js';
import type { Inode } from '../../sheepdog/inode.js';
import { inParallel } from '../../system/in-parallel.js';

const PARALLEL_REMOVALS = 16;
/** A node answers that a VDI is deleted, and writes its inode, before all of them show its vid as deleted. */
const LIST_WAIT_MS = 1_000;
const LIST_POLL_MS = 50;

/** A snapshot or a resize changes none of these fields; a VDI that reuses the vid has another creation time. */
export function isSameVdi(found: Inode, known: Inode): boolean {
  return found.vid === known.vid && found.name === known.name && found.createdAt === known.createdAt;
}

/**
 * Whether the VDI with this inode is gone: its vid belongs to another VDI, or the nodes list it as deleted. An inode with other
 * content is no proof: that copy may be damaged.
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
 * Whether the nodes list the VDI as deleted. A vid that is not in use is no proof: a node that has just started answers before it
 * has the vids of the other nodes. Only where vids are reused do nodes forget deleted vids, and then the inode is gone as well
 * (sheep/vdi.c, do_vid_gc).
 */
async function countsAsDeleted(cluster: ClusterClient, vid: number, found: Inode | undefined): Promise<boolean> {
  const vids = await cluster.vids();
  return vids.isDeleted(vid) || (cluster.recyclesVids && !found && !vids.isUsed(vid));
}

/**
 * If the nodes list `inode`'s VDI as deleted: clears what is left in its table, and removes `made`, objects of its own that no
 * table refers to. Does nothing if the VDI exists, or if another VDI has its vid now. Errors: as requests on objects.
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

/** For `catch`: GONE becomes undefined. Errors: any other. */
export function goneIsNone(error: unknown): undefined {
  if ((error as StoreError).code !== 'GONE') throw error;
}
