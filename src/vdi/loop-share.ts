/**
 * Limits what long work over object maps takes of the event loop: all of it together gets a bounded time in one turn of the loop,
 * and continues in later turns, one disk after the other. Without this limit a request of 32 bytes about a million objects would
 * stall all connections. Owns the queue; the work itself is the caller's.
 */

/** For all long work together in one turn of the loop: well below what a waiting reader would notice. */
const SHARE_MS = 1;
/** The clock is read once in so many steps; a step may change a map entry, which takes some microseconds. */
export const STEPS_PER_LOOK = 16;

class LoopShare {
  /** What this turn has used so far, in ms. */
  #used = 0;
  #isScheduled = false;
  /** Work that waits for a turn, by disk. The first disk is next. */
  readonly #waiting = new Map<object, (() => void)[]>();

  get left(): number {
    return SHARE_MS - this.#used;
  }

  /** Whether new work may begin in this turn. */
  get isFree(): boolean {
    return this.#waiting.size === 0 && this.#used < SHARE_MS;
  }

  use(ms: number): void {
    this.#used += ms;
    this.#schedule();
  }

  turn(disk: object): Promise<void> {
    return new Promise((resolve) => {
      const queue = this.#waiting.get(disk);
      if (queue) queue.push(resolve);
      else this.#waiting.set(disk, [resolve]);
      this.#schedule();
    });
  }

  #schedule(): void {
    if (this.#isScheduled) return;
    this.#isScheduled = true;
    setImmediate(this.#nextTurn);
  }

  readonly #nextTurn = (): void => {
    this.#isScheduled = false;
    this.#used = 0;
    for (const [disk, queue] of this.#waiting) {
      // If it has more work, it goes behind the other disks.
      this.#waiting.delete(disk);
      if (queue.length > 1) this.#waiting.set(disk, queue);
      queue.shift()?.();
      break;
    }
    if (this.#waiting.size > 0) this.#schedule();
  };
}

const share = new LoopShare();

/**
 * The long work of one request. The caller asks `isOver` after each step, and awaits `next` if so. It calls `pause` before, and
 * `resume` after, everything else that it awaits.
 */
export class LongWork {
  readonly #disk: object;
  #since = 0;
  #steps = 0;

  /** `disk`: any object that stands for the disk; disks take turns. */
  constructor(disk: object) {
    this.#disk = disk;
  }

  /** Undefined if it may begin at once. */
  begin(): Promise<void> | undefined {
    if (!share.isFree) return this.#turn();
    this.resume();
    return undefined;
  }

  /** Whether it is time for `next`. `steps`: how many steps the last one counts as. */
  isOver(steps = 1): boolean {
    this.#steps += steps;
    if (this.#steps < STEPS_PER_LOOK) return false;
    this.#steps = 0;
    return performance.now() - this.#since >= share.left;
  }

  next(): Promise<void> {
    this.pause();
    return this.#turn();
  }

  pause(): void {
    share.use(performance.now() - this.#since);
  }

  resume(): void {
    this.#since = performance.now();
  }

  async #turn(): Promise<void> {
    await share.turn(this.#disk);
    this.resume();
  }
}
