/** The overlay: what hides what is below, what it costs, and changes of one block at once. */

import { expect, test } from 'vitest';
import { DeviceError, STATE_HOLE, STATE_ZERO, type CompleteDevice } from '../src/index.js';
import { memoryDevice } from '../src/devices/memory.js';
import { overlay } from '../src/filters/overlay.js';
import { ModelDevice } from './model-device.js';
import { Gate } from './test-device.js';

const BLOCK = 4096;
const MODE = { noHole: false, fua: false, fastZero: false };
const HOLE = STATE_HOLE | STATE_ZERO;

async function extentsOf(device: CompleteDevice, offset = 0, length = device.geometry.size): Promise<number[][]> {
  const found: number[][] = [];
  await device.extents('base:allocation', offset, length, (...extent) => found.push(extent) > 0);
  return found;
}

async function byteAt(device: CompleteDevice, offset: number): Promise<number | undefined> {
  const into = Buffer.alloc(1);
  await device.read(offset, into);
  return into[0];
}

test('changes hide what is below, in the extents as well', async () => {
  const PAGE = 32 * 1024;
  const base = memoryDevice(8 * PAGE);
  void base.write(0, Buffer.alloc(4 * PAGE, 1), false);
  const device = overlay(base);
  expect(await extentsOf(device)).toEqual([
    [0, 4 * PAGE, 0],
    [4 * PAGE, 4 * PAGE, HOLE],
  ]);
  await device.zero(BLOCK, 2 * BLOCK, MODE);
  await device.trim(5 * BLOCK, BLOCK, false);
  await device.write(6 * PAGE, Buffer.alloc(BLOCK, 2), false);
  await device.write(6 * BLOCK, Buffer.alloc(BLOCK, 3), false);
  expect(await extentsOf(device)).toEqual([
    [0, BLOCK, 0],
    [BLOCK, 2 * BLOCK, HOLE],
    [3 * BLOCK, 2 * BLOCK, 0],
    [5 * BLOCK, BLOCK, HOLE],
    [6 * BLOCK, BLOCK, 0],
    [7 * BLOCK, 4 * PAGE - 7 * BLOCK, 0],
    [4 * PAGE, 2 * PAGE, HOLE],
    [6 * PAGE, BLOCK, 0],
    [6 * PAGE + BLOCK, 2 * PAGE - BLOCK, HOLE],
  ]);
  expect(device.isHole?.(BLOCK, 2 * BLOCK)).toBe(true);
  expect(device.isHole?.(5 * PAGE, PAGE)).toBe(true);
  expect(device.isHole?.(5 * PAGE, PAGE + 1)).toBe(false);
  // A write into zeros reads nothing from below.
  await device.write(BLOCK + 10, Buffer.from([9]), false);
  expect(await byteAt(device, BLOCK + 9)).toBe(0);
  expect(await byteAt(base, BLOCK + 10)).toBe(1);
});

test('a base without extents is all data', async () => {
  const device = overlay({ size: 4 * BLOCK, read: () => undefined });
  await device.zero(0, BLOCK, MODE);
  expect(device.geometry).toMatchObject({ readOnly: false, canFlush: true, multiConn: false });
  expect(await extentsOf(device)).toEqual([
    [0, BLOCK, HOLE],
    [BLOCK, 3 * BLOCK, 0],
  ]);
});

test('zeros of a huge disk cost one range, and changes have a bound', async () => {
  const device = overlay(memoryDevice(2 ** 50), { maxBytes: 2 * BLOCK + 100 });
  await device.zero(0, 2 ** 50, MODE);
  expect(device.allocatedBytes).toBeLessThan(100);
  expect(await extentsOf(device)).toEqual([[0, 2 ** 50, HOLE]]);
  await device.write(100, Buffer.alloc(2 * BLOCK - 200, 1), false);
  const space = { code: 'ENOSPC', offset: 2 * BLOCK };
  expect(() => device.write(BLOCK, Buffer.alloc(2 * BLOCK), false)).toThrow(expect.objectContaining(space));
  await device.trim(0, BLOCK, false);
  await device.write(2 * BLOCK, Buffer.alloc(BLOCK), false);
});

test('a bound holds for blocks that are being read, too', async () => {
  const gate = new Gate();
  const device = overlay({ size: 4 * BLOCK, read: () => gate.opened }, { maxBytes: BLOCK });
  const first = device.write(1, Buffer.from('a'), false);
  await expect(device.write(BLOCK + 1, Buffer.from('a'), false)).rejects.toMatchObject({
    code: 'ENOSPC',
    offset: BLOCK + 1,
  });
  gate.open();
  await first;
  expect(device.allocatedBytes).toBe(BLOCK);
});

test('a bound holds if others take the memory while a block is read', async () => {
  const gate = new Gate();
  const device = overlay({ size: 4 * BLOCK, read: () => gate.opened }, { maxBytes: 2 * BLOCK });
  const part = device.write(1, Buffer.from('a'), false);
  await device.write(BLOCK, Buffer.alloc(2 * BLOCK), false);
  gate.open();
  await expect(part).rejects.toMatchObject({ code: 'ENOSPC', offset: 1 });
  expect(device.allocatedBytes).toBe(2 * BLOCK);
});

test('what is full can be trimmed and zeroed', async () => {
  const device = overlay(memoryDevice(8 * BLOCK), { maxBytes: 2 * BLOCK });
  await device.write(0, Buffer.alloc(2 * BLOCK, 1), false);
  expect(() => device.trim(4 * BLOCK, BLOCK, false)).toThrow(expect.objectContaining({ code: 'ENOSPC' }));
  await device.trim(0, BLOCK, false);
  await device.zero(0, 2 * BLOCK, MODE);
  expect(device.allocatedBytes).toBeLessThan(BLOCK);
});

test('each request that waits for a block that cannot be read is told where its own change ends', async () => {
  const gate = new Gate();
  const device = overlay({ size: BLOCK, read: () => gate.opened });
  const changes = [700, 20].map(async (at) => device.write(at, Buffer.alloc(1000), false));
  gate.fail(new DeviceError('EIO', 'unreadable', { offset: 900 }));
  const failed = await Promise.allSettled(changes);
  expect(failed).toMatchObject([700, 20].map((offset) => ({ reason: { code: 'EIO', message: 'unreadable', offset } })));
});

test('changes of one block at once, while it is read from below, are all kept', async () => {
  const gate = new Gate();
  let reads = 0;
  const base = {
    size: 4 * BLOCK,
    read: async (_: number, into: Buffer) => {
      reads++;
      await gate.opened;
      into.fill(1);
    },
  };
  const device = overlay(base);
  const changes = [
    device.write(10, Buffer.from([2]), false),
    device.write(20, Buffer.from([3]), false),
    device.zero(30, 1, MODE),
    // Two blocks that are changed as a whole while they are read.
    device.write(BLOCK + 1, Buffer.from([4]), false),
    device.write(BLOCK, Buffer.alloc(BLOCK, 5), false),
    device.write(2 * BLOCK + 1, Buffer.from([6]), false),
    device.zero(2 * BLOCK, BLOCK, MODE),
  ];
  gate.open();
  await Promise.all(changes.map(async (change) => change));
  expect(reads).toBe(3);
  const found = await Promise.all([10, 20, 30, 31, BLOCK, 2 * BLOCK, 2 * BLOCK + 1].map((at) => byteAt(device, at)));
  // The writes of one byte and those of the whole block were in flight together: either may be the later one.
  expect(found).toEqual([2, 3, 0, 1, 5, 0, 6]);
});

test('a block that cannot be read is not changed, and the next try reads it again', async () => {
  let isBroken = true;
  const device = overlay({
    size: 2 * BLOCK,
    read: (_, into) => {
      if (isBroken) throw Object.assign(new Error('unreadable'), { code: 'EIO' });
      into.fill(1);
    },
  });
  await expect(device.write(1, Buffer.from([2]), false)).rejects.toThrow('unreadable');
  expect(device.allocatedBytes).toBe(0);
  isBroken = false;
  await device.write(1, Buffer.from([2]), false);
  expect([await byteAt(device, 0), await byteAt(device, 1)]).toEqual([1, 2]);
});

test('blocks are as large as the minimum block size at least, and a power of two', () => {
  const device = overlay({ size: 65536 * 4, minimumBlockSize: 65536, read: () => undefined });
  void device.write(0, Buffer.alloc(65536), false);
  expect(device.allocatedBytes).toBe(65536);
  for (const blockSize of [0, 511, 3000, NaN])
    expect(() => overlay(memoryDevice(1), { blockSize })).toThrow(RangeError);
});

test.each([false, true])(
  'thousands of pieces are told in one answer (a base that answers later: %s)',
  async (isAsync) => {
    const COUNT = 20_000;
    const device = overlay(new ModelDevice(Buffer.alloc(2 * COUNT * 512, 1), { isAsync }), { blockSize: 512 });
    const data = Buffer.alloc(512);
    for (let at = 0; at < COUNT; at++) await device.write(2 * at * 512, data, false);
    expect((await extentsOf(device)).length).toBe(2 * COUNT);
  },
);
