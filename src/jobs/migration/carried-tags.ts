/**
 * The tags of migrated snapshots in the target. A tag that the target cannot have is no reason to lose the snapshot: either the
 * migration is refused with a list of all such tags before it begins, or each snapshot gets a tag that contains its ID. Owns
 * these tags, which are the same in every run.
 */
import { OperationError, type VdiRecord } from '../../operations/operations.js';
import { checkTag, specOf } from '../../vdi/names.js';

/** Of a renamed tag, without the ID at its end. */
const MAX_STEM_BYTES = 200;
/** Sheepdog's tools take such a tag for an id. */
const NUMBER = /^\d+$/;
const NOT_PLAIN = /[^\p{L}\p{N}_.+-]/gu;
/** Snapshots that a message names. */
const MAX_NAMED = 20;

export interface Target {
  readonly place: string;
  readonly takesNumbersForIds: boolean;
  readonly renamesTags: boolean;
}

/** By the vid of the snapshot in the source. Errors: BAD_NAME (with the list of tags that the target cannot have). */
export function carriedTags(snapshots: readonly VdiRecord[], target: Target): ReadonlyMap<number, string> {
  const count = new Map<string, number>();
  for (const { tag } of snapshots) count.set(tag, (count.get(tag) ?? 0) + 1);
  const tags = new Map<number, string>();
  const refused: string[] = [];
  for (const snapshot of snapshots) {
    const { vid, tag } = snapshot;
    const why = count.get(tag) === 1 ? whyNot(tag, target) : 'more than one has this tag';
    tags.set(vid, why === undefined ? tag : renamed(snapshot));
    if (why !== undefined) refused.push(`${specOf(snapshot)} (tag ${JSON.stringify(tag)}: ${why})`);
  }
  if (refused.length === 0 || target.renamesTags) return tags;
  const more = refused.length > MAX_NAMED ? `, and ${refused.length - MAX_NAMED} more` : '';
  throw new OperationError(
    'BAD_NAME',
    `nothing was begun: ${target.place} does not allow the tags of these snapshots: ${refused.slice(0, MAX_NAMED).join(', ')}${more}; ` +
      'with --rename-tags each of them gets a tag that contains its ID',
  );
}

function whyNot(tag: string, { takesNumbersForIds }: Target): string | undefined {
  if (takesNumbersForIds && NUMBER.test(tag)) return 'in a cluster a number is an id';
  try {
    checkTag(tag);
    return undefined;
  } catch {
    return 'not allowed here';
  }
}

/** "x_y.id-2d6333" for the tag "x/y". */
function renamed({ vid, tag }: VdiRecord): string {
  let stem = tag.replaceAll(NOT_PLAIN, '_').replace(/^\./, '_');
  while (Buffer.byteLength(stem) > MAX_STEM_BYTES) stem = Array.from(stem).slice(0, -1).join('');
  return checkTag(`${stem}.id-${vid.toString(16)}`);
}
