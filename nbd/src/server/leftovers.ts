/**
 * What exports owe and may never deliver: opens, closes and requests that nobody waits for any more. It owns their number, of
 * each export of an event loop, and how many there may be: an export that never settles must not collect them without limit.
 */

/** Most of one export; while there are so many it is not opened. */
export const MAX_LEFTOVERS_PER_EXPORT = 64;
/** The same for all exports of an event loop together: a client may ask for ever new names. */
export const MAX_LEFTOVERS = 4096;

/** The key of calls of `list`: no name of an export has a NUL. */
export const LISTS = '\0lists';

export class Leftovers {
  readonly #countOf = new Map<string, number>();
  #count = 0;

  /** One more of the export `key` (see ExportInfo.countedAs), or of LISTS. The result is to be called, once, when it has settled. */
  add(key: string): () => void {
    this.#count++;
    this.#countOf.set(key, (this.#countOf.get(key) ?? 0) + 1);
    return () => {
      this.#count--;
      const left = (this.#countOf.get(key) ?? 0) - 1;
      if (left > 0) this.#countOf.set(key, left);
      else this.#countOf.delete(key);
    };
  }

  /** Why the export `key` must not be opened now; undefined: it may be. */
  refusal(key: string): string | undefined {
    const ofExport = this.#countOf.get(key) ?? 0;
    if (ofExport >= MAX_LEFTOVERS_PER_EXPORT) {
      const what = key === LISTS ? 'the list of exports' : `the export ${JSON.stringify(key)}`;
      return `${what} does not answer: ${ofExport} earlier connections still wait for it`;
    }
    if (this.#count >= MAX_LEFTOVERS) {
      return `exports of this server do not answer: ${this.#count} earlier connections still wait for them`;
    }
    return undefined;
  }
}
