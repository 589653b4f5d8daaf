/**
 * Order of writes to the same bytes. Nodes do not order requests that are in flight together, and copies of an object
 * on several nodes would come to differ; so an overlapping write waits until the one before it is answered, repetitions
 * and all. Owns only who waits for whom.
 */
interface Range {
  readonly from: number;
  readonly to: number;
  waiters: (() => void)[] | undefined;
}

export class WriteOrder {
  readonly #inFlight = new Map<number, Range[]>();

  /** Run `write` alone on these bytes of the object `key`. */
  run(key: number, from: number, length: number, write: () => Promise<void>): Promise<void> {
    const ranges = this.#inFlight.get(key);
    if (ranges === undefined || !ranges.some((range) => overlaps(range, from, from + length))) {
      return this.#now(key, from, length, write);
    }
    return this.#later(key, from, length, write);
  }

  async #later(key: number, from: number, length: number, write: () => Promise<void>): Promise<void> {
    for (;;) {
      const blocking = this.#inFlight.get(key)?.find((range) => overlaps(range, from, from + length));
      if (!blocking) return this.#now(key, from, length, write);
      await new Promise<void>((wake) => (blocking.waiters ??= []).push(wake));
    }
  }

  async #now(key: number, from: number, length: number, write: () => Promise<void>): Promise<void> {
    const range: Range = { from, to: from + length, waiters: undefined };
    const ranges = this.#inFlight.get(key);
    if (ranges) ranges.push(range);
    else this.#inFlight.set(key, [range]);
    try {
      await write();
    } finally {
      const left = this.#inFlight.get(key) as Range[];
      if (left.length === 1) this.#inFlight.delete(key);
      else left.splice(left.indexOf(range), 1);
      if (range.waiters) for (const wake of range.waiters) wake();
    }
  }
}

function overlaps(range: Range, from: number, to: number): boolean {
  return range.from < to && from < range.to;
}
