/** The small interface of a device, completed: what it announces, FUA by flush, zeros by write, and counts of bytes. */

import { setImmediate } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { completeDevice, DeviceError, type Device } from '../src/index.js';
import { readShortfall, writeShortfall } from '../src/transferred.js';

const NO_MODE = { noHole: false, fua: false, fastZero: false };

/** A device that notes its calls. */
function noting(extra: Partial<Device> = {}): { readonly device: Device; readonly calls: string[] } {
  const calls: string[] = [];
  const device: Device = {
    size: 8 * 1024 * 1024,
    read: (_, into) => void into.fill(1),
    write: (offset, data, fua) => void calls.push(`write ${offset} ${data.length} ${fua}`),
    flush: () => void calls.push('flush'),
    ...extra,
  };
  return { device, calls };
}

test('a size and read make a read-only device', () => {
  const device = completeDevice({ size: 512, read: () => undefined });
  expect(device.geometry).toMatchObject({
    ...{ size: 512, readOnly: true, canFlush: false, canFua: false, canZero: false, canTrim: false, contexts: [] },
    ...{ minimumBlockSize: 1, preferredBlockSize: 4096, multiConn: false },
  });
  expect(device.isHole).toBeUndefined();
  expect(() => device.write(0, Buffer.alloc(1), false)).toThrow(DeviceError);
  expect(() => device.trim(0, 1, false)).toThrow(/no method trim/);
});

test('methods are announced, and fields beside them count more', () => {
  const { device } = noting({ extents: () => undefined, trim: () => undefined, cache: () => undefined });
  const all = { readOnly: false, canFlush: true, canFua: true, canZero: true, canTrim: true, canCache: true };
  expect(completeDevice(device).geometry).toMatchObject({ ...all, contexts: ['base:allocation'] });
  const fields = { canFua: false, canZero: false, multiConn: true, minimumBlockSize: 512, contexts: ['me:mine'] };
  expect(completeDevice({ ...device, ...fields }).geometry).toMatchObject(fields);
  const { write, ...unwritten } = device;
  expect(write).toBeDefined();
  expect(completeDevice(unwritten).geometry).toMatchObject({ readOnly: true, canFua: false, canTrim: false });
});

test('a write with FUA is followed by a flush, unless the device obeys FUA itself', async () => {
  const { device, calls } = noting();
  await completeDevice(device).write(0, Buffer.alloc(3), true);
  await completeDevice(device).write(8, Buffer.alloc(3), false);
  await completeDevice({ ...device, canFua: true }).write(16, Buffer.alloc(3), true);
  expect(calls).toEqual(['write 0 3 false', 'flush', 'write 8 3 false', 'write 16 3 true']);
});

test('zeros are written in pieces, and flushed for FUA', async () => {
  const { device, calls } = noting();
  const MIB = 1024 * 1024;
  await completeDevice(device).zero(512, 2 * MIB + 512, { ...NO_MODE, fua: true });
  const pieces = [`write 512 ${MIB} false`, `write ${512 + MIB} ${MIB} false`, `write ${512 + 2 * MIB} 512 false`];
  expect(calls).toEqual([...pieces, 'flush']);
  await expect(completeDevice(device).zero(0, 1, { ...NO_MODE, fastZero: true })).rejects.toMatchObject({
    code: 'ENOTSUP',
  });
});

test('while zeros are written the event loop turns, and an abort ends it', async () => {
  let pieces = 0;
  const write = (): void => {
    pieces++;
    // As long as a device in memory needs for a piece.
    for (const end = performance.now() + 1; performance.now() < end;);
  };
  const stop = new AbortController();
  const device = completeDevice(noting({ size: 2 ** 30, write }).device);
  const zeroing = Promise.allSettled(
    Array.from({ length: 10 }, () => device.zero(0, 2 ** 30, NO_MODE, stop.signal) as Promise<void>),
  );
  await setImmediate();
  stop.abort(new Error('the client is gone'));
  for (const zeroed of await zeroing) expect(zeroed).toMatchObject({ reason: { message: 'the client is gone' } });
  expect(pieces).toBeLessThan(100);
});

test('zeros stay zeros if the device writes into what it was given', async () => {
  const written: number[] = [];
  const write = (_: number, data: Buffer): void => {
    written.push(data.findIndex((byte) => byte !== 0));
    data.fill(1);
  };
  await completeDevice(noting({ write }).device).zero(0, 2 ** 20 * 3 - 1, NO_MODE);
  expect(written).toEqual([-1, -1, -1]);
});

test('zeros and writes with FUA fail if the device says that it has written less', async () => {
  const { device, calls } = noting({ write: () => 1 });
  await expect(completeDevice(device).write(0, Buffer.alloc(3), true)).rejects.toMatchObject({ code: 'EIO' });
  await expect(completeDevice(device).zero(0, 512, NO_MODE)).rejects.toMatchObject({ code: 'EIO' });
  expect(calls).toEqual([]);
});

test('a device of the full interface passes as it is', () => {
  const device = completeDevice({
    geometry: { size: 512, canFua: true },
    fillsBuffer: true,
    read: () => undefined,
    write: () => undefined,
    flush: () => undefined,
    close: () => undefined,
    isHole: () => true,
  });
  expect(device.geometry).toMatchObject({ size: 512, canFua: true, canZero: false, readOnly: false });
  expect(device.fillsBuffer).toBe(true);
  expect(device.isHole?.(0, 1)).toBe(true);
  expect(() => device.zero(0, 1, NO_MODE)).toThrow(/no method zero/);
});

test('a read is whole if it returned nothing, its count, what FileHandle.read returns, or its buffer', () => {
  const into = Buffer.alloc(16).subarray(4, 8);
  const view = new Uint8Array(into.buffer, into.byteOffset, into.length);
  for (const whole of [undefined, null, 4, { bytesRead: 4, buffer: into }, into, view]) {
    expect(readShortfall(whole, into)).toBeUndefined();
  }
  expect(readShortfall(3, into)).toBe('read returned 3 for 4 bytes');
  expect(readShortfall({ bytesRead: 0 }, into)).toBe('read returned 0 for 4 bytes');
  expect(readShortfall(Buffer.alloc(4), into)).toMatch(/another buffer; it must fill/);
  expect(readShortfall(new ArrayBuffer(4), into)).toMatch(/another buffer/);
  for (const odd of [5, NaN, -1, true, 'text', {}, { bytesRead: '4' }]) expect(readShortfall(odd, into)).toBeDefined();
});

test('a write is whole unless it returned another count', () => {
  for (const whole of [undefined, null, 4, { bytesWritten: 4 }, new Map(), true, 'text']) {
    expect(writeShortfall(whole, 4)).toBeUndefined();
  }
  expect(writeShortfall(3, 4)).toBe('write returned 3 for 4 bytes');
  expect(writeShortfall({ bytesWritten: 0 }, 4)).toBe('write returned 0 for 4 bytes');
  expect(writeShortfall(NaN, 4)).toBeDefined();
});
