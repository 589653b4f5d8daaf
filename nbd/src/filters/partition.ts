/**
 * A filter that makes a part of a device a device of its own: offsets of requests, extents and errors are shifted. It owns the
 * bounds: nothing outside of the part is ever read or changed. Where partitions are, partition-table.ts knows.
 */

import {
  DeviceError,
  type Awaitable,
  type CompleteDevice,
  type ExtentSink,
  type Transferred,
  type ZeroMode,
} from '../block-device.js';
import { completeDevice, type AnyDevice } from '../device.js';
import { Forwarding, isPromise } from './forwarding.js';

export { findPartition, PartitionError } from './partition-table.js';

/** A part of a device, in bytes. */
export interface PartitionRange {
  readonly offset: number;
  /** By default up to the end of the device. */
  readonly length?: number;
}

/**
 * The part of `device` from `offset` on. For a partition of a GPT or MBR: `partition(device, await findPartition(device, 1))`.
 * Errors: RangeError if it is not inside the device, or not a multiple of the device's minimum block size.
 */
export function partition(device: AnyDevice, range: PartitionRange): CompleteDevice {
  return new Partition(completeDevice(device), range);
}

class Partition extends Forwarding {
  readonly #start: number;
  readonly #rethrow: (error: unknown) => never;

  constructor(device: CompleteDevice, { offset, length = device.geometry.size - offset }: PartitionRange) {
    const { size, minimumBlockSize } = device.geometry;
    const isInside = Number.isSafeInteger(offset) && Number.isSafeInteger(length) && offset >= 0 && length >= 0;
    if (!isInside || offset > size || length > size - offset) {
      throw new RangeError(
        `the partition (offset ${offset}, length ${length}) is not inside the device of ${size} bytes`,
      );
    }
    if (offset % minimumBlockSize !== 0 || length % minimumBlockSize !== 0) {
      const found = `the partition (offset ${offset}, length ${length})`;
      throw new RangeError(`${found} is not a multiple of the device's minimum block size, ${minimumBlockSize}`);
    }
    super(device, { size: length });
    this.#start = offset;
    this.#rethrow = (error) => {
      throw this.#shifted(error);
    };
    if (device.isHole !== undefined) this.isHole = (at, bytes) => device.isHole?.(at + offset, bytes) ?? false;
  }

  override read(offset: number, into: Buffer, signal?: AbortSignal): Awaitable<Transferred> {
    const at = this.#place(offset, into.length);
    try {
      return this.#answer(this.inner.read(at, into, signal));
    } catch (error) {
      throw this.#shifted(error);
    }
  }

  override write(offset: number, data: Buffer, fua: boolean, signal?: AbortSignal): Awaitable<Transferred> {
    const at = this.#place(offset, data.length);
    try {
      return this.#answer(this.inner.write(at, data, fua, signal));
    } catch (error) {
      throw this.#shifted(error);
    }
  }

  override zero(offset: number, length: number, mode: ZeroMode, signal?: AbortSignal): Awaitable<void> {
    const at = this.#place(offset, length);
    try {
      return this.#answer(this.inner.zero(at, length, mode, signal));
    } catch (error) {
      throw this.#shifted(error);
    }
  }

  override trim(offset: number, length: number, fua: boolean, signal?: AbortSignal): Awaitable<void> {
    const at = this.#place(offset, length);
    try {
      return this.#answer(this.inner.trim(at, length, fua, signal));
    } catch (error) {
      throw this.#shifted(error);
    }
  }

  override cache(offset: number, length: number, signal?: AbortSignal): Awaitable<void> {
    const at = this.#place(offset, length);
    try {
      return this.#answer(this.inner.cache(at, length, signal));
    } catch (error) {
      throw this.#shifted(error);
    }
  }

  override extents(
    context: string,
    offset: number,
    length: number,
    sink: ExtentSink,
    signal?: AbortSignal,
  ): Awaitable<void> {
    const start = this.#start;
    const at = this.#place(offset, length);
    const end = start + this.geometry.size;
    // The inner device's extents may reach beyond the partition.
    const shiftingSink: ExtentSink = (extent, bytes, flags) => {
      const rest = end - extent;
      return rest > 0 && sink(extent - start, Math.min(bytes, rest), flags) && bytes < rest;
    };
    try {
      return this.#answer(this.inner.extents(context, at, length, shiftingSink, signal));
    } catch (error) {
      throw this.#shifted(error);
    }
  }

  /** The offset in the inner device. Errors: DeviceError EINVAL if the range is not inside: who calls has not checked it. */
  #place(offset: number, length: number): number {
    if (offset < 0 || offset + length > this.geometry.size) {
      throw new DeviceError('EINVAL', `${length} bytes at ${offset} are not inside the partition`);
    }
    return this.#start + offset;
  }

  #answer<T>(answer: Awaitable<T>): Awaitable<T> {
    return isPromise(answer) ? answer.then(undefined, this.#rethrow) : answer;
  }

  /** The error with its offset in the partition. */
  #shifted(error: unknown): unknown {
    if (!(error instanceof DeviceError) || error.offset === undefined) return error;
    return new DeviceError(error.code, error.message, { cause: error, offset: error.offset - this.#start });
  }
}
