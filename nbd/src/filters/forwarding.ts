/**
 * What filters have in common: a device that forwards every call to the one below it, and whole transfers to and from that one.
 * It owns the rule that the inner device is closed once; it changes nothing on the way.
 */

import {
  DeviceError,
  type Awaitable,
  type CompleteDevice,
  type Ending,
  type ExtentSink,
  type Geometry,
  type Transferred,
  type ZeroMode,
} from '../block-device.js';
import { completeDevice, completeGeometry, type AnyDevice } from '../device.js';
import { readShortfall } from '../transferred.js';

/** Blocks that a filter keeps in memory, bytes: from a sector to the longest request. */
const LEAST_BLOCK_BYTES = 512;
const MOST_BLOCK_BYTES = 32 * 1024 * 1024;

export class Forwarding implements CompleteDevice {
  readonly geometry: Geometry;
  /** As the inner device, unless a filter fills every buffer itself. */
  fillsBuffer: boolean;
  /** Only if the inner device has one. A filter that answers differently from the inner device replaces or removes it. */
  isHole?: (offset: number, length: number) => boolean;
  readonly inner: CompleteDevice;
  #closing: { readonly answer: Awaitable<void> } | undefined;

  /** `changes`: to the geometry of the inner device. */
  constructor(device: AnyDevice, changes: Partial<Geometry> = {}) {
    const inner = completeDevice(device);
    this.inner = inner;
    this.geometry = completeGeometry({ ...inner.geometry, ...changes });
    this.fillsBuffer = inner.fillsBuffer ?? false;
    if (inner.isHole !== undefined) this.isHole = (offset, length) => inner.isHole?.(offset, length) ?? false;
  }

  read(offset: number, into: Buffer, signal?: AbortSignal): Awaitable<Transferred> {
    return this.inner.read(offset, into, signal);
  }

  write(offset: number, data: Buffer, fua: boolean, signal?: AbortSignal): Awaitable<Transferred> {
    return this.inner.write(offset, data, fua, signal);
  }

  flush(signal?: AbortSignal): Awaitable<void> {
    return this.inner.flush(signal);
  }

  zero(offset: number, length: number, mode: ZeroMode, signal?: AbortSignal): Awaitable<void> {
    return this.inner.zero(offset, length, mode, signal);
  }

  trim(offset: number, length: number, fua: boolean, signal?: AbortSignal): Awaitable<void> {
    return this.inner.trim(offset, length, fua, signal);
  }

  cache(offset: number, length: number, signal?: AbortSignal): Awaitable<void> {
    return this.inner.cache(offset, length, signal);
  }

  extents(context: string, offset: number, length: number, sink: ExtentSink, signal?: AbortSignal): Awaitable<void> {
    return this.inner.extents(context, offset, length, sink, signal);
  }

  close(ending: Ending): Awaitable<void> {
    if (this.#closing === undefined) {
      this.#closing = { answer: undefined };
      this.#closing = { answer: this.inner.close(ending) };
    }
    return this.#closing.answer;
  }
}

export function isPromise<T>(answer: Awaitable<T>): answer is Promise<T> {
  return typeof answer === 'object' && answer !== null && 'then' in answer;
}

/** Read all of `into`. Errors: those of the device; DeviceError EIO if it has read less. */
export async function readWhole(
  device: CompleteDevice,
  offset: number,
  into: Buffer,
  signal: AbortSignal | undefined,
): Promise<void> {
  const shortfall = readShortfall(await device.read(offset, into, signal), into);
  if (shortfall !== undefined) throw new DeviceError('EIO', shortfall, { offset });
}

/** Memory for a read of `device` that goes into nothing else: zeroed unless the device fills what it is given. */
export function memoryFor(device: CompleteDevice, length: number): Buffer {
  return device.fillsBuffer === true ? Buffer.allocUnsafeSlow(length) : Buffer.alloc(length);
}

/** Errors: RangeError if `value` is not a power of two from LEAST_BLOCK_BYTES to MOST_BLOCK_BYTES. */
export function checkBlockSize(name: string, value: number): void {
  const isInside = Number.isInteger(value) && value >= LEAST_BLOCK_BYTES && value <= MOST_BLOCK_BYTES;
  if (isInside && (value & (value - 1)) === 0) return;
  throw new RangeError(`${name} ${value} is not a power of two from ${LEAST_BLOCK_BYTES} to ${MOST_BLOCK_BYTES}`);
}
