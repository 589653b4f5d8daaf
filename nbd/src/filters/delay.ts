/**
 * A filter that delays requests, for tests of programs with slow disks. It owns the waiting, which ends when the client is gone.
 */

import {
  DeviceError,
  type Awaitable,
  type CompleteDevice,
  type ExtentSink,
  type Transferred,
  type ZeroMode,
} from '../block-device.js';
import type { AnyDevice } from '../device.js';
import { onAbort } from '../on-abort.js';
import { Forwarding } from './forwarding.js';

/** The largest delay of setTimeout, milliseconds: it takes a larger one for 1. */
const MAX_DELAY_MS = 2 ** 31 - 1;

/** How long each kind of request waits before it reaches the device, milliseconds; 0, and not at all, by default. */
export interface Delays {
  readonly readMs?: number;
  readonly writeMs?: number;
  readonly flushMs?: number;
  readonly zeroMs?: number;
  readonly trimMs?: number;
  readonly cacheMs?: number;
  readonly extentsMs?: number;
}

/**
 * `device` with delays. Requests wait side by side. A request whose client goes meanwhile fails, and does not reach the device.
 * With `readMs`, holes are read like data, so that every read waits.
 * Errors: RangeError if a delay is not a number from 0 to 2^31-1.
 */
export function delay(device: AnyDevice, delays: Delays): CompleteDevice {
  return new Delay(device, delays);
}

class Delay extends Forwarding {
  readonly #delays: Required<Delays>;

  constructor(device: AnyDevice, delays: Delays) {
    super(device);
    for (const [name, value] of Object.entries(delays) as [string, number | undefined][]) {
      if (value !== undefined && !(value >= 0 && value <= MAX_DELAY_MS)) {
        throw new RangeError(`${name} ${value} is not a number from 0 to ${MAX_DELAY_MS}`);
      }
    }
    const { readMs = 0, writeMs = 0, flushMs = 0, zeroMs = 0, trimMs = 0, cacheMs = 0, extentsMs = 0 } = delays;
    this.#delays = { readMs, writeMs, flushMs, zeroMs, trimMs, cacheMs, extentsMs };
    if (readMs > 0) this.isHole = undefined;
  }

  override read(offset: number, into: Buffer, signal?: AbortSignal): Awaitable<Transferred> {
    const { readMs } = this.#delays;
    if (readMs === 0) return super.read(offset, into, signal);
    return wait(readMs, signal).then(() => super.read(offset, into, signal));
  }

  override write(offset: number, data: Buffer, fua: boolean, signal?: AbortSignal): Awaitable<Transferred> {
    const { writeMs } = this.#delays;
    if (writeMs === 0) return super.write(offset, data, fua, signal);
    return wait(writeMs, signal).then(() => super.write(offset, data, fua, signal));
  }

  override flush(signal?: AbortSignal): Awaitable<void> {
    const { flushMs } = this.#delays;
    if (flushMs === 0) return super.flush(signal);
    return wait(flushMs, signal).then(() => super.flush(signal));
  }

  override zero(offset: number, length: number, mode: ZeroMode, signal?: AbortSignal): Awaitable<void> {
    const { zeroMs } = this.#delays;
    if (zeroMs === 0) return super.zero(offset, length, mode, signal);
    return wait(zeroMs, signal).then(() => super.zero(offset, length, mode, signal));
  }

  override trim(offset: number, length: number, fua: boolean, signal?: AbortSignal): Awaitable<void> {
    const { trimMs } = this.#delays;
    if (trimMs === 0) return super.trim(offset, length, fua, signal);
    return wait(trimMs, signal).then(() => super.trim(offset, length, fua, signal));
  }

  override cache(offset: number, length: number, signal?: AbortSignal): Awaitable<void> {
    const { cacheMs } = this.#delays;
    if (cacheMs === 0) return super.cache(offset, length, signal);
    return wait(cacheMs, signal).then(() => super.cache(offset, length, signal));
  }

  override extents(
    context: string,
    offset: number,
    length: number,
    sink: ExtentSink,
    signal?: AbortSignal,
  ): Awaitable<void> {
    const { extentsMs } = this.#delays;
    if (extentsMs === 0) return super.extents(context, offset, length, sink, signal);
    return wait(extentsMs, signal).then(() => super.extents(context, offset, length, sink, signal));
  }
}

/** Errors: DeviceError ESHUTDOWN if `signal` is aborted meanwhile. */
function wait(ms: number, signal: AbortSignal | undefined): Promise<void> {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => {
      ended();
      resolve();
    }, ms);
    const ended = onAbort(signal, () => {
      clearTimeout(timer);
      const message = 'the client has gone while its request was delayed';
      reject(new DeviceError('ESHUTDOWN', message, { cause: signal?.reason }));
    });
  });
}
