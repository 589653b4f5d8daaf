/**
 * Long loops over maps, in slices: after a few milliseconds the loop yields to the event loop. Each loop counts its own time:
 * for control-plane work, of which little runs at once. src/vdi/loop-share.ts is the counterpart for requests of clients: it
 * limits all their long work together, and disks take turns there.
 */

/** Well below the 10 ms for which a writer may be held, with room for other work in the same turn of the event loop. */
const SLICE_MS = 2;
/** Steps between two readings of the clock. */
const STEPS_PER_LOOK = 256;

export class TimeSlice {
  #end = performance.now() + SLICE_MS;

  /** Whether the caller must await `next`. `step`: the number of the loop's pass. */
  isOver(step: number): boolean {
    return step % STEPS_PER_LOOK === 0 && performance.now() >= this.#end;
  }

  async next(): Promise<void> {
    await new Promise((resolve) => setImmediate(resolve));
    this.#end = performance.now() + SLICE_MS;
  }
}
