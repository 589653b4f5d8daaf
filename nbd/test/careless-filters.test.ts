/** Filters over a careless device: its thenables are waited for, and its nonsense reaches whoever checks it. */

import { describe, expect, test } from 'vitest';
import { ALLOCATION_CONTEXT, STATE_HOLE, STATE_ZERO, type CompleteDevice, type Device } from '../src/index.js';
import { completeDevice, type AnyDevice } from '../src/device.js';
import { cache } from '../src/filters/cache.js';
import { delay } from '../src/filters/delay.js';
import { errors } from '../src/filters/error.js';
import { overlay } from '../src/filters/overlay.js';
import { partition } from '../src/filters/partition.js';
import { readOnly } from '../src/filters/read-only.js';
import { stats } from '../src/filters/stats.js';
import { strays, turns } from './careless.js';

const SIZE = 8192;
const MODE = { noHole: false, fua: true, fastZero: false };

const FILTERS: Readonly<Record<string, (device: AnyDevice) => CompleteDevice>> = {
  completeDevice,
  cache,
  delay: (device) => delay(device, { readMs: 1, writeMs: 1 }),
  errors: (device) => errors(device, { rate: 0 }),
  overlay,
  partition: (device) => partition(device, { offset: 0 }),
  readOnly,
  stats,
};

/** A device that answers everything by `answer()`. */
const answering = (answer: () => unknown): AnyDevice => {
  const methods = ['read', 'write', 'flush', 'trim', 'zero', 'cache', 'extents', 'close'];
  return { size: SIZE, ...Object.fromEntries(methods.map((method) => [method, answer])) } as unknown as Device;
};

/** How each request of the device ends that reaches the one below. */
async function outcomes(device: CompleteDevice, filter: string): Promise<Record<string, string>> {
  const own = filter === 'overlay' ? ['write', 'flush', 'zero', 'trim'] : [];
  if (filter === 'readOnly') own.push('write', 'zero', 'trim');
  // A cache reads, and an overlay has no contexts but one.
  const requests: Readonly<Record<string, () => unknown>> = {
    read: () => device.read(0, Buffer.alloc(512)),
    write: () => device.write(512, Buffer.alloc(512), true),
    flush: () => device.flush(),
    zero: () => device.zero(0, 512, MODE),
    trim: () => device.trim(0, 512, true),
    cache: () => device.cache(0, 512),
    close: () => device.close('lost'),
  };
  const found: Record<string, string> = {};
  for (const [name, request] of Object.entries(requests)) {
    if (own.includes(name)) continue;
    try {
      await request();
      found[name] = 'done';
    } catch (error) {
      found[name] = (error as Error).message;
    }
  }
  return found;
}

describe.each(Object.entries(FILTERS))('%s', (name, filter) => {
  const all = (found: Record<string, string>, outcome: string): void => {
    expect(Object.keys(found).length).toBeGreaterThan(2);
    expect(found).toEqual(Object.fromEntries(Object.keys(found).map((request) => [request, outcome])));
  };
  // A `then` that returns nothing, as the plainest ones do.
  const later = (settle: (resolve: () => void, reject: (error: Error) => void) => void): unknown => ({
    then: (resolve: () => void, reject: (error: Error) => void) => void setImmediate(() => settle(resolve, reject)),
  });

  test('waits for thenables, which settle as they like', async () => {
    const uncaught = strays();
    const good = answering(() => later((resolve) => [1, 2].forEach(() => resolve())));
    all(await outcomes(filter(good), name), 'done');
    const bad = answering(() => later((_, reject) => [1, 2].forEach(() => reject(new Error('boom')))));
    all(await outcomes(filter(bad), name), 'boom');
    const throwing = answering(() => ({
      then: () => {
        throw new Error('boom');
      },
    }));
    all(await outcomes(filter(throwing), name), 'boom');
    await turns();
    expect(uncaught).toEqual([]);
  });

  test('is not made of a promise of a device', () => {
    expect(() => filter(Promise.resolve(good()) as unknown as AnyDevice)).toThrow(/a promise of one must be awaited/);
  });
});

const good = (): Device => ({ size: SIZE, read: () => undefined });

test('extents with a gap are not taken for the bytes in it', async () => {
  const device = overlay({
    ...good(),
    extents: (_, __, ___, sink) => void sink(4096, 4096, STATE_HOLE | STATE_ZERO),
  });
  const found: number[][] = [];
  await device.extents(ALLOCATION_CONTEXT, 0, SIZE, (...extent) => found.push(extent) > 0);
  // What begins too late is told as it is: the server refuses it.
  expect(found).toEqual([[4096, 4096, STATE_HOLE | STATE_ZERO]]);
});
