/**
 * Which VDI a request by name hits. NEW_VDI, DEL_VDI and LOCK_VDI carry a name, and nodes look for it among the inodes
 * (sheep/vdi.c, vdi_lookup). On a cluster that reuses vids (format -R) the nodes may find a wrong VDI: a working VDI may have a
 * lower vid than a snapshot of it, and two snapshots may have the same id. Owns the checks before and after such a request, so
 * that no other VDI is ever hit.
 */
import { StoreError } from '../store-error.js';
import type { ClusterClient } from './cluster-client.js';
import { goneIsNone, isSameVdi } from './deleted-vdi.js';
import { INODE_FORMER_NAME_OFFSET, ownName } from '../../sheepdog/own-name.js';
import { encodeName } from '../../sheepdog/text-fields.js';
import { type Inode, INODE_NAME_OFFSET } from '../../sheepdog/inode.js';

/** Errors: LOCKED (another client has it), MOVED (another client is taking a snapshot), IO (the nodes find another VDI). */
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
  // If it has become a snapshot, it must not get a name of its own.
  if (!(await isUnchanged(cluster, inode))) {
    throw new StoreError('MOVED', `${inode.name} was snapshotted by somebody else at this moment; try again`);
  }
  await underOwnName(cluster, inode, lock);
}

/** Name of a VDI that is being deleted and that the nodes do not find by its own name. */
const DELETED_PREFIX = 'sheepgate-deleted-';

/** Whether the nodes find `inode` by its name, and its id if it is a snapshot. */
export async function isFoundByName(
  cluster: ClusterClient,
  { vid, name, isSnapshot, snapId }: Inode,
): Promise<boolean> {
  return (await cluster.lookup(name, isSnapshot ? snapId : 0)) === vid;
}

/**
 * Whether the inode on the nodes is as `inode` says. A snapshot in progress delays the answer to a look-up, so call this after a
 * look-up: only then is the answer certain.
 */
export async function isUnchanged(cluster: ClusterClient, { vid, name, isSnapshot, snapId }: Inode): Promise<boolean> {
  const now = await cluster.readInode(vid);
  return now.name === name && now.isSnapshot === isSnapshot && now.snapId === snapId;
}

/**
 * Whether the nodes find this working VDI by its name. If not, and the cluster reuses vids, use `underOwnName`. `done`: what is
 * about to be done to it, for messages ("snapshotted"). Errors: IO (another client is taking a snapshot, or the nodes find
 * another VDI); nothing was done then.
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
      `another client is taking a snapshot of ${name} at this moment; nothing was done, try again`,
    );
  }
  if (recyclesVids) return false;
  throw hitsAnother(inode, found, done);
}

/**
 * Makes a request by name while the VDI has a name that no other VDI has. The VDI that the request makes gets the right name
 * afterwards. The real name is in the inode meanwhile: if this process ends midway, readInode still finds both by that name.
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
 * Call before the table is cleared. Where vids are reused and the nodes do not find the VDI by its name, gives it a name by
 * which they do; the name says that it is being deleted, in case this process ends midway. Errors: IO (another client is
 * changing it, or the nodes find another VDI); nothing was deleted then.
 */
export async function nameToDelete(cluster: ClusterClient, inode: Inode, recyclesVids: boolean): Promise<Inode> {
  if (await isFoundByName(cluster, inode)) return inode;
  if (!(await isUnchanged(cluster, inode))) {
    throw new StoreError(
      'IO',
      `another client is changing ${inode.name} at this moment; nothing was deleted, try again`,
    );
  }
  const name = `${DELETED_PREFIX}${inode.vid.toString(16)}`;
  // Elsewhere the vid follows from the name: nodes could not find this vid under any other name.
  if (!recyclesVids) throw hitsAnother(inode, await cluster.lookup(inode.name), 'deleted');
  await writeName(cluster, inode.vid, name);
  const renamed = { ...inode, name };
  if (await isFoundByName(cluster, renamed)) return renamed;
  await writeName(cluster, inode.vid, inode.name);
  throw hitsAnother(inode, await cluster.lookup(inode.name), 'deleted');
}

/**
 * Deletes the inode of a VDI whose table is clear. False if the nodes have kept it, because another client has made objects in it
 * since. Errors: IO (another client has changed it, or the nodes have deleted another VDI).
 */
export async function deleteByName(cluster: ClusterClient, inode: Inode): Promise<boolean> {
  const { vid, name, isSnapshot, snapId } = inode;
  // Clearing its table took time: another client may have taken a snapshot since.
  if (!(await isFoundByName(cluster, inode))) {
    throw new StoreError('IO', `${name} (id ${vid.toString(16)}) was changed by another client while it was deleted`);
  }
  const deleted = await cluster.deleteVdi(name, isSnapshot ? snapId : 0);
  if (deleted === vid || deleted === 0) {
    // Nodes report success even if they have kept it.
    const left = await cluster.readInode(vid).catch(goneIsNone);
    return left === undefined || !isSameVdi(left, inode);
  }
  throw new StoreError(
    'IO',
    `${name} (id ${vid.toString(16)}) was changed by another client while it was deleted: the nodes have deleted the ` +
      `id ${deleted.toString(16)} in its place`,
  );
}

function writeName(cluster: ClusterClient, vid: number, name: string): Promise<void> {
  return cluster.writeInodeBytes(vid, INODE_NAME_OFFSET, encodeName(name));
}

function hitsAnother({ vid, name }: Inode, found: number, done: string): StoreError {
  const instead = found === 0 ? 'nothing' : `the id ${found.toString(16)}`;
  return new StoreError(
    'IO',
    `${name} (id ${vid.toString(16)}) cannot be ${done}, and nothing was done: under this name the nodes find ${instead}; ` +
      "'sheepgate vdi list' shows all ids",
  );
}
