/**
 * Detects when buffered writes on the event loop are not quick any more: the kernel holds writers, for seconds if need be, when
 * the disk cannot keep up with dirty pages. Writers report the duration of each write, and ask before the next. Owns only this
 * state; writes nothing.
 */

/** A longer buffered write was throttled by write-back; writes then go through the thread pool for a while. */
const SLOW_WRITE_MS = 4;
const SLOW_WRITE_PAUSE_MS = 200;
/** A write of this duration on the loop was a stall for all clients. Writes return to the loop only after a proof. */
const STALLED_WRITE_MS = 40;
/** The proof: this many writes in the thread pool during the pause, each quicker than this. The time may include waiting for the loop. */
const QUICK_WRITES = 16;
const QUICK_WRITE_MS = 20;
/** A stall this soon after writes returned to the loop doubles the pause, up to the maximum. */
const RELAPSE_MS = 10_000;
const MAX_PAUSE_MS = 5000;

export class WriteThrottle {
  /** Writes must stay off the loop. */
  #isSlow = false;
  /** Quick writes off the loop that are still needed before writes return. */
  #quickNeeded = 0;
  /** When the last slow write ended (performance.now()). */
  #slowAt = 0;
  #pauseMs = SLOW_WRITE_PAUSE_MS;
  #cameBackAt = -Infinity;

  /** Whether a write may run on the loop. */
  mayWrite(): boolean {
    if (!this.#isSlow) return true;
    const now = performance.now();
    if (this.#quickNeeded > 0 || now - this.#slowAt < this.#pauseMs) return false;
    this.#isSlow = false;
    this.#cameBackAt = now;
    return true;
  }

  /** Report a write on the loop that began at `start` (performance.now()). */
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

  /** Report a write off the loop that `mayWrite` has kept from it. */
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
