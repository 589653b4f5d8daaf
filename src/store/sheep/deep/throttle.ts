/** Limits reading to a number of bytes a second, for all callers together. Owns the time of the next read. */
import { setTimeout as sleep } from 'node:timers/promises';

/** Shorter pauses are added to the next one: timers are not more precise. */
const LEAST_PAUSE_MS = 2;

export class Throttle {
  readonly #bytesPerMs: number;
  readonly #signal: AbortSignal | undefined;
  #freeAt = -Infinity;

  constructor(bytesPerSecond: number, signal?: AbortSignal) {
    this.#bytesPerMs = bytesPerSecond / 1000;
    this.#signal = signal;
  }

  /** Resolves when that many bytes may be read. Rejects when the signal is aborted. */
  async take(bytes: number): Promise<void> {
    this.#signal?.throwIfAborted();
    const now = performance.now();
    const at = Math.max(this.#freeAt, now);
    this.#freeAt = at + bytes / this.#bytesPerMs;
    if (at - now >= LEAST_PAUSE_MS) await sleep(at - now, undefined, { signal: this.#signal });
  }
}
