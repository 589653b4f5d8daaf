/**
 * How long a client has neither asked for anything nor been answered (Limits.idleTimeoutMs). It owns one timer that looks
 * again when it is due: receiving restarts no timer.
 */

import type { LoopTime } from './loop-time.js';

export class IdleClock {
  readonly #time: LoopTime;
  readonly #timeoutMs: number;
  readonly #isBusy: () => boolean;
  readonly #onIdle: () => void;
  /** When the client was last heard or answered, by `time`. */
  #lastActiveAt: number;
  #timer: NodeJS.Timeout | undefined;

  /** @param isBusy whether the client waits for the server: that is not idleness */
  constructor(time: LoopTime, timeoutMs: number, isBusy: () => boolean, onIdle: () => void) {
    this.#time = time;
    this.#timeoutMs = timeoutMs;
    this.#isBusy = isBusy;
    this.#onIdle = onIdle;
    this.#lastActiveAt = time.now();
    this.#wait(timeoutMs);
  }

  /** The client has sent something. */
  heard(): void {
    this.#lastActiveAt = this.#time.now();
  }

  stop(): void {
    clearTimeout(this.#timer);
  }

  #wait(delayMs: number): void {
    this.#timer = setTimeout(() => {
      if (this.#isBusy()) this.heard();
      const leftMs = this.#lastActiveAt + this.#timeoutMs - this.#time.now();
      if (leftMs > 0) this.#wait(leftMs);
      else this.#onIdle();
    }, delayMs);
  }
}
