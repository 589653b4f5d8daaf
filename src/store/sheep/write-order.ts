/**
 * Order of writes to the same bytes. Nodes do not order requests that are in flight together: copies of an object on several
 * nodes would differ. So an overlapping write waits until the earlier write is answered, repetitions included. A write that was
 * given up and may still take effect (InDoubt) keeps its place: until it is settled, overlapping writes fail.
 */
import { StoreError } from '../store-error.js';
import { InDoubt } from './stalled-nodes.js';

interface Range {
  readonly from: number;
  readonly to: number;
  waiters: (() => void)[] | undefined;
  isInDoubt: boolean;
}

export class WriteOrder {
  readonly #inFlight = new Map<number, Range[]>();

  /**
   * Runs `write` alone on these bytes of the object `key`. Errors: IO (an earlier write to these bytes is in doubt), and
   * `write`'s.
   */
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
      if (blocking.isInDoubt) {
        throw new StoreError(
          'IO',
          'an earlier write to these bytes was given up and may still be carried out by its node',
        );
      }
      await new Promise<void>((wake) => (blocking.waiters ??= []).push(wake));
    }
  }

  async #now(key: number, from: number, length: number, write: () => Promise<void>): Promise<void> {
    const range: Range = { from, to: from + length, waiters: undefined, isInDoubt: false };
    const ranges = this.#inFlight.get(key);
    if (ranges) ranges.push(range);
    else this.#inFlight.set(key, [range]);
    try {
      await write();
    } catch (error) {
      range.isInDoubt = error instanceof InDoubt;
      if (error instanceof InDoubt) void error.settled.then(() => this.#leave(key, range));
      throw error;
    } finally {
      if (range.isInDoubt) wakeWaiters(range);
      else this.#leave(key, range);
    }
  }

  #leave(key: number, range: Range): void {
    const left = this.#inFlight.get(key) as Range[];
    if (left.length === 1) this.#inFlight.delete(key);
    else left.splice(left.indexOf(range), 1);
    wakeWaiters(range);
  }
}

function wakeWaiters(range: Range): void {
  const waiters = range.waiters ?? [];
  range.waiters = undefined;
  for (const wake of waiters) wake();
}

function overlaps(range: Range, from: number, to: number): boolean {
  return range.from < to && from < range.to;
}
