/**
 * The gate that every write, zero and trim of a VDI passes. A snapshot closes it for the moment of the switch: it waits until the
 * requests inside have left, and keeps new ones waiting outside. A snapshot that needs no pause starts a new epoch and waits for
 * the previous epoch's requests. Nothing is allocated while the gate is open.
 */

/** Returned by tryEnter if the gate is closed. */
export const CLOSED = -1;

/** Two are enough: an epoch begins only when no request of the epoch before the last is inside. */
type Epoch = 0 | 1;

export class WriteGate {
  /** How many requests of each epoch are inside. */
  readonly #inside: [number, number] = [0, 0];
  #epoch: Epoch = 0;
  #closed = false;
  #outside: (() => void)[] = [];
  #left: (() => void) | undefined;

  /** A snapshot waits until the requests of `epoch` have left. A long request then leaves, and enters again. */
  isAwaited(epoch: number): boolean {
    return this.#closed || (this.#left !== undefined && epoch !== this.#epoch);
  }

  /** Enter if the gate is open, else CLOSED. Returns the epoch, to be given to one `leave` before the request is answered. */
  tryEnter(): number {
    if (this.#closed) return CLOSED;
    this.#inside[this.#epoch]++;
    return this.#epoch;
  }

  /** Enter as soon as the gate opens. */
  async enter(): Promise<number> {
    for (;;) {
      const epoch = this.tryEnter();
      if (epoch !== CLOSED) return epoch;
      await new Promise<void>((resolve) => this.#outside.push(resolve));
    }
  }

  leave(epoch: number): void {
    if (--this.#inside[epoch as Epoch] === 0 && this.#left) this.#left();
  }

  /** Keep new requests outside and wait until none is inside. One holder at a time; the caller serialises. */
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

  /** Start an epoch, and wait for the requests of the previous one; new ones enter meanwhile. */
  async newEpoch(): Promise<void> {
    const previous = this.#epoch;
    const next = previous === 0 ? 1 : 0;
    if (this.#inside[next] !== 0) throw new Error('invariant: a new epoch before all of the last but one have left');
    this.#epoch = next;
    await this.#until(() => this.#inside[previous] === 0);
  }

  async #until(isSo: () => boolean): Promise<void> {
    while (!isSo()) await new Promise<void>((resolve) => (this.#left = resolve));
    this.#left = undefined;
  }
}
