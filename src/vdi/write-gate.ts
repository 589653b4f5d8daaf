/**
 * The gate every write, zero and trim of a VDI passes. A snapshot closes it for the moment of the switch: it waits until
 * what is inside has finished and keeps the rest waiting outside. One that needs no such moment only turns it, and learns
 * when those that were inside at that time have left. Nothing is allocated while the gate is open.
 */

/** Returned by tryEnter if the gate is closed. */
export const CLOSED = -1;

export class WriteGate {
  /** How many are inside, of those that entered since the gate was last turned, and of those from before: by epoch & 1. */
  readonly #inside = [0, 0];
  #epoch = 0;
  #closed = false;
  #outside: (() => void)[] = [];
  #left: (() => void) | undefined;

  /** Somebody waits until those that entered with `epoch` have left. Who is inside for long leaves then, and enters again. */
  isAwaited(epoch: number): boolean {
    return this.#closed || (this.#left !== undefined && epoch !== this.#epoch);
  }

  /** Go in if the gate is open, else CLOSED. What it returns is handed to one `leave`, before the request is answered. */
  tryEnter(): number {
    if (this.#closed) return CLOSED;
    this.#inside[this.#epoch]!++;
    return this.#epoch;
  }

  /** Go in as soon as the gate opens. */
  async enter(): Promise<number> {
    for (;;) {
      const epoch = this.tryEnter();
      if (epoch !== CLOSED) return epoch;
      await new Promise<void>((resolve) => this.#outside.push(resolve));
    }
  }

  leave(epoch: number): void {
    if (--this.#inside[epoch]! === 0 && this.#left) this.#left();
  }

  /** Keep everybody out and wait until nobody is inside. One holder at a time; the caller serialises. */
  async close(): Promise<void> {
    if (this.#closed) throw new Error('invariant: the gate is closed already');
    this.#closed = true;
    await this.#until(() => this.#inside[0] === 0 && this.#inside[1] === 0);
  }

  open(): void {
    this.#closed = false;
    const waiting = this.#outside;
    this.#outside = [];
    for (const wake of waiting) wake();
  }

  /** Wait until those that are inside now have left; others go on entering. */
  async newEpoch(): Promise<void> {
    const before = this.#epoch;
    if (this.#inside[1 - before] !== 0) throw new Error('invariant: the gate is turned again before all have left');
    this.#epoch = 1 - before;
    await this.#until(() => this.#inside[before] === 0);
  }

  async #until(isSo: () => boolean): Promise<void> {
    while (!isSo()) await new Promise<void>((resolve) => (this.#left = resolve));
    this.#left = undefined;
  }
}
