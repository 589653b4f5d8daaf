/**
 * Work that is given up when its client goes. It owns the listeners: one on each signal, however many requests of a connection
 * wait, because Node warns about the eleventh, and each costs time to remove.
 */

const waiting = new WeakMap<AbortSignal, Set<() => void>>();

/**
 * Call `giveUp` when `signal` is aborted, at once if it is already. Returns a function that must be called when the work has
 * ended. `giveUp` must not throw.
 */
export function onAbort(signal: AbortSignal | undefined, giveUp: () => void): () => void {
  if (signal === undefined) return () => undefined;
  if (signal.aborted) {
    giveUp();
    return () => undefined;
  }
  let callbacks = waiting.get(signal);
  if (callbacks === undefined) {
    const added = new Set<() => void>();
    callbacks = added;
    waiting.set(signal, added);
    signal.addEventListener(
      'abort',
      () => {
        for (const each of [...added]) each();
        added.clear();
      },
      { once: true },
    );
  }
  // The same function may be given for two requests.
  const callback = (): void => giveUp();
  callbacks.add(callback);
  return () => void waiting.get(signal)?.delete(callback);
}
