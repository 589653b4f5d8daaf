/** Which bytes of a read have arrived: it finds data that comes twice, and data that never came. */

/** Most separate ranges of one read. Servers send pieces in order, so few are needed. */
const MAX_GAPS = 8192;

/** The bytes of a read that have arrived, as ranges in ascending order that do not touch. */
export class Coverage {
  bytes = 0;
  readonly #starts: number[] = [];
  readonly #ends: number[] = [];

  /** False if the range overlaps one that has arrived, or there are too many gaps. */
  add(start: number, end: number): boolean {
    const starts = this.#starts;
    const ends = this.#ends;
    let low = 0;
    let high = starts.length;
    if (start >= (ends.at(-1) ?? -1)) low = high;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if ((starts[middle] ?? 0) < start) low = middle + 1;
      else high = middle;
    }
    const previousEnd = low > 0 ? ends[low - 1] : undefined;
    const nextStart = starts[low];
    if ((previousEnd ?? start) > start || (nextStart ?? end) < end) return false;
    this.bytes += end - start;
    if (previousEnd === start && nextStart === end) {
      ends[low - 1] = ends[low] ?? end;
      starts.splice(low, 1);
      ends.splice(low, 1);
    } else if (previousEnd === start) {
      ends[low - 1] = end;
    } else if (nextStart === end) {
      starts[low] = start;
    } else {
      if (starts.length === MAX_GAPS) return false;
      starts.splice(low, 0, start);
      ends.splice(low, 0, end);
    }
    return true;
  }
}
