/**
 * Tells when buffered writes on the event loop stop being quick: the kernel holds writers whose dirty pages the disk cannot
 * keep up with, for seconds if need be. Owns nothing but that memory; who writes measures, and asks before the next write.
 */

/** A buffered write that took longer met writeback throttling; writes then go through the thread pool for a while. */
const SLOW_WRITE_MS = 4;
const SLOW_WRITE_PAUSE_MS = 200;
/** One that took so long has held everybody. Writes come back to the loop when it is shown that they are quick again. */
const STALLED_WRITE_MS = 40;
/** ... by so many in the thread pool, the pause through, that took less than this. There they may have to wait for the loop. */
const QUICK_WRITES = 16;
const QUICK_WRITE_MS = 20;
/** Each stall so soon after the writes came back doubles the pause, up to this. */
const RELAPSE_MS = 10_000;
const MAX_PAUSE_MS = 5000;

export class WriteThrottle {
  /** Writes stay off the loop. */
  #isSlow = false;
  /** Quick writes off the loop that are still needed before they come back. */
  #quickNeeded = 0;
  /** When the last slow write ended, or a slow one that was no stall. */
  #slowAt = 0;
  #pauseMs = SLOW_WRITE_PAUSE_MS;
  #cameBackAt = -Infinity;

  /** Whether a write may be done on the loop. */
  mayWrite(): boolean {
    if (!this.#isSlow) return true;
    const now = performance.now();
    if (this.#quickNeeded > 0 || now - this.#slowAt < this.#pauseMs) return false;
    this.#isSlow = false;
    this.#cameBackAt = now;
    return true;
  }

  /** A write on the loop that began at `start` (performance.now()) is done. */
  note(start: number): void {
    const now = performance.now();
    const took = now - start;
    if (took <= SLOW_WRITE_MS) return;
    this.#isSlow = true;
    this.#slowAt = now;
    if (took < STALLED_WRITE_MS) return;
    const isRelapse = now - this.#cameBackAt < RELAPSE_MS;
    this.#pauseMs = isRelapse ? Math.min(2 * this.#pauseMs, MAX_PAUSE_MS) : SLOW_WRITE_PAUSE_MS;
    this.#quickNeeded = QUICK_WRITES;
  }

  /** One that was done off the loop because `mayWrite` said so. */
  noteOffLoop(start: number): void {
    if (!this.#isSlow) return;
    const now = performance.now();
    if (now - start < QUICK_WRITE_MS) {
      if (this.#quickNeeded > 0) this.#quickNeeded--;
    } else if (this.#quickNeeded > 0 || now - start >= STALLED_WRITE_MS) {
      this.#slowAt = now;
      this.#quickNeeded = QUICK_WRITES;
    }
  }
}
