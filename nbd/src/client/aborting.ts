/** Signals of callers: the error of an aborted call, and calls that end early with it. No listener outlives its call. */

import { NbdClientError } from './client-error.js';

/** What a call fails with whose signal was aborted. */
export function abortError(what: string, signal: AbortSignal): NbdClientError {
  return new NbdClientError('ABORTED', `${what} was aborted`, { cause: signal.reason });
}

/** The callbacks of one signal. It has one listener: Node warns of a leak when a signal has more than ten. */
class AbortCallbacks {
  readonly callbacks = new Set<() => void>();

  readonly listener = (): void => {
    for (const callback of Array.from(this.callbacks)) callback();
  };
}

const callbacksOf = new WeakMap<AbortSignal, AbortCallbacks>();

/** `callback` is called when `signal` is aborted, until `offAbort`. It must not throw. */
export function onAbort(signal: AbortSignal, callback: () => void): void {
  let known = callbacksOf.get(signal);
  if (known === undefined) callbacksOf.set(signal, (known = new AbortCallbacks()));
  if (known.callbacks.size === 0) signal.addEventListener('abort', known.listener);
  known.callbacks.add(callback);
}

export function offAbort(signal: AbortSignal, callback: () => void): void {
  const known = callbacksOf.get(signal);
  if (known?.callbacks.delete(callback) && known.callbacks.size === 0) {
    signal.removeEventListener('abort', known.listener);
  }
}

/**
 * `work`, or the ABORTED error as soon as `signal` is aborted: the result of `work` is then dropped.
 * @param onEarlyEnd called first
 */
export function unlessAborted<T>(
  work: Promise<T>,
  signal: AbortSignal | undefined,
  what: string,
  onEarlyEnd?: () => void,
): Promise<T> {
  if (signal === undefined) return work;
  return new Promise((resolve, reject) => {
    const abort = (): void => {
      offAbort(signal, abort);
      onEarlyEnd?.();
      reject(abortError(what, signal));
    };
    if (signal.aborted) {
      // Its failure is of no interest any more.
      work.catch(() => undefined);
      abort();
      return;
    }
    onAbort(signal, abort);
    work.then(resolve, reject).finally(() => offAbort(signal, abort));
  });
}
