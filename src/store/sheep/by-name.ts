/**
 * What NEW_VDI and DEL_VDI hit. They are told a name, and nodes look for it among the inodes (sheep/vdi.c, vdi_lookup): on a
 * cluster that uses vids again (format -R) a working VDI may have a lower vid than a snapshot of it, which they then take for
 * it, and two snapshots may have one id. Owns that nothing is asked for by a name under which the nodes find anything else.
 */
import { StoreError } from '../object-store.js';
import type { ClusterClient } from './cluster-client.js';
import { goneIsNone, isSameVdi } from './deleted-vdi.js';
import { INODE_FORMER_NAME_OFFSET, ownName } from '../../sheepdog/own-name.js';
import { encodeName } from '../../sheepdog/text-fields.js';
import { type Inode, INODE_NAME_OFFSET } from '../../sheepdog/inode.js';

/** Errors: LOCKED; MOVED if somebody else takes a snapshot at this moment; IO if the nodes would lock another VDI. */
export async function lockByName(cluster: ClusterClient, inode: Inode, recyclesVids: boolean): Promise<void> {
  const lock = async (name: string): Promise<number> => {
    const locked = await cluster.lock(name, inode.name);
    if (locked === inode.vid) return locked;
    await cluster.release(locked);
    if (await isUnchanged(cluster, inode)) throw hitsAnother(inode, locked, 'locked');
    throw new StoreError('MOVED', `${inode.name} was snapshotted by somebody else at this moment; try again`);
  };
  if (!recyclesVids || (await isFoundByName(cluster, inode))) {
    await lock(inode.name);
    return;
  }
  // A snapshot has no place under a name of its own.
  if (!(await isUnchanged(cluster, inode))) {
    throw new StoreError('MOVED', `${inode.name} was snapshotted by somebody else at this moment; try again`);
  }
  await underOwnName(cluster, inode, lock);
}

/** Of what is being deleted and has no name that the nodes find it by. */
const DELETED_PREFIX = 'sheepgate-deleted-';

/** Whether the nodes find `inode` where they look for its name, and for its id if it is a snapshot. */
export async function isFoundByName(
  cluster: ClusterClient,
  { vid, name, isSnapshot, snapId }: Inode,
): Promise<boolean> {
  return (await cluster.lookup(name, isSnapshot ? snapId : 0)) === vid;
}

/**
 * Whether it still is what we know it as. Nodes answer a look-up when they are through with the snapshot that somebody else
 * takes, so only what is asked after one is certain.
 */
export async function isUnchanged(cluster: ClusterClient, { vid, name, isSnapshot, snapId }: Inode): Promise<boolean> {
  const now = await cluster.readInode(vid);
  return now.name === name && now.isSnapshot === isSnapshot && now.snapId === snapId;
}

/**
 * A working VDI is about to be `done`: whether the nodes find it by its name. If not, and vids are used again, it can be
 * asked for `underOwnName`. Errors: IO, when nothing has been done.
 */
export async function mayGoByName(
  cluster: ClusterClient,
  inode: Inode,
  recyclesVids: boolean,
  done: string,
): Promise<boolean> {
  const { vid, name } = inode;
  const found = await cluster.lookup(name);
  const isReadOnly = await cluster.isReadOnly(vid, 0);
  if (found === vid && !isReadOnly) return true;
  if (found === vid || isReadOnly || !(await isUnchanged(cluster, inode))) {
    throw new StoreError(
      'IO',
      `somebody else is taking a snapshot of ${name} at this moment; nothing was done, try again`,
    );
  }
  if (recyclesVids) return false;
  throw hitsAnother(inode, found, done);
}

/**
 * Make a request that goes by name under one that only this VDI has; the VDI that it answers with gets the right name, too.
 * Wherever this ends, both are found here by the name of before.
 */
export async function underOwnName(
  cluster: ClusterClient,
  { vid, name }: Inode,
  request: (name: string) => Promise<number>,
): Promise<number> {
  const own = ownName(vid);
  await cluster.writeInodeBytes(vid, INODE_FORMER_NAME_OFFSET, encodeName(name));
  try {
    await writeName(cluster, vid, own);
    const made = await request(own);
    if (made !== vid) await writeName(cluster, made, name);
    return made;
  } finally {
    await writeName(cluster, vid, name);
  }
}

/**
 * Give what is to be deleted a name that the nodes find it by, where vids are used again; it says what became of it, should
 * this end here. Before its table is cleared. Errors: IO, when nothing has been done.
 */
export async function nameToDelete(cluster: ClusterClient, inode: Inode, recyclesVids: boolean): Promise<Inode> {
  if (await isFoundByName(cluster, inode)) return inode;
  if (!(await isUnchanged(cluster, inode))) {
    throw new StoreError(
      'IO',
      `somebody else is changing ${inode.name} at this moment; nothing was deleted, try again`,
    );
  }
  const name = `${DELETED_PREFIX}${inode.vid.toString(16)}`;
  // Other clusters have a place for each name, and this one is nowhere near it.
  if (!recyclesVids) throw hitsAnother(inode, await cluster.lookup(inode.name), 'deleted');
  await writeName(cluster, inode.vid, name);
  const renamed = { ...inode, name };
  if (await isFoundByName(cluster, renamed)) return renamed;
  await writeName(cluster, inode.vid, inode.name);
  throw hitsAnother(inode, await cluster.lookup(inode.name), 'deleted');
}

/**
 * The record, whose table is clear. False if the nodes have kept it: somebody else has made objects in it meanwhile. Errors: IO
 * if something else is gone then.
 */
export async function deleteByName(cluster: ClusterClient, inode: Inode): Promise<boolean> {
  const { vid, name, isSnapshot, snapId } = inode;
  // Its objects were given up meanwhile: somebody else may have taken a snapshot.
  if (!(await isFoundByName(cluster, inode))) {
    throw new StoreError('IO', `${name} (id ${vid.toString(16)}) was changed by somebody else while it was deleted`);
  }
  const deleted = await cluster.deleteVdi(name, isSnapshot ? snapId : 0);
  if (deleted === vid || deleted === 0) {
    // Nodes answer that it is deleted whether it is or not.
    const left = await cluster.readInode(vid).catch(goneIsNone);
    return left === undefined || !isSameVdi(left, inode);
  }
  throw new StoreError(
    'IO',
    `${name} (id ${vid.toString(16)}) was changed by somebody else while it was deleted: the nodes have taken ` +
      `${deleted.toString(16)} for it`,
  );
}

function writeName(cluster: ClusterClient, vid: number, name: string): Promise<void> {
  return cluster.writeInodeBytes(vid, INODE_NAME_OFFSET, encodeName(name));
}

function hitsAnother({ vid, name }: Inode, found: number, done: string): StoreError {
  const instead = found === 0 ? 'nothing' : `the id ${found.toString(16)}`;
  return new StoreError(
    'IO',
    `${name} cannot be ${done}, and nothing was done: the nodes find ${instead} under this name and not it, which has the id ` +
      `${vid.toString(16)}; 'vdi list' shows what has which`,
  );
}
