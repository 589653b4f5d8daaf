/** Finds the shadows of a disk among the VDIs of a cluster, by their names. */
import type { Inode } from '../../sheepdog/inode.js';
import type { ClusterClient } from './cluster-client.js';
import { MAX_SHADOWS, shadowName } from './shadow-names.js';

/** Free slots after which the search ends: slots are used from the first on. */
const MAX_FREE_SLOTS = 2;

/** All shadows of a disk, in use or not. */
export async function shadowInodesOf(cluster: ClusterClient, name: string): Promise<Inode[]> {
  const inodes: Inode[] = [];
  for (let slot = 0, free = 0; slot < MAX_SHADOWS && free < MAX_FREE_SLOTS; slot++) {
    const inode = await findShadow(cluster, shadowName(name, slot));
    if (inode) inodes.push(inode);
    else free++;
  }
  return inodes;
}

export async function findShadow(cluster: ClusterClient, name: string): Promise<Inode | undefined> {
  // A live shadow looks like a snapshot, and nodes find snapshots by their id only.
  const vid = (await cluster.lookup(name)) || (await cluster.lookup(name, 1));
  if (vid === 0) return undefined;
  const inode = await cluster.readInode(vid);
  return inode.name === name ? inode : undefined;
}
