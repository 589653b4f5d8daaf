/**
 * A table of the pages of a sparse disk, by their number: nothing is held for pages that are not there, and long ranges without
 * pages, or full of them, are passed over quickly. It owns the table; what a page is, and what its absence means, the user knows.
 */

/** Pages of a directory. A range of pages is walked directory by directory. */
const DIRECTORY_PAGES = 1024;
/** A directory is an array of arrays of so many pages: one page alone costs some hundred bytes, and not as many as itself. */
const GROUP_PAGES = 32;

type Group<Page> = (Page | undefined)[];

interface Directory<Page> {
  readonly groups: (Group<Page> | undefined)[];
  count: number;
}

export class PageTable<Page extends object> {
  readonly #directories = new Map<number, Directory<Page>>();
  /** The keys of #directories, ascending. */
  readonly #order: number[] = [];
  #count = 0;

  /** How many pages there are. */
  get count(): number {
    return this.#count;
  }

  get(index: number): Page | undefined {
    const directory = this.#directories.get(Math.floor(index / DIRECTORY_PAGES));
    return directory && pageAt(directory, index % DIRECTORY_PAGES);
  }

  set(index: number, page: Page): void {
    const key = Math.floor(index / DIRECTORY_PAGES);
    let directory = this.#directories.get(key);
    if (directory === undefined) {
      directory = { groups: new Array<undefined>(DIRECTORY_PAGES / GROUP_PAGES).fill(undefined), count: 0 };
      this.#directories.set(key, directory);
      this.#order.splice(this.#positionOf(key), 0, key);
    }
    const at = Math.floor((index % DIRECTORY_PAGES) / GROUP_PAGES);
    const group = (directory.groups[at] ??= new Array<Page | undefined>(GROUP_PAGES).fill(undefined));
    if (group[index % GROUP_PAGES] === undefined) {
      directory.count++;
      this.#count++;
    }
    group[index % GROUP_PAGES] = page;
  }

  /** Remove the pages of [from, to). */
  deleteRange(from: number, to: number): void {
    if (from >= to) return;
    const order = this.#order;
    const lastKey = Math.floor((to - 1) / DIRECTORY_PAGES);
    const first = this.#positionOf(Math.floor(from / DIRECTORY_PAGES));
    let kept = first;
    let at = first;
    for (; at < order.length; at++) {
      const key = order[at] as number;
      if (key > lastKey) break;
      const directory = this.#directories.get(key) as Directory<Page>;
      this.#count -= clear(directory, from - key * DIRECTORY_PAGES, to - key * DIRECTORY_PAGES);
      if (directory.count === 0) this.#directories.delete(key);
      else order[kept++] = key;
    }
    order.splice(kept, at - kept);
  }

  /** The first page that is there in [from, to), or `to`. */
  firstPresent(from: number, to: number): number {
    for (let at = this.#positionOf(Math.floor(from / DIRECTORY_PAGES)); at < this.#order.length; at++) {
      const key = this.#order[at] as number;
      const base = key * DIRECTORY_PAGES;
      if (base >= to) return to;
      const groups = this.#directories.get(key)?.groups ?? [];
      const end = Math.min(to - base, DIRECTORY_PAGES);
      for (let index = Math.max(0, from - base); index < end;) {
        const group = groups[Math.floor(index / GROUP_PAGES)];
        const next = index - (index % GROUP_PAGES) + GROUP_PAGES;
        if (group !== undefined) {
          for (const last = Math.min(end, next); index < last; index++) {
            if (group[index % GROUP_PAGES] !== undefined) return base + index;
          }
        }
        index = next;
      }
    }
    return to;
  }

  /** The first page that is not there in [from, to), or `to`. */
  firstAbsent(from: number, to: number): number {
    let at = from;
    while (at < to) {
      const key = Math.floor(at / DIRECTORY_PAGES);
      const directory = this.#directories.get(key);
      if (directory === undefined) return at;
      const next = Math.min(to, (key + 1) * DIRECTORY_PAGES);
      if (directory.count < DIRECTORY_PAGES) {
        for (; at < next; at++) if (pageAt(directory, at % DIRECTORY_PAGES) === undefined) return at;
      }
      at = next;
    }
    return to;
  }

  /** Where `key` is in #order, or would be. */
  #positionOf(key: number): number {
    let low = 0;
    let high = this.#order.length;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if ((this.#order[middle] as number) < key) low = middle + 1;
      else high = middle;
    }
    return low;
  }
}

function pageAt<Page>(directory: Directory<Page>, index: number): Page | undefined {
  return directory.groups[Math.floor(index / GROUP_PAGES)]?.[index % GROUP_PAGES];
}

/** Remove the pages of [from, to) of a directory; how many they were. */
function clear(directory: Directory<object>, from: number, to: number): number {
  const before = directory.count;
  if (from <= 0 && to >= DIRECTORY_PAGES) {
    // The directory itself is dropped.
    directory.count = 0;
    return before;
  }
  const end = Math.min(to, DIRECTORY_PAGES);
  for (let index = Math.max(0, from); index < end;) {
    const start = index - (index % GROUP_PAGES);
    const at = start / GROUP_PAGES;
    const next = start + GROUP_PAGES;
    const group = directory.groups[at];
    // What is empty as a whole is dropped, too.
    if (index === start && next <= end) directory.groups[at] = undefined;
    for (const last = Math.min(end, next); index < last; index++) {
      if (group?.[index % GROUP_PAGES] === undefined) continue;
      group[index % GROUP_PAGES] = undefined;
      directory.count--;
    }
  }
  return before - directory.count;
}
