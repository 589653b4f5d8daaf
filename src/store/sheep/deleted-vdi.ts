/**
 * VDIs that somebody else has deleted while they were in use here. What was made at that moment is in no table that anybody
 * will ever clear, and nodes delete a VDI with objects in its table by half only: it is gone from their lists, its inode keeps
 * its name, and the name stays taken (sheep/vdi.c, delete_vdi_work). Owns how both are brought to their end; state it has none.
 */
import { MAX_DATA_OBJECTS, type StoreError } from '../object-store.js';
import type { Cluster } from './cluster.js';
import type { Inode } from './layouts.js';
import { clearTable, inParallel } from './table.js';

/** A snapshot or a resize leaves these as they are, and a vid that is used again has another time. */
export function isSameVdi(found: Inode, known: Inode): boolean {
  return found.vid === known.vid && found.name === known.name && found.createdAt === known.createdAt;
}

const PARALLEL_REMOVALS = 16;

/**
 * If `inode` is of a VDI that is deleted: give up what its table refers to all the same, and remove `made`, objects of its own
 * that no table refers to. Nothing is touched if it is there, or if its vid is another VDI's by now. Errors: the cluster's.
 */
export async function removeLeftObjects(
  cluster: Cluster,
  inode: Inode,
  made: readonly { readonly idx: number }[] = [],
): Promise<void> {
  const { vid, name } = inode;
  const found = await cluster.readInode(vid).catch(goneIsNone);
  if (found && found.createdAt !== inode.createdAt) return;
  const keepsName = found !== undefined && found.name !== '';
  if (keepsName && (await cluster.vids()).isLive(vid)) return;
  if (found?.storePolicy === 0) {
    await clearTable(cluster, vid, await cluster.readTable(vid, MAX_DATA_OBJECTS));
    if (keepsName && (await cluster.lookup(name)) === vid) await cluster.deleteVdi(name, 0);
  }
  await inParallel(PARALLEL_REMOVALS, made, ({ idx }) => cluster.removeData(vid, idx));
}

/** Of an inode that may not be there any more. Errors: any other. */
export function goneIsNone(error: unknown): undefined {
  if ((error as StoreError).code !== 'GONE') throw error;
}
