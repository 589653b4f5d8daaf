/** Lets a bounded number of operations run at a time. Others wait, first come, first served. */
export class Admission {
  #free: number;
  readonly #waiting: (() => void)[] = [];

  constructor(most: number) {
    this.#free = most;
  }

  /** Undefined if there is room. From then on, or once it resolves, the caller owes one `leave`. */
  enter(): Promise<void> | undefined {
    if (this.#free === 0) return new Promise((resolve) => this.#waiting.push(resolve));
    this.#free--;
    return undefined;
  }

  readonly leave = (): void => {
    const next = this.#waiting.shift();
    // The place goes to the next in line.
    if (next) next();
    else this.#free++;
  };
}
