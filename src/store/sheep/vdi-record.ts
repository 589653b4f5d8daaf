/** The record of a VDI, as stores have it, from an inode. */
import type { Inode } from '../../sheepdog/inode.js';
import { MAX_HYPER_OBJECTS } from '../../sheepdog/protocol.js';
import type { VdiRecord } from '../vdi-record.js';
import { redundancyOf } from './redundancy-of.js';
import { parseUnfinishedTag } from './unfinished-tag.js';

/** A snapshot without a tag gets its id as the tag, as with `dog`. */
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
