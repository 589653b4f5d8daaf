/**
 * What every device and every filter of the library must do, as tests: `deviceSuite` for a device on its own, `filterSuite` for a
 * filter over a device in a plain buffer. Random operations are compared with that buffer byte by byte.
 */

import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { ALLOCATION_CONTEXT, DeviceError, STATE_ZERO, type CompleteDevice, type ZeroMode } from '../src/index.js';
import { completeDevice, type AnyDevice } from '../src/device.js';
import { readShortfall, writeShortfall } from '../src/transferred.js';
import { ModelDevice } from './model-device.js';

/** A disk in which blocks of zeros, of one byte and of noise take turns. Its size is a multiple of nothing. */
export function testContent(size = 200_001): Buffer {
  const content = Buffer.alloc(size);
  let state = 1;
  for (let at = 0; at < size; at += 3000) {
    state = (Math.imul(state, 1103515245) + 12345) >>> 0;
    const kind = state >>> 29;
    const end = Math.min(size, at + 3000);
    if (kind < 3) continue;
    for (let index = at; index < end; index++) content[index] = kind === 3 ? 0x5a : ((index * 7 + state) & 0xff) | 1;
  }
  return content;
}

/** A device for the suite, with the bytes that it has now. */
export interface Subject {
  readonly device: AnyDevice;
  readonly content: Buffer;
}

interface Step {
  readonly kind: 'read' | 'write' | 'zero' | 'trim' | 'flush' | 'cache' | 'extents';
  /** In the disk, 0 to 1. */
  readonly at: number;
  readonly length: number;
  readonly byte: number;
  readonly fua: boolean;
  readonly noHole: boolean;
}

const step = fc.record<Step>({
  kind: fc.constantFrom('read', 'write', 'write', 'zero', 'trim', 'flush', 'cache', 'extents'),
  at: fc.double({ min: 0, max: 1, noNaN: true }),
  length: fc.oneof(fc.integer({ min: 1, max: 9000 }), fc.integer({ min: 1, max: 120_000 }), fc.constant(4096)),
  byte: fc.integer({ min: 0, max: 255 }),
  fua: fc.boolean(),
  noHole: fc.boolean(),
});

/** Random operations one after the other, each compared with the model. */
export function deviceSuite(name: string, make: () => Promise<Subject> | Subject, { runs = 25 } = {}): void {
  describe(name, () => {
    test('random operations have the same result as on a plain buffer', async () => {
      await fc.assert(
        fc.asyncProperty(fc.array(step, { minLength: 1, maxLength: 25 }), async (steps) => {
          const { device, content } = await make();
          const complete = completeDevice(device);
          const model = Buffer.from(content);
          try {
            for (const each of steps) await carryOut(complete, model, each);
            await compare(complete, model);
            await checkExtents(complete, model, 0, model.length);
          } finally {
            await complete.close('disconnect');
          }
        }),
        { numRuns: runs },
      );
    });

    test('requests at once, next to each other in the same blocks, do not disturb each other', async () => {
      await fc.assert(
        fc.asyncProperty(fc.array(step, { minLength: 2, maxLength: 25 }), async (steps) => {
          const { device, content } = await make();
          const complete = completeDevice(device);
          const model = Buffer.from(content);
          // Each step has a part of the disk of its own, smaller than a block or larger.
          const part = Math.floor(model.length / steps.length / (steps.length % 2 === 0 ? 1 : 7));
          try {
            await Promise.all(
              steps.map(async (each, index) => {
                const area = { start: index * part, end: Math.min(model.length, (index + 1) * part) };
                // What a trim leaves is not known before it has ended.
                if (each.kind !== 'trim') await carryOut(complete, model, each, area);
              }),
            );
            await compare(complete, model);
          } finally {
            await complete.close('disconnect');
          }
        }),
        { numRuns: runs },
      );
    });

    test('completed once more, it announces the same and reads the same', async () => {
      const { device, content } = await make();
      const once = completeDevice(device);
      const twice = completeDevice(once);
      expect(twice.geometry).toEqual(once.geometry);
      expect(twice.fillsBuffer).toBe(once.fillsBuffer);
      expect(twice.isHole === undefined).toBe(once.isHole === undefined);
      expect(once.geometry.size).toBe(content.length);
      await compare(twice, content);
      await twice.close('disconnect');
    });

    test('what is not announced fails, and what is announced works', async () => {
      const { device, content } = await make();
      const complete = completeDevice(device);
      const { geometry } = complete;
      const fails = async (act: () => unknown): Promise<boolean> => {
        try {
          await act();
          return false;
        } catch (error) {
          expect(error).toBeInstanceOf(DeviceError);
          return true;
        }
      };
      const mode = { noHole: false, fua: false, fastZero: false };
      expect(await fails(() => complete.write(0, content.subarray(0, 1), false))).toBe(geometry.readOnly);
      expect(await fails(() => complete.trim(0, 512, false))).toBe(!geometry.canTrim);
      expect(await fails(() => complete.zero(0, 512, mode))).toBe(!geometry.canZero);
      expect(await fails(() => complete.cache(0, 512))).toBe(!geometry.canCache);
      const canExtents = geometry.contexts.includes(ALLOCATION_CONTEXT);
      expect(await fails(() => complete.extents(ALLOCATION_CONTEXT, 0, 512, () => true))).toBe(!canExtents);
      const model = Buffer.from(content);
      if (geometry.canZero) model.fill(0, 0, 512);
      await compare(complete, model);
      await complete.close('lost');
    });
  });
}

/** One step, on the device and on the model. In `area` only, if it is given. */
async function carryOut(
  device: CompleteDevice,
  model: Buffer,
  { kind, at, length, byte, fua, noHole }: Step,
  area = { start: 0, end: model.length },
): Promise<void> {
  const { geometry } = device;
  const offset = area.start + Math.floor(at * (area.end - area.start - 1));
  const end = Math.min(area.end, offset + length);
  const bytes = end - offset;
  if (bytes <= 0) return;
  const useFua = fua && geometry.canFua;
  switch (kind) {
    case 'read':
      expect((await readAll(device, offset, bytes)).equals(model.subarray(offset, end))).toBe(true);
      break;
    case 'write': {
      if (geometry.readOnly) break;
      const data = Buffer.alloc(bytes, byte);
      model.set(data, offset);
      expect(writeShortfall(await device.write(offset, data, useFua), bytes)).toBeUndefined();
      // The memory is used again by the server.
      data.fill(0xee);
      break;
    }
    case 'zero': {
      if (!geometry.canZero) break;
      const mode: ZeroMode = { noHole, fua: useFua, fastZero: geometry.canFastZero && byte > 128 };
      model.fill(0, offset, end);
      await device.zero(offset, bytes, mode);
      break;
    }
    case 'trim': {
      if (!geometry.canTrim) break;
      await device.trim(offset, bytes, useFua);
      // "may read as anything", and is the same from then on.
      (await readAll(device, offset, bytes)).copy(model, offset);
      break;
    }
    case 'flush':
      if (geometry.canFlush) await device.flush();
      break;
    case 'cache':
      if (geometry.canCache) await device.cache(offset, bytes);
      break;
    case 'extents':
      await checkExtents(device, model, offset, bytes);
      break;
  }
}

async function readAll(device: CompleteDevice, offset: number, length: number): Promise<Buffer> {
  // As the server does: memory with other data, zeroed if the device does not fill it.
  const into = Buffer.alloc(length, device.fillsBuffer === true ? 0xaa : 0);
  expect(readShortfall(await device.read(offset, into), into)).toBeUndefined();
  return into;
}

async function compare(device: CompleteDevice, model: Buffer): Promise<void> {
  const found = await readAll(device, 0, model.length);
  if (found.equals(model)) return;
  const at = found.findIndex((value, index) => value !== model[index]);
  throw new Error(`byte ${at} is ${found[at]}, it should be ${model[at]}`);
}

/** Extents follow each other from the offset to the end, and zeros are zeros; so are holes that are known from memory. */
async function checkExtents(device: CompleteDevice, model: Buffer, offset: number, length: number): Promise<void> {
  const end = offset + length;
  if (device.isHole?.(offset, length) === true) expect(isZero(model.subarray(offset, end))).toBe(true);
  if (!device.geometry.contexts.includes(ALLOCATION_CONTEXT)) return;
  const problems: string[] = [];
  let at = offset;
  while (at < end) {
    const before = at;
    await device.extents(ALLOCATION_CONTEXT, at, end - at, (from, bytes, flags) => {
      if (from !== at || bytes <= 0) problems.push(`an extent of ${bytes} at ${from}, after ${at}`);
      at += bytes;
      const isWrong = (flags & STATE_ZERO) !== 0 && !isZero(model.subarray(from, Math.min(at, end)));
      if (isWrong) problems.push(`${bytes} at ${from} are not zeros`);
      return at < end;
    });
    if (at <= before) throw new Error(`no extent at ${at}`);
  }
  expect(problems).toEqual([]);
  expect(at).toBeLessThanOrEqual(model.length);
}

const ZEROS = Buffer.alloc(1024 * 1024);

/** Of a MiB at most. */
export function isZero(bytes: Buffer): boolean {
  return bytes.equals(ZEROS.subarray(0, bytes.length));
}

/** A filter, and what it does with what passes. */
export interface FilterUnderTest {
  readonly wrap: (inner: AnyDevice) => AnyDevice;
  /** The part of the inner device that it shows. */
  readonly view?: { readonly offset: number; readonly length: number };
  /** Changes reach the inner device. */
  readonly isWritten?: boolean;
  /** Requests reach the inner device with the client's signal. */
  readonly passesSignal?: boolean;
}

/** All of deviceSuite over inner devices of several kinds, and what a filter owes to the device below it. */
export function filterSuite(name: string, filter: FilterUnderTest, { runs = 15 } = {}): void {
  const content = testContent();
  const view = filter.view ?? { offset: 0, length: content.length };
  const viewed = content.subarray(view.offset, view.offset + view.length);
  const over = (inner: ModelDevice): CompleteDevice => completeDevice(filter.wrap(inner));
  const { isWritten = true, passesSignal = true } = filter;

  describe(`${name}, as a filter`, () => {
    for (const isAsync of [false, true]) {
      deviceSuite(
        `over a device that answers ${isAsync ? 'later' : 'at once'}`,
        () => ({ device: filter.wrap(new ModelDevice(content, { isAsync })), content: Buffer.from(viewed) }),
        { runs },
      );
    }

    deviceSuite(
      'over a device with few abilities',
      () => {
        const { read, write, flush } = new ModelDevice(content);
        const inner = { size: content.length, ...bound(content, { read, write, flush }) };
        return { device: filter.wrap(inner), content: Buffer.from(viewed) };
      },
      { runs: 8 },
    );

    test('closes the inner device once', async () => {
      const inner = new ModelDevice(content, { isAsync: true });
      const device = over(inner);
      await device.close('disconnect');
      await device.close('lost');
      expect(inner.endings).toEqual(['disconnect']);
    });

    test.each([false, true])('passes errors with their code and place (later: %s)', async (isAsync) => {
      const inner = new ModelDevice(content, { isAsync });
      const device = over(inner);
      const at = view.offset + 30_000;
      inner.before = (method, offset, length) => {
        const isThere = at >= offset && at < offset + length;
        if (method === 'read' && isThere) throw new DeviceError('ENOMEM', 'of the inner device', { offset: at });
        if (method !== 'read' && method !== 'extents') {
          throw Object.assign(new Error('of the system'), { code: 'ENOSPC' });
        }
      };
      const read = await errorOf(() => device.read(28_000, Buffer.alloc(4096)));
      expect(read).toMatchObject({ code: 'ENOMEM', message: 'of the inner device', offset: 30_000 });
      if (!isWritten) return;
      const { geometry } = device;
      const mode = { noHole: false, fua: false, fastZero: false };
      const spaceless = { code: 'ENOSPC', message: 'of the system' };
      expect(await errorOf(() => device.write(0, Buffer.alloc(512), false))).toMatchObject(spaceless);
      if (geometry.canZero) expect(await errorOf(() => device.zero(0, 512, mode))).toMatchObject(spaceless);
      if (geometry.canTrim) expect(await errorOf(() => device.trim(0, 512, false))).toMatchObject(spaceless);
      if (geometry.canFlush) expect(await errorOf(() => device.flush())).toMatchObject(spaceless);
      inner.before = () => undefined;
      await compare(device, viewed);
    });

    test('takes a short read or write of the inner device for a failure', async () => {
      for (const carelessness of ['short', 'another buffer'] as const) {
        const inner = new ModelDevice(content);
        inner.fillsBuffer = false;
        const device = over(inner);
        inner.carelessness = carelessness;
        for (const [offset, length] of [
          [0, 512],
          [5000, 9000],
        ] as const) {
          const into = Buffer.alloc(length);
          expect(await hasFailed(async () => readShortfall(await device.read(offset, into), into))).toBe(true);
        }
        if (device.geometry.readOnly || (carelessness === 'another buffer' && isWritten)) continue;
        const data = Buffer.alloc(700, 1);
        expect(await hasFailed(async () => writeShortfall(await device.write(100, data, false), 700))).toBe(true);
      }
    });

    test('shows no other memory if the inner device fills nothing', async () => {
      const inner = new ModelDevice(content);
      inner.fillsBuffer = false;
      inner.carelessness = 'nothing';
      const device = over(inner);
      expect((await readAll(device, 3000, 20_000)).every((byte) => byte === 0)).toBe(true);
    });

    test.runIf(isWritten)('passes FUA, flags of zeros and flushes, in their order', async () => {
      const inner = new ModelDevice(content, { isAsync: true });
      const device = over(inner);
      inner.calls.length = 0;
      await device.write(4096, Buffer.alloc(512, 3), true);
      await device.write(8192, Buffer.alloc(512, 3), false);
      await device.flush();
      await device.zero(0, 512, { noHole: true, fua: true, fastZero: true });
      await device.trim(0, 512, true);
      const [a, b, c] = [view.offset + 4096, view.offset + 8192, view.offset];
      const changes = [`write ${a} 512 fua`, `write ${b} 512`, 'flush'];
      const rest = [`zero ${c} 512 noHole fua fastZero`, `trim ${c} 512 fua`];
      expect(inner.calls.filter((call) => !call.startsWith('read'))).toEqual([...changes, ...rest]);
    });

    test.runIf(!isWritten)('never changes the inner device', async () => {
      const inner = new ModelDevice(content);
      const device = over(inner);
      const mode = { noHole: false, fua: false, fastZero: false };
      const changes = [
        () => device.write(0, Buffer.alloc(9000, 1), true),
        () => device.zero(10_000, 20_000, mode),
        () => device.trim(40_000, 20_000, true),
      ];
      for (const change of changes) await errorOf(async () => await change());
      expect(inner.disk.equals(content)).toBe(true);
      expect(inner.calls.filter((call) => /^(?:write|zero|trim)/.test(call))).toEqual([]);
    });

    test.runIf(passesSignal)('passes the signal of the client', async () => {
      const inner = new ModelDevice(content);
      const device = over(inner);
      const { signal } = new AbortController();
      inner.signals.clear();
      await device.read(0, Buffer.alloc(512), signal);
      if (device.geometry.canFlush) await device.flush(signal);
      if (!device.geometry.readOnly) await device.write(0, Buffer.alloc(512), false, signal);
      if (device.geometry.canZero) await device.zero(0, 512, { noHole: false, fua: false, fastZero: false }, signal);
      if (device.geometry.canTrim) await device.trim(0, 512, false, signal);
      await device.cache(0, 512, signal);
      await device.extents(ALLOCATION_CONTEXT, 0, 512, () => true, signal);
      expect([...inner.signals]).toEqual([signal]);
    });
  });
}

/** The methods of a device of its own over `content`. */
function bound(
  content: Buffer,
  methods: Pick<ModelDevice, 'read' | 'write' | 'flush'>,
): Pick<ModelDevice, 'read' | 'write' | 'flush'> {
  const inner = new ModelDevice(content);
  return { read: methods.read.bind(inner), write: methods.write.bind(inner), flush: methods.flush.bind(inner) };
}

async function errorOf(act: () => unknown): Promise<unknown> {
  try {
    await act();
  } catch (error) {
    return error;
  }
  return undefined;
}

/** Whether it throws, or says what is missing. */
async function hasFailed(act: () => Promise<string | undefined>): Promise<boolean> {
  try {
    return (await act()) !== undefined;
  } catch {
    return true;
  }
}
