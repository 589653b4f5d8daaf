/**
 * Work of handshakes that may be long, in slices: in each turn of the event loop one of those who wait has one, whoever it
 * is for, so that however many ask for much the others hardly notice. It owns the order.
 */

/** With a turn of the loop below 10 ms in mind, of which there are others. */
const SLICE_MS = 1;

class LoopSlices {
  private readonly waiting: (() => void)[] = [];
  private isScheduled = false;

  /** Resolves when it is this one's turn; until `SLICE_MS` later it may work, and then asks again. */
  next(): Promise<void> {
    return new Promise((resolve) => {
      this.waiting.push(resolve);
      this.schedule();
    });
  }

  private schedule(): void {
    if (this.isScheduled) return;
    this.isScheduled = true;
    setImmediate(() => {
      this.isScheduled = false;
      this.waiting.shift()?.();
      if (this.waiting.length > 0) this.schedule();
    });
  }
}

/** One for the process, as there is one loop. */
const slices = new LoopSlices();

/** The slice of one who works: looked at between steps. */
export class LoopSlice {
  private end = performance.now() + SLICE_MS;

  get isOver(): boolean {
    return performance.now() >= this.end;
  }

  /** Resolves when the next one begins. */
  async next(): Promise<void> {
    await slices.next();
    this.end = performance.now() + SLICE_MS;
  }

  /** A slice begins: whoever has it has been waiting for something else. */
  restart(): void {
    this.end = performance.now() + SLICE_MS;
  }
}
