/**
 * The gate every write, zero and trim of a VDI passes. A snapshot closes it for the moment of the switch: it waits until
 * what is inside has finished and keeps the rest waiting outside. Nothing is allocated while the gate is open.
 */
export class WriteGate {
  #inside = 0;
  #closed = false;
  #outside: (() => void)[] = [];
  #drained: (() => void) | undefined;

  /** Go in if the gate is open. Every true must be followed by one `leave`, before the request is answered. */
  tryEnter(): boolean {
    if (this.#closed) return false;
    this.#inside++;
    return true;
  }

  /** Go in as soon as the gate opens. */
  async enter(): Promise<void> {
    while (!this.tryEnter()) await new Promise<void>((resolve) => this.#outside.push(resolve));
  }

  leave(): void {
    if (--this.#inside === 0 && this.#drained) {
      const drained = this.#drained;
      this.#drained = undefined;
      drained();
    }
  }

  /** Keep everybody out and wait until nobody is inside. One holder at a time; the caller serialises. */
  async close(): Promise<void> {
    if (this.#closed) throw new Error('invariant: the gate is closed already');
    this.#closed = true;
    if (this.#inside > 0) await new Promise<void>((resolve) => (this.#drained = resolve));
  }

  open(): void {
    this.#closed = false;
    const waiting = this.#outside;
    this.#outside = [];
    for (const wake of waiting) wake();
  }
}
