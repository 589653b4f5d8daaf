/** An inode as src/vdi knows VDIs. */
import type { Inode } from '../../sheepdog/inode.js';
import { MAX_HYPER_OBJECTS } from '../../sheepdog/protocol.js';
import type { VdiRecord } from '../object-store.js';
import { redundancyOf } from './redundancy-of.js';
import { parseUnfinishedTag } from './unfinished-tag.js';

/** Snapshots may have no tag in a cluster; people give their id then, as with `dog`. */
export function recordOf(inode: Inode): VdiRecord {
  const unfinished = inode.isSnapshot ? undefined : parseUnfinishedTag(inode.tag);
  return {
    vid: inode.vid,
    name: inode.name,
    tag: inode.isSnapshot ? inode.tag || String(inode.snapId) : '',
    isSnapshot: inode.isSnapshot,
    snapId: inode.snapId,
    size: inode.size,
    blockSizeShift: inode.blockSizeShift,
    parentVid: inode.parentVid,
    createdAt: inode.createdAt,
    snapshotAt: inode.snapshotAt,
    redundancy: redundancyOf(inode),
    ...(inode.storePolicy === 0 ? {} : { maxObjects: MAX_HYPER_OBJECTS }),
    ...(unfinished && { unfinished }),
  };
}
