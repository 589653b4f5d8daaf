/** The ranges that a disk reports page by page (data, changes), asked for in ascending order. Holds one page at a time. */
import type { DataPage } from '../operations/operations.js';

/** The bytes [from, to) of a disk. */
export interface Range {
  readonly from: number;
  readonly to: number;
}

export class PagedRanges {
  readonly #page: (offset: number) => Promise<DataPage>;
  #ranges: DataPage['ranges'] = [];
  #at = 0;
  /** The page ends here. */
  #known = 0;

  constructor(page: (offset: number) => Promise<DataPage>) {
    this.#page = page;
  }

  /** Whether any of [offset, offset + length) is in a range. As `within`. */
  async touch(offset: number, length: number): Promise<boolean> {
    return (await this.within(offset, offset + length)) !== undefined;
  }

  /**
   * The smallest range that holds all that is reported within [from, to); undefined if nothing is. To be called in ascending
   * order, and not while an earlier call is under way.
   */
  async within(from: number, to: number): Promise<Range | undefined> {
    let first: number | undefined;
    let last = from;
    for (let begin = from; begin < to;) {
      if (begin >= this.#known) {
        const page = await this.#page(begin);
        this.#ranges = page.ranges;
        this.#at = 0;
        this.#known = page.next ?? Infinity;
      }
      const end = Math.min(to, this.#known);
      for (; this.#at < this.#ranges.length; this.#at++) {
        const { offset, length } = this.#ranges[this.#at] as DataPage['ranges'][number];
        if (offset >= end) break;
        if (offset + length > begin) {
          first ??= Math.max(offset, begin);
          last = Math.min(offset + length, end);
        }
        // It may reach into what is asked for next.
        if (offset + length > end) break;
      }
      begin = end;
    }
    return first === undefined ? undefined : { from: first, to: last };
  }
}
