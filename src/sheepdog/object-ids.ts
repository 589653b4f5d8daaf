/**
 * Ids of objects. An oid has 64 bits; here it is two halves of 32, `high` and `low`: a bigint per request would cost more than
 * the request. Of a data object `high` is the vid of its owner and `low` its index (idx) in the disk. Owns the bits of an oid,
 * and the number that stands for one in maps.
 */
import { MAX_HYPER_OBJECTS } from './protocol.js';

/** SD_NR_VDIS - 1: a vid has 24 bits. In the local store, too. */
export const MAX_VID = 2 ** 24 - 1;
/** VDI_BIT (VDI_SPACE_SHIFT): an inode. `low` is 0. */
const VDI_BIT_HIGH = 0x8000_0000;
/** VDI_BTREE_BIT: a leaf of the index of a hyper volume. `low` is a number that the inode counts (vid_to_btree_oid). */
const BTREE_BIT_HIGH = 0x1000_0000;

/** `high` of the inode of a VDI; `low` is 0. */
export function inodeHigh(vid: number): number {
  return (VDI_BIT_HIGH | vid) >>> 0;
}

/** `high` of the leaves of a hyper volume. */
export function leafHigh(vid: number): number {
  return (BTREE_BIT_HIGH | vid) >>> 0;
}

/** The vid in `high` of any object. */
export function vidOf(high: number): number {
  return high & MAX_VID;
}

/** 16 hex digits, as `dog` writes an oid. */
export function oidText(high: number, low: number): string {
  return high.toString(16).padStart(8, '0') + low.toString(16).padStart(8, '0');
}

/**
 * One number for the data object (vid, idx), for maps on the data path: 24 bits (25 with indexPartKey) and 26 bits. Another
 * number than localObjectKey (src/store/local).
 */
export function oidKey(vid: number, idx: number): number {
  return vid * MAX_HYPER_OBJECTS + idx;
}

/** The same for a part of the index of a hyper volume, apart from those of data objects. */
export function indexPartKey(vid: number, part: number): number {
  return oidKey(MAX_VID + 1 + vid, part);
}
