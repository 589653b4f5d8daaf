/** What a disk tells page by page (data, changes), asked from the beginning to the end. Holds one page at a time. */
import type { DataPage } from '../operations/operations.js';

export class PagedRanges {
  readonly #page: (offset: number) => Promise<DataPage>;
  #ranges: DataPage['ranges'] = [];
  #at = 0;
  #next: number | null = 0;

  constructor(page: (offset: number) => Promise<DataPage>) {
    this.#page = page;
  }

  /** Whether any of [offset, offset + length) is told of. Ascending, and not while another answer is waited for. */
  async touch(offset: number, length: number): Promise<boolean> {
    const end = offset + length;
    for (;;) {
      for (; this.#at < this.#ranges.length; this.#at++) {
        const range = this.#ranges[this.#at];
        if (range && range.offset + range.length > offset) return range.offset < end;
      }
      if (this.#next === null || this.#next >= end) return false;
      const page: DataPage = await this.#page(this.#next);
      this.#ranges = page.ranges;
      this.#at = 0;
      this.#next = page.next;
    }
  }
}
