/** Pauses that all end at once when their user is closed. Owns their timers. */
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

  /** All pauses end, and later ones end at once. */
  end(): void {
    this.#isOver = true;
    for (const wake of this.#sleepers) wake();
  }
}
