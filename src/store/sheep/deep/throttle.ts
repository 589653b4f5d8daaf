/** So many bytes a second, for all who ask. Owns the time at which the next may go on. */
import { setTimeout as sleep } from 'node:timers/promises';

/** A pause shorter than this is left for later: timers are no finer. */
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
