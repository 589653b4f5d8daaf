/**
 * VDIs whose inode is lost: no node has it. To look up a name, nodes read the inodes at the vids that the name hashes to, or all
 * inodes (clusters formatted with -R), and fail at the first lost one. Owns a look-up that skips lost inodes, and the guesses
 * about what a lost inode was. Changes nothing.
 */
import type { DamagedVdi } from '../object-store.js';
import { StoreError } from '../store-error.js';
import { isShadowName } from './shadow-names.js';
import type { VidsInUse } from '../../sheepdog/vids-in-use.js';
import type { Inode } from '../../sheepdog/inode.js';
import { inParallel } from '../../system/in-parallel.js';

const PARALLEL_READS = 64;

/** What a look-up needs of a cluster. */
export interface InodeSource {
  readonly recyclesVids: boolean;
  vids(): Promise<VidsInUse>;
  readInode(vid: number): Promise<Inode>;
}

/** The vid of the working VDI of this name, or of its snapshot with this id; 0 if no inode says so. Skips lost inodes. */
export async function lookupAround(cluster: InodeSource, name: string, snapId: number): Promise<number> {
  const vids = await cluster.vids();
  const places = cluster.recyclesVids ? vids.live() : vids.placesOf(name);
  let found = 0;
  await inParallel(PARALLEL_READS, places, async (vid) => {
    const inode = await inodeOrLost(cluster, vid);
    if (inode?.name !== name) return;
    if (snapId === 0 ? !inode.isSnapshot : inode.isSnapshot && inode.snapId === snapId) found = vid;
  });
  return found;
}

/** VDIs and snapshots whose inode is lost. With `name`, at least those that may have that name. */
export async function findLost(cluster: InodeSource, name?: string): Promise<DamagedVdi[]> {
  const vids = await cluster.vids();
  const isAnywhere = name === undefined || cluster.recyclesVids;
  const places = isAnywhere ? vids.live() : vids.placesOf(name);
  const known: Inode[] = [];
  const lost: number[] = [];
  await inParallel(PARALLEL_READS, places, async (vid) => {
    const inode = await inodeOrLost(cluster, vid);
    if (inode) known.push(inode);
    else lost.push(vid);
  });
  if (lost.length === 0) return [];
  // Deleted since, or made this moment.
  const now = await cluster.vids();
  const still: number[] = [];
  await inParallel(PARALLEL_READS, lost, async (vid) => {
    if (now.isLive(vid) && !(await inodeOrLost(cluster, vid))) still.push(vid);
  });
  return describeLost(
    still.sort((a, b) => a - b),
    known,
    now,
    cluster.recyclesVids,
  );
}

/** Undefined if no node has it. Errors: those of readInode, except GONE. */
export async function inodeOrLost(cluster: InodeSource, vid: number): Promise<Inode | undefined> {
  try {
    return await cluster.readInode(vid);
  } catch (error) {
    if ((error as StoreError).code !== 'GONE') throw error;
    return undefined;
  }
}

/**
 * Describes the VDIs with the vids `lost` by what the readable inodes, `known`, tell about them. `recyclesVids`: the cluster
 * reuses vids, so a vid tells nothing about the name.
 */
export function describeLost(
  lost: readonly number[],
  known: readonly Inode[],
  vids: VidsInUse,
  recyclesVids = false,
): DamagedVdi[] {
  const candidates = recyclesVids ? candidatesByFamily(lost, known) : candidatesByPlace(lost, known, vids);
  return lost.map((vid) => {
    const named = candidates.get(vid) ?? [];
    const children = known.filter(({ parentVid }) => parentVid === vid);
    return {
      vid,
      likelyName: named.length === 1 ? named[0] : undefined,
      isSnapshot: children.length > 0 ? true : undefined,
      why: 'no node has its inode',
    };
  });
}

type Candidates = ReadonlyMap<number, readonly string[]>;

function isOfPeople({ name }: Inode): boolean {
  return name !== '' && !isShadowName(name);
}

/** By vid: the names that hash to it. */
function candidatesByPlace(lost: readonly number[], known: readonly Inode[], vids: VidsInUse): Candidates {
  const names = new Set(known.filter(isOfPeople).map(({ name }) => name));
  const candidates = new Map<number, string[]>();
  const isLost = new Set(lost);
  for (const name of names) {
    for (const vid of vids.placesOf(name)) {
      if (isLost.has(vid)) candidates.set(vid, [...(candidates.get(vid) ?? []), name]);
    }
  }
  return candidates;
}

/**
 * By vid: the names of its children. For one without children, the names that have snapshots and no working VDI. Clones do not
 * count as children: a VDI or a clone has the snapshot id 1 until its first snapshot, and what continues after a snapshot a
 * higher id.
 */
function candidatesByFamily(lost: readonly number[], known: readonly Inode[]): Candidates {
  const working = new Set(known.filter(({ isSnapshot }) => !isSnapshot).map(({ name }) => name));
  const headless = new Set(
    known.filter((inode) => isOfPeople(inode) && !working.has(inode.name)).map(({ name }) => name),
  );
  const candidates = new Map<number, readonly string[]>();
  for (const vid of lost) {
    const next = known.filter((inode) => inode.parentVid === vid && inode.snapId > 1 && isOfPeople(inode));
    candidates.set(vid, next.length > 0 ? [...new Set(next.map(({ name }) => name))] : [...headless]);
  }
  return candidates;
}
