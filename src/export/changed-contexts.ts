/**
 * The meta contexts that tell what may have changed since a snapshot, and the tag that is in their names. Owns the names
 * only; what has changed is the VDI's affair.
 */

/** `sheepgate:changed:TAG`: bit 0 is set where the export may differ from the snapshot TAG. */
const CHANGED_CONTEXT_PREFIX = 'sheepgate:changed:';
/** The same for tools that know qemu's dirty bitmaps (qemu, docs/interop/nbd.rst): bit 0 is "dirty". */
const DIRTY_BITMAP_PREFIX = 'qemu:dirty-bitmap:';
/**
 * Snapshots whose contexts are listed, the newest ones. A client that lists gets two messages for each; one that asks
 * for a context by its name gets it however many snapshots there are.
 */
export const MAX_LISTED_BASES = 256;

/** Both names of the changes since TAG. */
export function changedContexts(tag: string): readonly string[] {
  return [CHANGED_CONTEXT_PREFIX + tag, DIRTY_BITMAP_PREFIX + tag];
}

/** The tag in the name of such a context; undefined for others, and for what ends in its colon and lists. */
export function baseOfContext(context: string): string | undefined {
  for (const prefix of [CHANGED_CONTEXT_PREFIX, DIRTY_BITMAP_PREFIX]) {
    if (context.startsWith(prefix) && context.length > prefix.length) return context.slice(prefix.length);
  }
  return undefined;
}

/** Tags that may stand in the name of a context, which is text. Ours may; other tools make some that nobody could print. */
export function isContextTag(tag: string): boolean {
  return tag !== '' && tag.isWellFormed() && !/[\p{Cc}\p{Zl}\p{Zp}]/u.test(tag);
}

/** Which of `tags`, newest first, are told of to a client that asks for these contexts. */
export function toldBases(tags: readonly string[], asked: readonly string[]): readonly string[] {
  if (tags.length <= MAX_LISTED_BASES) return tags;
  const wanted = new Set(asked.map(baseOfContext));
  return tags.filter((tag, index) => index < MAX_LISTED_BASES || wanted.has(tag));
}
