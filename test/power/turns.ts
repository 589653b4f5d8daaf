/**
 * When calls of the seam take effect: one at a time, in an order that only the seed decides, and nothing while LMDB works on a
 * thread of its own. So a run depends on its seed and not on the machine. Owns the calls in flight.
 */
import type { Random } from './random.js';

interface Call {
  /** The process that made it. */
  readonly of: object;
  readonly effect: () => void;
  readonly refuse: (error: Error) => void;
}

/** A thread pool starts calls roughly in order: one of the first few comes next. */
const WINDOW = 6;
const FIRST_COMES_FIRST = 0.4;

export class Turns {
  /** Undefined: calls take effect at once. */
  readonly #random: Random | undefined;
  #calls: Call[] = [];
  #isArmed = false;
  /** Transactions of LMDB in progress. */
  #held = 0;

  constructor(random: Random | undefined) {
    this.#random = random;
  }

  later<T>(of: object, call: () => T): Promise<T> {
    if (this.#random === undefined) {
      return new Promise<T>((resolve) => {
        resolve(call());
      });
    }
    return new Promise<T>((resolve, reject) => {
      const effect = (): void => {
        try {
          resolve(call());
        } catch (error) {
          const failure = error as Error;
          reject(failure);
        }
      };
      this.#calls.push({ of, effect, refuse: reject });
      this.#arm();
    });
  }

  /** `work` runs in real time, and everybody else waits for it. */
  async alone<T>(work: () => Promise<T>): Promise<T> {
    this.#held++;
    try {
      return await work();
    } finally {
      this.#held--;
      this.#arm();
    }
  }

  /** The process ends: each of its calls in flight takes effect, if `has` says so, and is never answered. */
  drop(of: object, has: () => boolean, error: Error): void {
    const dropped = this.#calls.filter((call) => call.of === of);
    this.#calls = this.#calls.filter((call) => call.of !== of);
    for (const { effect, refuse } of dropped) {
      refuse(error);
      if (has()) effect();
    }
  }

  #arm(): void {
    if (this.#isArmed || this.#held > 0 || this.#calls.length === 0) return;
    this.#isArmed = true;
    setImmediate(() => {
      this.#isArmed = false;
      if (this.#held === 0) this.#step();
      this.#arm();
    });
  }

  #step(): void {
    const random = this.#random;
    if (random === undefined || this.#calls.length === 0) return;
    const at = random.chance(FIRST_COMES_FIRST) ? 0 : random.below(Math.min(WINDOW, this.#calls.length));
    const [call] = this.#calls.splice(at, 1);
    call?.effect();
  }
}
