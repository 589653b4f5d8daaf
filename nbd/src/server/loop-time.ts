/**
 * Time as the event loop has it: what clients are given is counted only while somebody could have heard them. A process
 * that was stopped, or whose loop something has held, finds its timers due before it reads what has come meanwhile; by this
 * clock they are not. Owns the counting of one loop.
 */

/** How often is counted, milliseconds. */
const STEP_MS = 500;
/** What counts of one step at most: a loop that is only busy loses nothing. */
const MOST_OF_STEP_MS = 1000;

export class LoopTime {
  #counted = 0;
  #countedAt = performance.now();
  #isStopped = false;
  readonly #timer: NodeJS.Timeout;

  constructor() {
    this.#timer = setInterval(this.#count, STEP_MS).unref();
  }

  /** Milliseconds since some moment; never goes back. */
  now(): number {
    const step = performance.now() - this.#countedAt;
    return this.#counted + (this.#isStopped ? step : Math.min(step, MOST_OF_STEP_MS));
  }

  /** The server takes nobody any more: from now on all time counts, so that those that are left come to their end. */
  stop(): void {
    if (this.#isStopped) return;
    this.#count();
    this.#isStopped = true;
    clearInterval(this.#timer);
  }

  readonly #count = (): void => {
    this.#counted = this.now();
    this.#countedAt = performance.now();
  };
}
