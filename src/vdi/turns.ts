/**
 * Turns on names: work that says which names it is about waits for all that came before and is about one of them, and for
 * nothing else; some work is about everything. Owns the order. Whoever has a turn must not ask for another one.
 */
export class Turns {
  /** By name: settles when all that was asked for so far is done. Never fails. */
  readonly #last = new Map<string, Promise<unknown>>();
  /** Of what was about everything. */
  #lastOfAll: Promise<unknown> = Promise.resolve();

  /** Run `work` as the only one on these names. */
  take<T>(names: Iterable<string>, work: () => Promise<T>): Promise<T> {
    const own = new Set(names);
    const before = [this.#lastOfAll];
    for (const name of own) before.push(this.#last.get(name) ?? NOTHING);
    const { result, settled } = after(before, work);
    for (const name of own) this.#last.set(name, settled);
    void settled.then(() => {
      for (const name of own) if (this.#last.get(name) === settled) this.#last.delete(name);
    });
    return result;
  }

  /** Run `work` as the only one at all. */
  takeAll<T>(work: () => Promise<T>): Promise<T> {
    const { result, settled } = after([this.#lastOfAll, ...this.#last.values()], work);
    this.#lastOfAll = settled;
    return result;
  }
}

const NOTHING = Promise.resolve();

function after<T>(
  before: readonly Promise<unknown>[],
  work: () => Promise<T>,
): { readonly result: Promise<T>; readonly settled: Promise<unknown> } {
  const result = Promise.all(before).then(work);
  return { result, settled: result.catch(() => undefined) };
}
