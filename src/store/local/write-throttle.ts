/**
 * Tells when buffered writes on the event loop stop being quick: the kernel holds writers whose dirty pages the disk cannot
 * keep up with. Owns nothing but that memory; who writes measures, and asks before the next write.
 */

/** A buffered write that took longer met writeback throttling; writes then go through the thread pool for a while. */
const SLOW_WRITE_MS = 4;
const SLOW_WRITE_PAUSE_MS = 200;

export class WriteThrottle {
  #slowUntil = 0;

  mayWrite(): boolean {
    if (this.#slowUntil === 0) return true;
    if (performance.now() < this.#slowUntil) return false;
    this.#slowUntil = 0;
    return true;
  }

  /** A write on the loop that began at `start` (performance.now()) is done. */
  note(start: number): void {
    if (performance.now() - start > SLOW_WRITE_MS) this.#slowUntil = start + SLOW_WRITE_PAUSE_MS;
  }
}
