/**
 * Long work over maps takes its share of the event loop: all of it together so long in one turn, the rest in later turns,
 * one disk after the other. Without it a request of 32 bytes about a million objects would keep everybody waiting. Owns
 * the queue; what the work is it does not know.
 */

/** Of one turn of the loop, for all work of this kind together: well below what a waiting reader would notice. */
const SHARE_MS = 1;
/** The clock is looked at once in so many steps; a step may be a change of a map, which takes some microseconds. */
export const STEPS_PER_LOOK = 16;

class LoopShare {
  /** Used of this turn, in ms. */
  #used = 0;
  #isScheduled = false;
  /** Who waits for a turn, by disk. The disk whose turn comes next is the first. */
  readonly #waiting = new Map<object, (() => void)[]>();

  get left(): number {
    return SHARE_MS - this.#used;
  }

  /** Whether somebody who begins now may do so before the next turn. */
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
      // Behind the others, if more of it waits.
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
 * One piece of long work, by one request. It asks `isOver` after each step, and waits for `next` where that is so; around
 * anything else that it waits for come `pause` and `resume`.
 */
export class LongWork {
  readonly #disk: object;
  #since = 0;
  #steps = 0;

  /** `disk`: whose work it is; disks take turns. */
  constructor(disk: object) {
    this.#disk = disk;
  }

  /** Undefined if it may begin at once. */
  begin(): Promise<void> | undefined {
    if (!share.isFree) return this.#turn();
    this.resume();
    return undefined;
  }

  /** Whether it is time for `next`. `steps`: for how many the last one counts. */
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
