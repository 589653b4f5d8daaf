import { setImmediate } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { BufferPool } from '../src/server/buffer-pool.js';
import { DEFAULT_LIMITS } from '../src/server/limits.js';
import { LoopTime } from '../src/server/loop-time.js';
import { StallWatch } from '../src/server/stall-watch.js';
import { until } from './test-server.js';

test('time in which the server was stopped does not count, also not against clients that read no replies', async () => {
  const time = new LoopTime();
  const stopped = new LoopTime();
  stopped.stop();
  const closed: string[] = [];
  const client = { movedBytes: 0, waitsForClient: true, memoryBytes: 0, abort: (why: string) => closed.push(why) };
  const limits = { ...DEFAULT_LIMITS, stallTimeoutMs: 1300 };
  const watch = new StallWatch(() => [client], new BufferPool(limits.maxMemoryBytes), limits, time);
  const from = { time: time.now(), stopped: stopped.now() };
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1600);
  // Timers that are due run before any input is read.
  await setImmediate();
  expect(time.now() - from.time).toBeLessThan(1300);
  // A server that closes keeps to its grace time: there the time counts.
  expect(stopped.now() - from.stopped).toBeGreaterThanOrEqual(1600);
  expect(closed).toEqual([]);
  await until(() => closed.length > 0, 'the time limit of the client has passed');
  watch.stop();
  time.stop();
});
