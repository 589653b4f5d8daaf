/** Pauses that end at once when what they are for is closed. Owns their timers. */
export class Pauses {
  readonly #sleepers = new Set<() => void>();
  #isOver = false;

  /** Resolves after `ms` milliseconds, or when end() is called. */
  wait(ms: number): Promise<void> {
    if (this.#isOver) return Promise.resolve();
    return new Promise((resolve) => {
      const wake = (): void => {
        clearTimeout(timer);
        this.#sleepers.delete(wake);
        resolve();
      };
      const timer = setTimeout(wake, ms);
      this.#sleepers.add(wake);
    });
  }

  /** All that wait go on; nobody waits any more. */
  end(): void {
    this.#isOver = true;
    for (const wake of this.#sleepers) wake();
  }
}
