/** Timers of any length: those of Node are due at once if they are longer than 2^31-1 ms. It owns that limit. */

/** The longest timer, milliseconds: 24.8 days. */
export const LONGEST_TIMER_MS = 2 ** 31 - 1;

/** Whether `work` is done within `timeoutMs`; Infinity: however long it takes. */
export async function within(timeoutMs: number, work: Promise<unknown>): Promise<boolean> {
  if (timeoutMs > LONGEST_TIMER_MS) {
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
