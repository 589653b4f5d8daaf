/** The read cache: what it saves, what it drops, and that no read ever sees data older than an answered write. */

import { expect, test } from 'vitest';
import { memoryDevice } from '../src/devices/memory.js';
import { cache } from '../src/filters/cache.js';
import { ModelDevice } from './model-device.js';
import { Gate } from './test-device.js';

const BLOCK = 4096;
const MODE = { noHole: false, fua: false, fastZero: false };
const content = Buffer.alloc(64 * BLOCK, 1);

async function byteAt(device: { read: (offset: number, into: Buffer) => unknown }, offset: number): Promise<unknown> {
  const into = Buffer.alloc(1);
  await device.read(offset, into);
  return into[0];
}

test('what was read is read once, in blocks, and neighbours together', async () => {
  const inner = new ModelDevice(content);
  const device = cache(inner, { blockSize: BLOCK });
  const into = Buffer.alloc(3 * BLOCK);
  await device.read(100, into);
  expect(inner.calls).toEqual([`read 0 ${4 * BLOCK}`]);
  // From memory, at once.
  expect(device.read(0, into)).toBeUndefined();
  await Promise.all([device.read(10 * BLOCK, into), device.read(11 * BLOCK, into)]);
  const second = [`read ${10 * BLOCK} ${3 * BLOCK}`, `read ${13 * BLOCK} ${BLOCK}`];
  expect(inner.calls.slice(1)).toEqual(second);
  expect(device.cachedBytes).toBe(8 * BLOCK);
});

test('what was used last is kept, within the bound', async () => {
  const inner = new ModelDevice(content);
  const device = cache(inner, { blockSize: BLOCK, maxBytes: 3 * BLOCK });
  for (const block of [0, 1, 2, 0, 3]) await byteAt(device, block * BLOCK);
  expect(device.cachedBytes).toBe(3 * BLOCK);
  inner.calls.length = 0;
  for (const block of [0, 2, 3]) await byteAt(device, block * BLOCK);
  expect(inner.calls).toEqual([]);
  await byteAt(device, BLOCK);
  expect(inner.calls).toEqual([`read ${BLOCK} ${BLOCK}`]);
});

test('writes, zeros and trims drop what they touch, also when they fail', async () => {
  const inner = new ModelDevice(content);
  const device = cache(inner, { blockSize: BLOCK });
  await device.read(0, Buffer.alloc(8 * BLOCK));
  await device.write(BLOCK - 1, Buffer.from([2, 2]), true);
  await device.zero(2 * BLOCK, 1, MODE);
  await device.trim(3 * BLOCK, BLOCK, false);
  inner.before = (method) => {
    if (method === 'write') throw new Error('half written');
  };
  inner.disk[4 * BLOCK] = 9;
  expect(() => device.write(4 * BLOCK, Buffer.from([3]), false)).toThrow('half written');
  const found = await Promise.all([BLOCK - 1, BLOCK, 2 * BLOCK, 3 * BLOCK, 4 * BLOCK].map((at) => byteAt(device, at)));
  expect(found).toEqual([2, 2, 0, 0, 9]);
  await device.zero(0, content.length, MODE);
  expect(device.cachedBytes).toBe(0);
});

/** An inner device whose reads and writes wait for the test, at the point where they have taken or stored their data. */
function gated(): { reads: Gate[]; writes: Gate[]; device: ReturnType<typeof cache>; inner: ModelDevice } {
  const inner = new ModelDevice(content);
  const reads: Gate[] = [];
  const writes: Gate[] = [];
  const gate = (gates: Gate[]): Promise<void> => {
    const made = new Gate();
    gates.push(made);
    return made.opened;
  };
  const device = cache(
    {
      geometry: inner.geometry,
      read: async (offset, into) => {
        inner.disk.copy(into, 0, offset);
        await gate(reads);
      },
      write: async (offset, data) => {
        await gate(writes);
        data.copy(inner.disk, offset);
      },
      flush: () => undefined,
      close: () => undefined,
    },
    { blockSize: BLOCK },
  );
  return { reads, writes, device, inner };
}

test('what was read before a write, and arrives after it, is not kept', async () => {
  const { reads, writes, device } = gated();
  const early = byteAt(device, 0);
  const write = device.write(5, Buffer.from([7]), false);
  writes[0]?.open();
  await write;
  reads[0]?.open();
  await early;
  // Its read began before the write was answered; a read that begins now must see it.
  const late = byteAt(device, 5);
  reads[1]?.open();
  expect(await late).toBe(7);
});

test('what is read during a write is not kept, nor shared with reads after it', async () => {
  const { reads, writes, device } = gated();
  const write = device.write(5, Buffer.from([7]), false);
  const during = byteAt(device, 5);
  writes[0]?.open();
  await write;
  const after = byteAt(device, 5);
  expect(reads.length).toBe(2);
  reads[1]?.open();
  expect(await after).toBe(7);
  reads[0]?.open();
  expect(await during).toBe(1);
  expect(await byteAt(device, 5)).toBe(7);
});

test('a read that fails is not kept, and fails for all who wait for it', async () => {
  const inner = new ModelDevice(content, { isAsync: true });
  const device = cache(inner, { blockSize: BLOCK });
  inner.before = () => {
    throw new Error('unreadable');
  };
  const failed = await Promise.allSettled([
    byteAt(device, 0),
    byteAt(device, 1),
    device.read(0, Buffer.alloc(9 * BLOCK)),
  ]);
  expect(failed.map(({ status }) => status)).toEqual(['rejected', 'rejected', 'rejected']);
  inner.before = () => undefined;
  expect(await byteAt(device, 0)).toBe(1);
});

test('one bad sector fails only the reads that need it, and shows no other memory', async () => {
  const inner = new ModelDevice(content, { isAsync: true });
  const bad = 3 * BLOCK + 5;
  inner.before = (_, offset, length) => {
    if (offset <= bad && bad < offset + length) throw new Error('unreadable');
  };
  const device = cache(inner, { blockSize: BLOCK });
  // The second one would share what is loaded for the first one.
  const [whole, beside] = await Promise.allSettled([device.read(0, Buffer.alloc(6 * BLOCK)), byteAt(device, BLOCK)]);
  expect(whole).toMatchObject({ status: 'rejected', reason: { message: 'unreadable' } });
  expect(beside).toEqual({ status: 'fulfilled', value: content[BLOCK] });
  expect(await byteAt(device, bad - 1)).toBe(content[bad - 1]);
  await expect(byteAt(device, bad)).rejects.toThrow('unreadable');

  // One that says nothing of what it leaves out, as soon as it has failed once.
  const careless = new ModelDevice(content);
  careless.fillsBuffer = false;
  careless.before = (_, __, length) => {
    if (length > 16) throw new Error('unreadable');
  };
  careless.carelessness = 'nothing';
  const into = Buffer.alloc(16, 0xaa);
  await cache(careless, { blockSize: BLOCK }).read(0, into);
  expect(into).toEqual(Buffer.alloc(16));
});

test('a CACHE request reads ahead, as much as fits', async () => {
  const inner = new ModelDevice(content);
  const device = cache(inner, { blockSize: BLOCK, maxBytes: 8 * BLOCK });
  expect(device.geometry.canCache).toBe(true);
  await device.cache(0, content.length);
  expect(device.cachedBytes).toBe(8 * BLOCK);
  inner.calls.length = 0;
  expect(device.read(0, Buffer.alloc(8 * BLOCK))).toBeUndefined();
  expect(inner.calls).toEqual([]);
});

test('sizes are checked', () => {
  expect(() => cache(memoryDevice(1), { blockSize: 1000 })).toThrow(RangeError);
  expect(() => cache(memoryDevice(1), { maxBytes: NaN })).toThrow(RangeError);
  expect(cache(memoryDevice({ size: 1, multiConn: true })).geometry.multiConn).toBe(false);
});
