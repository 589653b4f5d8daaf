/**
 * The names of the meta contexts that report what may have changed since a snapshot. Owns these names and the tag in them, and
 * how many are listed. The changes themselves come from src/vdi.
 */

/** `sheepgate:changed:TAG`: bit 0 is set where the export may differ from the snapshot TAG. */
const CHANGED_CONTEXT_PREFIX = 'sheepgate:changed:';
/** The same for tools that know qemu's dirty bitmaps (qemu, docs/interop/nbd.rst): bit 0 is "dirty". */
const DIRTY_BITMAP_PREFIX = 'qemu:dirty-bitmap:';
/**
 * How many snapshots' contexts are listed, the newest first. A client that lists gets two messages for each. A client that asks
 * for a context by its name gets it, however many snapshots there are.
 */
export const MAX_LISTED_BASES = 256;

/** Both names of the changes since TAG. */
export function changedContexts(tag: string): readonly string[] {
  return [CHANGED_CONTEXT_PREFIX + tag, DIRTY_BITMAP_PREFIX + tag];
}

/** The tag in the name of such a context; undefined for other names, and for a prefix alone, which is a query. */
export function baseOfContext(context: string): string | undefined {
  for (const prefix of [CHANGED_CONTEXT_PREFIX, DIRTY_BITMAP_PREFIX]) {
    if (context.startsWith(prefix) && context.length > prefix.length) return context.slice(prefix.length);
  }
  return undefined;
}

/** Whether the name of a context, which is text, may have the tag. All of ours may; other tools make tags that cannot be printed. */
export function isContextTag(tag: string): boolean {
  return tag !== '' && tag.isWellFormed() && !/[\p{Cc}\p{Zl}\p{Zp}]/u.test(tag);
}

/** Those of `tags`, newest first, whose contexts are described to a client that `asked` for these contexts. */
export function toldBases(tags: readonly string[], asked: readonly string[]): readonly string[] {
  if (tags.length <= MAX_LISTED_BASES) return tags;
  const wanted = new Set(asked.map(baseOfContext));
  return tags.filter((tag, index) => index < MAX_LISTED_BASES || wanted.has(tag));
}
