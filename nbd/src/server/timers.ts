/** Waiting for no longer than a time, or than a signal allows. It owns nothing, and stops no work. */

import { MAX_TIMER_MS } from './limits.js';

/** Whether `work` is done within `timeoutMs`; a time longer than a timer can wait has no end. */
export async function within(timeoutMs: number, work: Promise<unknown>): Promise<boolean> {
  if (timeoutMs > MAX_TIMER_MS) {
    await work;
    return true;
  }
  let timer: NodeJS.Timeout | undefined;
  const timeout = new Promise<boolean>((resolve) => {
    timer = setTimeout(() => resolve(false), timeoutMs);
  });
  try {
    return await Promise.race([work.then(() => true), timeout]);
  } finally {
    clearTimeout(timer);
  }
}

/** `work`, or a rejection with the reason of `signal` if that is aborted before. The work goes on. */
export async function unlessAborted<T>(work: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (signal === undefined) return work;
  signal.throwIfAborted();
  let onAbort = (): void => undefined;
  const aborted = new Promise<never>((_, reject) => {
    onAbort = (): void => reject(signal.reason as Error);
    signal.addEventListener('abort', onAbort, { once: true });
  });
  try {
    return await Promise.race([work, aborted]);
  } finally {
    signal.removeEventListener('abort', onAbort);
  }
}
