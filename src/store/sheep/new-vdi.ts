/** Makes VDIs (NEW_VDI). Checks that the nodes have made what was requested, also when their answer was lost. */
import type { Inode } from '../../sheepdog/inode.js';
import { StoreError } from '../store-error.js';
import { underOwnName } from './by-name.js';
import type { ClusterClient } from './cluster-client.js';

/** Makes the working VDI a snapshot, and a new working VDI that reads as `base`; its vid. Errors: as makeVdi. */
export async function replaceWorking(
  cluster: ClusterClient,
  working: Inode,
  base: Inode,
  goesByName: boolean,
): Promise<number> {
  const request = (name: string): Promise<number> =>
    makeVdi(cluster, { ...base, name: working.name }, base.vid, true, working.vid, name);
  return goesByName ? request(working.name) : underOwnName(cluster, working, request);
}

/**
 * The vid of the new VDI. The request cannot be repeated blindly: if its answer is lost, the name is looked up. `asName`: the
 * name in the request (by-name.ts). Errors: NO_SPACE, LIMIT, DAMAGED, IO (also: the nodes have answered with another VDI).
 */
export async function makeVdi(
  cluster: ClusterClient,
  like: Pick<Inode, 'name' | 'size' | 'copies' | 'copyPolicy' | 'blockSizeShift'>,
  baseVid: number,
  replacesWorking: boolean,
  replacedVid = baseVid,
  asName = like.name,
): Promise<number> {
  const { name, size, copies, copyPolicy, blockSizeShift } = like;
  const before = replacesWorking ? replacedVid : 0;
  try {
    const request = { name: asName, size, copies, copyPolicy, blockSizeShift, baseVid, replacesWorking };
    const vid = await cluster.newVdi(request);
    return await mustBeNew(cluster, vid, name, baseVid);
  } catch (error) {
    const vid = await cluster.lookup(asName).catch(() => 0);
    if (vid === 0 || vid === before) throw error;
    const inode = await cluster.readInode(vid);
    if (inode.isSnapshot || inode.name !== name || inode.parentVid !== baseVid) throw error;
    return vid;
  }
}

async function mustBeNew(cluster: ClusterClient, vid: number, name: string, baseVid: number): Promise<number> {
  const made = await cluster.readInode(vid);
  if (made.name === name && made.parentVid === baseVid) return vid;
  throw new StoreError('IO', `the nodes say that ${name} has the id ${vid.toString(16)} now, which is another VDI`);
}
