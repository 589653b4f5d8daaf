/** Finds the shadows of a disk among the VDIs of a cluster, by their names. */
import type { Inode } from '../../sheepdog/inode.js';
import type { ClusterClient } from './cluster-client.js';
import { MAX_SHADOWS, shadowName } from './shadow-names.js';

/** Free slots after which no more shadows of a disk are looked for: they are used from the first on. */
const MAX_FREE_SLOTS = 2;

/** All shadows of a disk that the cluster has, in use or not. */
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
  // One that is alive looks like a snapshot, and those are found by their id only.
  const vid = (await cluster.lookup(name)) || (await cluster.lookup(name, 1));
  if (vid === 0) return undefined;
  const inode = await cluster.readInode(vid);
  return inode.name === name ? inode : undefined;
}
