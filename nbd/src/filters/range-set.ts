/** A set of positions, held as ascending ranges that neither overlap nor touch. It only grows. */

export class RangeSet {
  /** Range i is [#starts[i], #ends[i]). */
  readonly #starts: number[] = [];
  readonly #ends: number[] = [];

  /** How many ranges it holds. */
  get count(): number {
    return this.#starts.length;
  }

  /** Add [from, to). */
  add(from: number, to: number): void {
    if (from >= to) return;
    // All ranges that overlap or touch the new one become one with it.
    const first = firstAtLeast(this.#ends, from);
    let last = first;
    while (last < this.#starts.length && (this.#starts[last] as number) <= to) last++;
    const start = last > first ? Math.min(from, this.#starts[first] as number) : from;
    const end = last > first ? Math.max(to, this.#ends[last - 1] as number) : to;
    this.#starts.splice(first, last - first, start);
    this.#ends.splice(first, last - first, end);
  }

  /** Whether `position` is in the set. */
  has(position: number): boolean {
    return this.endAt(position) > position;
  }

  /** The end of the range that `position` is in; `position` itself if it is in none. */
  endAt(position: number): number {
    const at = firstAtLeast(this.#ends, position + 1);
    const start = this.#starts[at];
    return start !== undefined && start <= position ? (this.#ends[at] as number) : position;
  }

  /** The first position of the set in [from, to), or `to`. */
  nextFrom(from: number, to: number): number {
    const start = this.#starts[firstAtLeast(this.#ends, from + 1)];
    return start === undefined ? to : Math.min(to, Math.max(from, start));
  }
}

/** The first index whose value is at least `least`. */
function firstAtLeast(ascending: readonly number[], least: number): number {
  let low = 0;
  let high = ascending.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    if ((ascending[middle] as number) < least) low = middle + 1;
    else high = middle;
  }
  return low;
}
