/**
 * A clock that stands still while a workload is recorded, so that a slow computer does not change what happens: code that looks
 * how long something took sees no time pass, and long timers fire only when the workload lets time pass. Owns the replaced
 * functions, and puts the real ones back.
 */

/** Shorter timers are about turns of the event loop, and stay real. */
const LONG_MS = 500;

export interface StillClock {
  /** All long timers that are set fire. */
  pass(): void;
}

export async function withStillClock<T>(work: (clock: StillClock) => Promise<T>): Promise<T> {
  const { setTimeout: realSet, clearTimeout: realClear } = globalThis;
  const realNow = performance.now.bind(performance);
  const still = realNow();
  const waiting = new Map<object, () => void>();
  const set = (call: (...args: unknown[]) => void, ms?: number, ...args: unknown[]): unknown => {
    if ((ms ?? 0) < LONG_MS) return realSet(call, ms, ...args);
    const timer = { ref: () => timer, unref: () => timer, hasRef: () => false, refresh: () => timer };
    waiting.set(timer, () => call(...args));
    return timer;
  };
  const clear = (timer: unknown): void => {
    if (typeof timer !== 'object' || timer === null || !waiting.delete(timer)) realClear(timer as NodeJS.Timeout);
  };
  Object.assign(globalThis, { setTimeout: set, clearTimeout: clear });
  performance.now = () => still;
  try {
    return await work({
      pass: () => {
        const due = [...waiting.values()];
        waiting.clear();
        for (const call of due) call();
      },
    });
  } finally {
    Object.assign(globalThis, { setTimeout: realSet, clearTimeout: realClear });
    performance.now = realNow;
  }
}
