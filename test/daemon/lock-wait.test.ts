/** How long a command waits for a store that other processes hold. With fake timers. */
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { whileLocked } from '../../src/operations/open-operations.js';
import { StoreLockedError } from '../../src/store/local/store-lock.js';

beforeEach(() => void vi.useFakeTimers({ toFake: ['setTimeout', 'performance'] }));
afterEach(() => void vi.useRealTimers());

/** Seconds until a command gets the store after `holders` that hold it for `seconds` each; or the refusal. */
async function waitBehind(holders: number, seconds: number): Promise<number | string> {
  const begin = performance.now();
  const passed = (): number => (performance.now() - begin) / 1000;
  const attempt = (): Promise<number> => {
    const turn = Math.floor(passed() / seconds);
    if (turn < holders) throw new StoreLockedError('/store', { pid: 1000 + turn, role: 'command' });
    return Promise.resolve(Math.round(passed()));
  };
  const waiting = whileLocked(async () => attempt(), '/store/control.sock').catch(
    (error: unknown) => `${Math.round(passed())} s: ${(error as Error).message}`,
  );
  await vi.advanceTimersByTimeAsync(120_000);
  return waiting;
}

test('a command waits for its turn behind others that each have the store for a moment', async () => {
  expect(await waitBehind(1, 2)).toBe(2);
  expect(await waitBehind(6, 2)).toBe(12);
});

test('a process that keeps the store is named after three seconds, and no command waits for more than half a minute', async () => {
  expect(await waitBehind(1, 60)).toMatch(/^3 s: another command \(process 1000\) holds the store/);
  expect(await waitBehind(3, 60)).toMatch(/^3 s: /);
  expect(await waitBehind(100, 1)).toMatch(/^30 s: another command \(process 10(?:29|30)\) holds the store/);
});
