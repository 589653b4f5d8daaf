/** Waiting for the end of a client: one listener, however many wait. */

import { getEventListeners } from 'node:events';
import { expect, test } from 'vitest';
import { onAbort } from '../src/on-abort.js';

test('all who wait are told once, except those whose work has ended', () => {
  const gone = new AbortController();
  const told: number[] = [];
  const give = Array.from({ length: 20 }, (_, at) => onAbort(gone.signal, () => told.push(at)));
  expect(getEventListeners(gone.signal, 'abort').length).toBe(1);
  for (const end of give.slice(2)) end();
  gone.abort();
  gone.abort();
  expect(told).toEqual([0, 1]);
  onAbort(gone.signal, () => told.push(2));
  expect(told).toEqual([0, 1, 2]);
  onAbort(undefined, () => told.push(3))();
  expect(told).toEqual([0, 1, 2]);
});
