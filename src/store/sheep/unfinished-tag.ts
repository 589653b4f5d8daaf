/**
 * The mark of an unfinished VDI in a cluster: text in the tag of its inode. The field is free in a working VDI: nodes compare
 * the tags of snapshots only (sheep/vdi.c, fill_vdi_info_range) and give a new working VDI an empty one; `dog vdi list` prints
 * it. Owns the text; sheep-catalog.ts decides when it is written.
 */
import { FILLERS, type Unfinished } from '../vdi-record.js';

const PREFIX = 'sheepgate-unfinished';
const MARK = new RegExp(`^${PREFIX}:(${FILLERS.join('|')}):([0-9a-f]{0,64}):([0-9a-f]{1,32}):(\\d{1,15}):(new|old)$`);

/** At most 150 bytes, of the 255 that a tag has. */
export function unfinishedTag({ by, of, run, since, isNew }: Unfinished): string {
  const tag = [PREFIX, by, of, run, since, isNew ? 'new' : 'old'].join(':');
  if (!MARK.test(tag)) throw new Error(`invariant: "${tag}" is no mark of an unfinished VDI`);
  return tag;
}

/** The mark; undefined if the tag is no mark. */
export function parseUnfinishedTag(tag: string): Unfinished | undefined {
  const match = MARK.exec(tag);
  if (!match) return undefined;
  const [, by, of, run, since, origin] = match;
  return { by: by as Unfinished['by'], of: of ?? '', run: run ?? '', since: Number(since), isNew: origin === 'new' };
}
