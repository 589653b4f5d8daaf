/** So many at a time; who comes later waits, in the order of coming. */
export class Admission {
  #free: number;
  readonly #waiting: (() => void)[] = [];

  constructor(most: number) {
    this.#free = most;
  }

  /** Undefined if there is room; then, or when it resolves, `leave` is owed. */
  enter(): Promise<void> | undefined {
    if (this.#free === 0) return new Promise((resolve) => this.#waiting.push(resolve));
    this.#free--;
    return undefined;
  }

  readonly leave = (): void => {
    const next = this.#waiting.shift();
    // What one leaves is the next one's.
    if (next) next();
    else this.#free++;
  };
}
