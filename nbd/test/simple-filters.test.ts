/** The filters read-only, partition, delay, errors and stats: what the conformance suite does not show. */

import { expect, test, vi } from 'vitest';
import { DeviceError, type CompleteDevice } from '../src/index.js';
import { memoryDevice } from '../src/devices/memory.js';
import { delay } from '../src/filters/delay.js';
import { errors, type CandidateRequest } from '../src/filters/error.js';
import { partition } from '../src/filters/partition.js';
import { readOnly } from '../src/filters/read-only.js';
import { stats } from '../src/filters/stats.js';
import { ModelDevice } from './model-device.js';
import { Gate } from './test-device.js';

const MODE = { noHole: false, fua: false, fastZero: false };
const content = Buffer.alloc(100_000, 1);

test('a read-only device refuses changes with EPERM', () => {
  const device = readOnly(new ModelDevice(content));
  expect(device.geometry).toMatchObject({
    readOnly: true,
    canFua: false,
    canTrim: false,
    canZero: false,
    canFlush: true,
  });
  const refused = expect.objectContaining({ code: 'EPERM' }) as unknown as Error;
  expect(() => device.write(0, Buffer.alloc(1), false)).toThrow(refused);
  expect(() => device.zero(0, 1, MODE)).toThrow(refused);
  expect(() => device.trim(0, 1, false)).toThrow(refused);
});

test('a partition is inside its device, at multiples of the minimum block size', () => {
  const device = { size: 10_240, minimumBlockSize: 512, read: () => undefined };
  expect(partition(device, { offset: 1024 }).geometry.size).toBe(9216);
  expect(partition(device, { offset: 10_240, length: 0 }).geometry.size).toBe(0);
  for (const range of [
    { offset: -512 },
    { offset: 10_752 },
    { offset: 512, length: 10_240 },
    { offset: 0.5, length: 512 },
    { offset: NaN },
    { offset: 0, length: -512 },
    { offset: 100, length: 512 },
    { offset: 512, length: 100 },
  ]) {
    expect(() => partition(device, range)).toThrow(RangeError);
  }
});

test('a partition never reaches what is beside it, even if nobody has checked the request', () => {
  const inner = new ModelDevice(content);
  const device = partition(inner, { offset: 1000, length: 2000 });
  inner.calls.length = 0;
  const refused = expect.objectContaining({ code: 'EINVAL' }) as unknown as Error;
  expect(() => device.read(1999, Buffer.alloc(2))).toThrow(refused);
  expect(() => device.write(-1, Buffer.alloc(2), false)).toThrow(refused);
  expect(() => device.zero(0, 2001, MODE)).toThrow(refused);
  expect(inner.calls).toEqual([]);
});

test('requests are delayed side by side, each kind by its own time', async () => {
  vi.useFakeTimers();
  try {
    const inner = new ModelDevice(content);
    const device = delay(inner, { readMs: 100, flushMs: 50 });
    expect(device.isHole).toBeUndefined();
    expect(device.write(0, Buffer.alloc(1), false)).not.toBeInstanceOf(Promise);
    const ended: string[] = [];
    void Promise.resolve(device.read(0, Buffer.alloc(9))).then(() => ended.push('read'));
    void Promise.resolve(device.read(9, Buffer.alloc(9))).then(() => ended.push('read'));
    void Promise.resolve(device.flush()).then(() => ended.push('flush'));
    await vi.advanceTimersByTimeAsync(99);
    expect(ended).toEqual(['flush']);
    await vi.advanceTimersByTimeAsync(1);
    expect(ended).toEqual(['flush', 'read', 'read']);
  } finally {
    vi.useRealTimers();
  }
});

test('a delayed request whose client goes fails at once, and reaches nothing', async () => {
  const inner = new ModelDevice(content);
  const device = delay(inner, { writeMs: 1_000_000 });
  const gone = new AbortController();
  const writes = Array.from({ length: 30 }, async () => device.write(0, Buffer.alloc(1, 9), false, gone.signal));
  gone.abort();
  for (const { status } of await Promise.allSettled(writes)) expect(status).toBe('rejected');
  await expect(device.write(0, Buffer.alloc(1), false, gone.signal)).rejects.toMatchObject({ code: 'ESHUTDOWN' });
  expect(inner.calls).toEqual([]);
  for (const readMs of [-1, NaN, 2 ** 31]) expect(() => delay(inner, { readMs })).toThrow(RangeError);
});

/** Which of so many reads fail. */
function failedReads(options: Parameters<typeof errors>[1], count = 1000): number[] {
  const device = errors(memoryDevice(100), options);
  return Array.from({ length: count }, (_, at) => at).filter(() => {
    try {
      void device.read(0, Buffer.alloc(1));
      return false;
    } catch (error) {
      expect(error).toBeInstanceOf(DeviceError);
      return true;
    }
  });
}

test('a part of the requests fails, and the same with the same seed', () => {
  const some = failedReads({ rate: 0.1, seed: 7 });
  expect(some.length).toBeGreaterThan(60);
  expect(some.length).toBeLessThan(140);
  expect(failedReads({ rate: 0.1, seed: 7 })).toEqual(some);
  expect(failedReads({ rate: 0.1, seed: 8 })).not.toEqual(some);
  expect(failedReads({ rate: 0 })).toEqual([]);
  expect(failedReads({}).length).toBe(1000);
  for (const rate of [-0.1, 1.1, NaN]) expect(() => errors(memoryDevice(1), { rate })).toThrow(RangeError);
});

test('the requests that fail are chosen by method, by a function, and by both', async () => {
  const asked: CandidateRequest[] = [];
  const device = errors(new ModelDevice(content), {
    methods: ['write', 'flush'],
    code: 'ENOSPC',
    when: (request) => {
      asked.push(request);
      return request.count >= 1;
    },
  });
  expect(device.isHole).toBeDefined();
  await device.read(0, Buffer.alloc(1));
  await device.write(512, Buffer.alloc(3), false);
  expect(() => device.flush()).toThrow(expect.objectContaining({ code: 'ENOSPC', message: 'flush fails for a test' }));
  expect(asked).toEqual([
    { method: 'write', offset: 512, length: 3, count: 0 },
    { method: 'flush', offset: 0, length: 0, count: 1 },
  ]);
  expect(errors(new ModelDevice(content)).isHole).toBeUndefined();
});

test('methods and codes that do not exist are refused, and a `when` without an answer names nothing', () => {
  const given = (options: object): CompleteDevice => errors(memoryDevice(512), options);
  expect(() => given({ code: 'EROFS' })).toThrow(/code EROFS/);
  expect(() => given({ methods: ['reads'] })).toThrow(/methods: reads/);
  expect(given({ when: () => undefined }).read(0, Buffer.alloc(1))).toBeUndefined();
});

test('requests, bytes, errors and durations are counted, at once or later', async () => {
  const gate = new Gate();
  const inner = new ModelDevice(content);
  const device = stats({
    geometry: inner.geometry,
    read: (offset, into) => inner.read(offset, into),
    write: () => gate.opened,
    flush: () => {
      throw new Error('no');
    },
    close: () => undefined,
  });
  await device.read(0, Buffer.alloc(100));
  await device.read(0, Buffer.alloc(50));
  inner.carelessness = 'short';
  await device.read(0, Buffer.alloc(50));
  expect(device.counters.read).toMatchObject({ requests: 3, errors: 1, bytes: 150, inFlight: 0 });
  expect(device.counters.read.durations.reduce((sum, count) => sum + count)).toBe(3);
  const writes = [device.write(0, Buffer.alloc(7), false), device.write(0, Buffer.alloc(7), false)];
  expect(device.counters.write).toMatchObject({ requests: 0, inFlight: 2 });
  gate.fail(new Error('later'));
  await Promise.allSettled(writes.map(async (write) => write));
  expect(device.counters.write).toMatchObject({ requests: 2, errors: 2, bytes: 0, inFlight: 0 });
  expect(() => device.flush()).toThrow('no');
  expect(device.counters.flush).toMatchObject({ requests: 1, errors: 1 });
  expect(device.counters.trim).toMatchObject({ requests: 0, totalMs: 0 });
});

test('a duration is counted in the bucket of its power of two of microseconds', async () => {
  const now = vi.spyOn(performance, 'now');
  try {
    const device = stats(memoryDevice(100));
    for (const ms of [0, 0.001, 0.0015, 1, 100_000_000]) {
      now.mockReturnValueOnce(5).mockReturnValueOnce(5 + ms);
      await device.read(0, Buffer.alloc(1));
    }
    const { durations } = device.counters.read;
    expect(durations.flatMap((count, bucket) => (count > 0 ? [[bucket, count]] : []))).toEqual([
      [0, 1],
      [1, 2],
      [10, 1],
      [26, 1],
    ]);
  } finally {
    now.mockRestore();
  }
});
