/**
 * Work on objects, by key: turns, of which each object has one at a time, and work that is counted only. Owns who waits for
 * whom. Knows nothing of what the work is.
 */
import type { Awaitable } from '../vdi-record.js';

export class KeyTurns {
  /** The last turn that was asked for. It never rejects. */
  readonly #turns = new Map<number, Promise<void>>();
  readonly #busy = new Map<number, { count: number; waiters: (() => void)[] }>();

  /** Whether a turn is taken or waited for. */
  isTaken(key: number): boolean {
    return this.#turns.size > 0 && this.#turns.has(key);
  }

  /** Do `work` alone among the turns of the object, after those asked for before. */
  run<T>(key: number, work: () => Awaitable<T>): Promise<T> {
    const before = this.#turns.get(key) ?? Promise.resolve();
    const result = before.then(work);
    const ended = result.then(
      () => undefined,
      () => undefined,
    );
    const turn = ended.then(() => {
      if (this.#turns.get(key) === turn) this.#turns.delete(key);
    });
    this.#turns.set(key, turn);
    return result;
  }

  /** Count `work` on the object until it has ended. Returns the same. */
  async during(key: number, work: Promise<void>): Promise<void> {
    let busy = this.#busy.get(key);
    if (busy === undefined) this.#busy.set(key, (busy = { count: 0, waiters: [] }));
    busy.count++;
    try {
      await work;
    } finally {
      busy.count--;
      if (busy.count === 0) {
        this.#busy.delete(key);
        for (const wake of busy.waiters) wake();
      }
    }
  }

  /** Resolves when no counted work is under way, turns apart; undefined if none is. */
  uncounted(key: number): Promise<void> | undefined {
    const busy = this.#busy.get(key);
    if (busy === undefined) return undefined;
    return new Promise((resolve) => busy.waiters.push(resolve));
  }

  /** Resolves when nothing is under way; undefined if nothing is. */
  idle(key: number): Promise<void> | undefined {
    const turn = this.#turns.get(key);
    if (turn !== undefined) return turn.then(() => this.idle(key));
    const busy = this.uncounted(key);
    return busy?.then(() => this.idle(key));
  }
}
