/** Labels of VDIs and snapshots for messages, and which names and tags are ambiguous. */
import { inOrder, type VdiRecord } from '../vdi-record.js';
import { isShadow } from './shadow-names.js';
import type { Inode } from '../../sheepdog/inode.js';
import { recordOf } from './vdi-record.js';

/** `dog` takes such a tag for a snapshot id. */
export const NUMBER = /^\s*[+-]?\d+$/;

/**
 * Marks each snapshot whose tag may also mean another snapshot of the same name: other tools can give a tag twice, or give a tag
 * that is the id of another snapshot. `records` must be in the order of names.
 */
export function markDoubtful(records: VdiRecord[]): void {
  for (let from = 0, to; from < records.length; from = to) {
    const { name } = records[from] as VdiRecord;
    for (to = from; records[to]?.name === name;) to++;
    if (to - from < 2) continue;
    const snapshots = records.slice(from, to).filter(({ isSnapshot, isTemporary }) => isSnapshot && !isTemporary);
    const said = new Map<string, number>();
    const say = (what: string): unknown => said.set(what, (said.get(what) ?? 0) + 1);
    for (const { tag, snapId } of snapshots) {
      say(tag);
      // A snapshot without a tag is named by its id.
      if (tag !== String(snapId)) say(String(snapId));
    }
    for (let n = from; n < to; n++) {
      const record = records[n] as VdiRecord;
      const { tag, isSnapshot, isTemporary } = record;
      if (!isSnapshot || isTemporary) continue;
      const reading = NUMBER.test(tag) ? String(Number(tag)) : tag;
      if ((said.get(tag) ?? 0) > 1 || (reading !== tag && said.has(reading))) {
        records[n] = { ...record, isDoubtful: true };
      }
    }
  }
}

/** By vid, for findings: NAME or NAME@TAG, with the vid where that is ambiguous. */
export function labelsOf(inodes: readonly Inode[]): ReadonlyMap<number, string> {
  const labels = new Map<number, string>();
  for (const { vid } of inodes.filter(isShadow)) labels.set(vid, `the temporary snapshot with vid ${vid.toString(16)}`);
  const records = inodes.filter((inode) => !isShadow(inode)).map(recordOf);
  markDoubtful(records.sort(inOrder));
  for (const { vid, name, tag, isSnapshot, isDoubtful } of records) {
    const label = isSnapshot ? `${name}@${tag}` : name;
    // "a@b" may be a VDI that another tool has made, or a snapshot of "a".
    const isPlain = !isDoubtful && !name.includes('@') && !tag.includes('@');
    labels.set(vid, isPlain ? label : `${label} (@${vid.toString(16)})`);
  }
  return labels;
}
