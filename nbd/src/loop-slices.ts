/**
 * Slices of the event loop for long work: handshakes with many options or long lists, zeros that are written. So other
 * connections are hardly delayed. All work of a kind together has a fixed time of each turn of the loop. What needs more waits,
 * and is continued in the next turns in the order in which it came. It owns that order.
 */

/** The part of one handshake, or other work, of a turn, milliseconds: a whole turn should stay below 10 ms. */
const SLICE_MS = 1;
/** The part of a turn for work that begins in it, milliseconds; other work in between counts. */
const TURN_MS = 2;
/** The part of a turn for work that has waited, milliseconds. */
const WAITED_MS = 1;

/** The slices of one kind of work, on one event loop: each thread has its own. */
export class LoopSlices {
  readonly #waiting: (() => void)[] = [];
  /** performance.now() at the first work of this turn; 0 if there was none yet. */
  #turnBegan = 0;
  /** The same for work that has waited. */
  #waitedBegan = 0;
  #isTurnOpen = false;

  /** Whether this kind of work has used its time in this turn. */
  isSpent(now: number): boolean {
    if (this.#turnBegan === 0) {
      this.#turnBegan = now;
      this.#openTurn();
    }
    return this.#waiting.length > 0 || now - this.#turnBegan >= TURN_MS;
  }

  /** Resolves when it is the caller's turn. */
  next(): Promise<void> {
    return new Promise((resolve) => {
      this.#waiting.push(resolve);
      this.#openTurn();
      // One immediate each, so that the resumed work is done before the next one reads the clock.
      setImmediate(this.#resumeOne);
    });
  }

  /** Called before any work is resumed: immediates run in the order in which they were requested. */
  #openTurn(): void {
    if (this.#isTurnOpen) return;
    this.#isTurnOpen = true;
    setImmediate(this.#endTurn);
  }

  readonly #endTurn = (): void => {
    this.#turnBegan = 0;
    this.#waitedBegan = 0;
    this.#isTurnOpen = false;
    if (this.#waiting.length > 0) this.#openTurn();
  };

  readonly #resumeOne = (): void => {
    const now = performance.now();
    if (this.#waitedBegan === 0) this.#waitedBegan = now;
    else if (now - this.#waitedBegan >= WAITED_MS) {
      setImmediate(this.#resumeOne);
      return;
    }
    this.#waiting.shift()?.();
  };
}

const handshakes = new LoopSlices();

/** The slice of one handshake, or of other work, checked between its steps. */
export class LoopSlice {
  readonly #slices: LoopSlices;
  #end = performance.now() + SLICE_MS;

  constructor(slices = handshakes) {
    this.#slices = slices;
  }

  get isOver(): boolean {
    const now = performance.now();
    return now >= this.#end || this.#slices.isSpent(now);
  }

  /** Resolves when the next one begins. */
  async next(): Promise<void> {
    await this.#slices.next();
    this.#end = performance.now() + SLICE_MS;
  }

  /** A new slice begins, after a wait for input or the provider. */
  restart(): void {
    this.#end = performance.now() + SLICE_MS;
  }
}
