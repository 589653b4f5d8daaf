/**
 * Work of handshakes that may be long, in slices, so that however many ask for much the others hardly notice. Of one turn of
 * the event loop all of them together have so much; who wants more waits, and those that wait have so much of the next one,
 * in the order of their coming. It owns that order.
 */

/** One handshake's part of a turn, milliseconds. With a turn of the loop below 10 ms in mind, of which there are others. */
const SLICE_MS = 1;
/** Of a turn, all that begins in it; what others do meanwhile counts. */
const TURN_MS = 2;
/** Of a turn, those that have waited. */
const WAITED_MS = 1;

class LoopSlices {
  readonly #waiting: (() => void)[] = [];
  /** performance.now() of the first work of this turn; 0 if there was none yet. */
  #turnBegan = 0;
  /** The same of those that have waited. */
  #waitedBegan = 0;
  #isTurnOpen = false;

  /** Whether handshakes have had what there is for them in this turn. */
  isSpent(now: number): boolean {
    if (this.#turnBegan === 0) {
      this.#turnBegan = now;
      this.#openTurn();
    }
    return this.#waiting.length > 0 || now - this.#turnBegan >= TURN_MS;
  }

  /** Resolves when it is this one's turn. */
  next(): Promise<void> {
    return new Promise((resolve) => {
      this.#waiting.push(resolve);
      this.#openTurn();
      // One each, so that what is resumed by one is done before the next looks at the clock.
      setImmediate(this.#resumeOne);
    });
  }

  /** Before anybody is resumed: immediates come in the order in which they were asked for. */
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

/** One for the event loop: each thread has its own. */
const slices = new LoopSlices();

/** The slice of one who works: looked at between steps. */
export class LoopSlice {
  #end = performance.now() + SLICE_MS;

  get isOver(): boolean {
    const now = performance.now();
    return now >= this.#end || slices.isSpent(now);
  }

  /** Resolves when the next one begins. */
  async next(): Promise<void> {
    await slices.next();
    this.#end = performance.now() + SLICE_MS;
  }

  /** A slice begins: whoever has it has been waiting for something else. */
  restart(): void {
    this.#end = performance.now() + SLICE_MS;
  }
}
