/**
 * How many maps refer to each data object. Not stored: counted from the maps when the store opens. A reference that a VDI has
 * given up in memory counts until the VDI's map is durable, because after a crash the old map is valid again. So a count of 1
 * means exclusive: the object may be overwritten in place.
 */
import { MAX_VID } from '../../sheepdog/object-ids.js';
import { MAX_DATA_OBJECTS } from '../vdi-record.js';

/** (vid, idx) as one number, exact: 24 + 20 bits. Another number than oidKey, which leaves room for a hyper volume's idx. */
export function localObjectKey(vid: number, idx: number): number {
  return vid * MAX_DATA_OBJECTS + idx;
}

export function vidOf(key: number): number {
  return Math.floor(key / MAX_DATA_OBJECTS);
}

export function idxOf(key: number): number {
  return key % MAX_DATA_OBJECTS;
}

/**
 * Counts are in pages of this many objects, so that memory is used only for parts of a disk that have objects. Small: after many
 * snapshots, each vid has only a few objects in many parts.
 */
const PAGE_SHIFT = 8;
const PAGE_OBJECTS = 2 ** PAGE_SHIFT;
/** One byte each; four once a count of the page is higher than this. */
const MAX_SMALL = 0xff;

type Page = Uint8Array | Uint32Array;
type Pages = Map<number, Page>;

export class ReferenceCounts {
  readonly #pages = new Map<number, Pages>();
  readonly #objects = new Map<number, number>(); // vid -> its objects with a count above 0
  /** The page that was asked for last. */
  #lastVid = -1;
  #lastNumber = -1;
  #last: Page | undefined;

  of(vid: number, idx: number): number {
    return this.#page(vid, idx)?.[idx & (PAGE_OBJECTS - 1)] ?? 0;
  }

  add(vid: number, idx: number): void {
    let page = this.#page(vid, idx) ?? this.#grow(vid, idx);
    const at = idx & (PAGE_OBJECTS - 1);
    const before = page[at] as number;
    if (before === MAX_SMALL && page instanceof Uint8Array) page = this.#put(vid, idx, Uint32Array.from(page));
    page[at] = before + 1;
    if (before === 0) this.#objects.set(vid, (this.#objects.get(vid) ?? 0) + 1);
  }

  /** Returns the new count. */
  drop(vid: number, idx: number): number {
    const page = this.#page(vid, idx);
    const at = idx & (PAGE_OBJECTS - 1);
    const before = page?.[at] ?? 0;
    if (page === undefined || before === 0) {
      throw new Error(`invariant: object (${vid}, ${idx}) lost a reference it did not have`);
    }
    page[at] = before - 1;
    if (before === 1) {
      const left = (this.#objects.get(vid) ?? 1) - 1;
      if (left > 0) this.#objects.set(vid, left);
      else {
        this.#objects.delete(vid);
        this.#pages.delete(vid);
        this.#lastVid = -1;
      }
    }
    return before - 1;
  }

  /** Count the entries [from, to) of a map. */
  addAll(map: Uint32Array, from = 0, to = map.length): void {
    for (let idx = from; idx < to; idx++) {
      const owner = map[idx] as number;
      if (owner !== 0) this.add(owner, idx);
    }
  }

  /** Whether a map refers to an object of this vid: a new VDI must not get the vid then. */
  uses(vid: number): boolean {
    return this.#objects.has(vid);
  }

  get highestVid(): number {
    let highest = 0;
    for (const vid of this.#objects.keys()) highest = Math.max(highest, vid);
    return highest;
  }

  *keys(): Generator<number> {
    for (const [vid, pages] of this.#pages) {
      for (const [number, page] of pages) {
        for (let at = 0; at < PAGE_OBJECTS; at++) {
          if (page[at] !== 0) yield localObjectKey(vid, number * PAGE_OBJECTS + at);
        }
      }
    }
  }

  #page(vid: number, idx: number): Page | undefined {
    const number = idx >>> PAGE_SHIFT;
    if (vid !== this.#lastVid || number !== this.#lastNumber) {
      this.#lastVid = vid;
      this.#lastNumber = number;
      this.#last = this.#pages.get(vid)?.get(number);
    }
    return this.#last;
  }

  #grow(vid: number, idx: number): Page {
    if (vid <= 0 || vid > MAX_VID) throw new Error(`invariant: vid ${vid} out of range`);
    return this.#put(vid, idx, new Uint8Array(PAGE_OBJECTS));
  }

  #put(vid: number, idx: number, page: Page): Page {
    let pages = this.#pages.get(vid);
    if (!pages) this.#pages.set(vid, (pages = new Map<number, Page>()));
    pages.set(idx >>> PAGE_SHIFT, page);
    this.#lastVid = -1;
    return page;
  }
}
