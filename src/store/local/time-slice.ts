/** Long loops over maps, in pieces: after a few milliseconds the event loop gets its turn. */

/** Well under the 10 ms that a writer may be held, with room for what else runs in the same turn. */
const SLICE_MS = 2;
/** The clock is looked at once in so many steps. */
const STEPS_PER_LOOK = 256;

export class TimeSlice {
  #end = performance.now() + SLICE_MS;

  /** Whether it is time for `next`; `step` counts the loop's passes. */
  isOver(step: number): boolean {
    return step % STEPS_PER_LOOK === 0 && performance.now() >= this.#end;
  }

  async next(): Promise<void> {
    await new Promise((resolve) => setImmediate(resolve));
    this.#end = performance.now() + SLICE_MS;
  }
}
