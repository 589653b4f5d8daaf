/**
 * Marks of unfinished VDIs that a cut-off snapshot or rollback has left on snapshots, in place of their tags. Such a mark
 * belongs to the working VDI of the same name.
 */
import type { Inode } from '../../sheepdog/inode.js';
import type { Unfinished, VdiRecord } from '../vdi-record.js';
import { parseUnfinishedTag } from './unfinished-tag.js';

export function isLeftMark({ isSnapshot, tag }: Inode): boolean {
  return isSnapshot && parseUnfinishedTag(tag) !== undefined;
}

/** By name: marks on snapshots that belong to the working VDI. */
export function leftMarks(inodes: readonly Inode[]): ReadonlyMap<string, Unfinished> {
  const marks = new Map<string, Unfinished>();
  for (const inode of inodes) {
    const unfinished = inode.isSnapshot ? parseUnfinishedTag(inode.tag) : undefined;
    if (unfinished) marks.set(inode.name, unfinished);
  }
  return marks;
}

export function withMark(record: VdiRecord, marks: ReadonlyMap<string, Unfinished>): VdiRecord {
  const unfinished = record.isSnapshot ? undefined : (record.unfinished ?? marks.get(record.name));
  return unfinished ? { ...record, unfinished } : record;
}
