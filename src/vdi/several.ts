/** A bounded number of operations in flight for one request, and the first of their failures. */
/** Object changes that one request has in flight at a time. */
export const PARALLEL_OBJECTS = 8;

export class Several {
  readonly #most: number;
  #count = 0;
  #failure: { readonly error: unknown } | undefined;
  #wake: (() => void) | undefined;

  constructor(most: number) {
    this.#most = most;
  }

  get hasFailed(): boolean {
    return this.#failure !== undefined;
  }

  get isFull(): boolean {
    return this.#count >= this.#most;
  }

  add(operation: Promise<void>): void {
    this.#count++;
    operation.then(this.#ended, this.#failed);
  }

  /** Record the failure of an operation that was not begun. */
  fail(error: unknown): void {
    this.#failure ??= { error };
  }

  /** Resolves when any of them has ended. One caller at a time. */
  one(): Promise<void> {
    return new Promise((resolve) => (this.#wake = resolve));
  }

  /** Resolves when all have ended, failed or not: nothing of a request may still run when it is answered. */
  async settled(): Promise<void> {
    while (this.#count > 0) await this.one();
  }

  /** As `settled`, and throws the first failure. */
  async all(): Promise<void> {
    await this.settled();
    if (this.#failure) throw this.#failure.error;
  }

  readonly #ended = (): void => {
    this.#count--;
    const wake = this.#wake;
    this.#wake = undefined;
    wake?.();
  };

  readonly #failed = (error: unknown): void => {
    this.fail(error);
    this.#ended();
  };
}
