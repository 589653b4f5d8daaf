/** Disks in memory: what they cost, what they give back, what they refuse. */

import { expect, test } from 'vitest';
import { STATE_HOLE, STATE_ZERO, type CompleteDevice } from '../src/index.js';
import { memoryDevice } from '../src/devices/memory.js';
import { readShortfall } from '../src/transferred.js';

const PAGE = 32 * 1024;
const TIB = 2 ** 40;
const MODE = { noHole: false, fua: false, fastZero: false };
const HOLE = STATE_HOLE | STATE_ZERO;

async function extentsOf(device: CompleteDevice, offset = 0, length = device.geometry.size): Promise<number[][]> {
  const found: number[][] = [];
  await device.extents('base:allocation', offset, length, (...extent) => found.push(extent) > 0);
  return found;
}

test('a disk of 1 PiB costs nothing, and its extents are told at once', async () => {
  const device = memoryDevice(1024 * TIB);
  expect(device.allocatedBytes).toBe(0);
  expect(await extentsOf(device)).toEqual([[0, 1024 * TIB, HOLE]]);
  await device.write(7 * TIB + 5, Buffer.from('x'), false);
  await device.write(900 * TIB, Buffer.alloc(2 * PAGE), false);
  expect(device.allocatedBytes).toBe(3 * PAGE);
  expect(await extentsOf(device)).toEqual([
    [0, 7 * TIB, HOLE],
    [7 * TIB, PAGE, 0],
    [7 * TIB + PAGE, 893 * TIB - PAGE, HOLE],
    [900 * TIB, 2 * PAGE, 0],
    [900 * TIB + 2 * PAGE, 124 * TIB - 2 * PAGE, HOLE],
  ]);
  await device.zero(0, 1024 * TIB, MODE);
  expect(device.allocatedBytes).toBe(0);
});

test('zeros and trims give whole pages back, and clear parts of pages', async () => {
  const device = memoryDevice(10 * PAGE + 100);
  await device.write(0, Buffer.alloc(10 * PAGE + 100, 1), false);
  expect(device.allocatedBytes).toBe(11 * PAGE);
  await device.trim(PAGE - 1, 2 * PAGE + 2, false);
  expect(await extentsOf(device)).toEqual([
    [0, PAGE, 0],
    [PAGE, 2 * PAGE, HOLE],
    [3 * PAGE, 7 * PAGE + 100, 0],
  ]);
  // The last page is smaller on the disk.
  await device.zero(10 * PAGE, 100, MODE);
  expect(device.allocatedBytes).toBe(8 * PAGE);
  expect(device.isHole?.(PAGE, 2 * PAGE)).toBe(true);
  expect(device.isHole?.(PAGE - 1, 2 * PAGE)).toBe(false);
  const into = Buffer.alloc(4);
  await device.read(PAGE - 2, into);
  expect([...into]).toEqual([1, 0, 0, 0]);
});

test('zeros that must stay allocated keep their pages', async () => {
  const device = memoryDevice(4 * PAGE);
  await device.write(0, Buffer.alloc(2 * PAGE, 1), false);
  await device.zero(0, 4 * PAGE, { ...MODE, noHole: true });
  expect(device.allocatedBytes).toBe(2 * PAGE);
  const into = Buffer.alloc(4 * PAGE, 1);
  await device.read(0, into);
  expect(into.every((byte) => byte === 0)).toBe(true);
});

test('more than maxBytes is ENOSPC at the offset where it ends, until pages are given back', async () => {
  const device = memoryDevice({ size: TIB, maxBytes: 2 * PAGE + 100 });
  const data = Buffer.alloc(3 * PAGE, 1);
  expect(() => device.write(0, data, false)).toThrow(expect.objectContaining({ code: 'ENOSPC', offset: 2 * PAGE }));
  await device.write(0, data.subarray(0, 2 * PAGE), false);
  await device.trim(0, PAGE, false);
  await device.write(TIB - 1, Buffer.from('x'), false);
  expect(device.allocatedBytes).toBe(2 * PAGE);
});

test('as much as the size is enough for all of the disk', async () => {
  for (const size of [1, 10_000, PAGE + 1]) {
    const device = memoryDevice({ size, maxBytes: size });
    await device.write(0, Buffer.alloc(size, 1), false);
    const into = Buffer.alloc(1);
    await device.read(size - 1, into);
    expect(into[0]).toBe(1);
  }
});

test('memory of the caller is read and written in place', async () => {
  const memory = new Uint8Array(10).fill(7);
  const device = memoryDevice(memory.subarray(2, 8));
  expect(device.geometry).toMatchObject({ size: 6, canZero: true, canTrim: false, contexts: [], multiConn: false });
  await device.write(1, Buffer.from([1, 2]), true);
  await device.zero(4, 2, MODE);
  expect([...memory]).toEqual([7, 7, 7, 1, 2, 7, 0, 0, 7, 7]);
});

test('memory that the caller has made smaller since is not read as if it were there', () => {
  const memory = new ArrayBuffer(8192, { maxByteLength: 8192 });
  const device = memoryDevice(new Uint8Array(memory));
  memory.resize(4096);
  const into = Buffer.alloc(512);
  expect(readShortfall(device.read(4000, into), into)).toBe('read returned 96 for 512 bytes');
});

test('what is announced for several connections is the choice of the caller', () => {
  expect(memoryDevice({ size: 1, multiConn: true }).geometry.multiConn).toBe(true);
  for (const size of [-1, 1.5, NaN, 2 ** 53]) expect(() => memoryDevice(size)).toThrow(RangeError);
  expect(() => memoryDevice({ size: 1, maxBytes: -1 })).toThrow(RangeError);
});

test('it answers synchronously, and keeps its data when it is closed', async () => {
  const device = memoryDevice(100_000);
  expect(device.write(0, Buffer.from('kept'), true)).toBeUndefined();
  expect(device.flush()).toBeUndefined();
  expect(device.close('disconnect')).toBeUndefined();
  const into = Buffer.alloc(4);
  expect(device.read(0, into)).toBeUndefined();
  expect(into.toString()).toBe('kept');
  await device.close('lost');
});
