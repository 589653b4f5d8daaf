/**
 * Time during which the event loop could have received input: time limits of clients are measured by it. After a process was
 * stopped, or its loop was blocked, timers are due before the input that arrived meanwhile is read; by this clock they are not.
 * It owns the counting for one event loop.
 */

/** How often time is counted, milliseconds. */
const STEP_MS = 500;
/** At most so much of one step counts, milliseconds: a loop that is only busy loses nothing. */
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

  /** The server accepts no more connections: from now on all time counts, so that the remaining ones end. */
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
