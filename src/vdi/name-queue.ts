/**
 * Queues by name: an operation says which names it is about, waits for the earlier operations on those names, and for no
 * others. An operation may also be about all names. Owns the order. An operation must not queue another one and wait for it:
 * that would wait for itself.
 */
export class NameQueue {
  /** By name: settles when every operation queued so far has ended. Never rejects. */
  readonly #last = new Map<string, Promise<unknown>>();
  /** The same for operations on all names. */
  #lastOfAll: Promise<unknown> = Promise.resolve();

  /** Run `work` as the only operation on these names. */
  run<T>(names: Iterable<string>, work: () => Promise<T>): Promise<T> {
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

  /** Run `work` as the only operation at all. */
  runAlone<T>(work: () => Promise<T>): Promise<T> {
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
