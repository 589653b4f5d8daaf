/**
 * A filter that makes requests fail, for tests of programs with failing disks. It owns the choice, which is the same for the same
 * seed and order of requests; a request that it fails does not reach the device.
 */

import {
  DeviceError,
  isDeviceErrorCode,
  type Awaitable,
  type CompleteDevice,
  type DeviceErrorCode,
  type ExtentSink,
  type Transferred,
  type ZeroMode,
} from '../block-device.js';
import type { AnyDevice } from '../device.js';
import { Forwarding } from './forwarding.js';

/** The methods that can be made to fail. */
export type FailingMethod = 'read' | 'write' | 'flush' | 'zero' | 'trim' | 'cache' | 'extents';

const METHODS: ReadonlySet<unknown> = new Set<FailingMethod>([
  ...(['read', 'write', 'flush', 'zero', 'trim', 'cache', 'extents'] as const),
]);

/** A request before it reaches the device. */
export interface CandidateRequest {
  readonly method: FailingMethod;
  /** Bytes; 0 for a flush. */
  readonly offset: number;
  readonly length: number;
  /** How many requests of `methods` came before this one. */
  readonly count: number;
}

/** Which requests fail, and how. */
export interface FailureOptions {
  /** The part of requests that fail, 0 to 1. Default: 1 if `when` is not given. */
  readonly rate?: number;
  /** Whether this request fails; with `rate`, only this part of those that `when` names. */
  readonly when?: (request: CandidateRequest) => boolean;
  /** The methods that may fail; by default all. */
  readonly methods?: readonly FailingMethod[];
  /** EIO by default. */
  readonly code?: DeviceErrorCode;
  /** For `rate`: the same seed and the same order of requests make the same ones fail. Default 1. */
  readonly seed?: number;
}

/**
 * `device` with requests that fail. If reads may fail, holes are read like data, so that every read may.
 * Errors: RangeError if `rate` is not from 0 to 1, or there is no such method or code.
 */
export function errors(device: AnyDevice, options: FailureOptions = {}): CompleteDevice {
  return new Errors(device, options);
}

class Errors extends Forwarding {
  readonly #rate: number;
  readonly #when: ((request: CandidateRequest) => boolean) | undefined;
  readonly #methods: ReadonlySet<FailingMethod> | undefined;
  readonly #code: DeviceErrorCode;
  #state: number;
  #count = 0;

  constructor(device: AnyDevice, { rate = 1, when, methods, code = 'EIO', seed = 1 }: FailureOptions) {
    super(device);
    if (!(rate >= 0 && rate <= 1)) throw new RangeError(`rate ${rate} is not a number from 0 to 1`);
    if (!isDeviceErrorCode(code)) throw new RangeError(`code ${code as string} is not one of DeviceErrorCode`);
    for (const method of methods ?? []) {
      if (!METHODS.has(method)) throw new RangeError(`methods: ${method} cannot be made to fail`);
    }
    this.#rate = rate;
    this.#when = when;
    this.#methods = methods && new Set(methods);
    this.#code = code;
    this.#state = seed >>> 0;
    if (this.#methods?.has('read') ?? true) this.isHole = undefined;
  }

  override read(offset: number, into: Buffer, signal?: AbortSignal): Awaitable<Transferred> {
    this.#admit('read', offset, into.length);
    return super.read(offset, into, signal);
  }

  override write(offset: number, data: Buffer, fua: boolean, signal?: AbortSignal): Awaitable<Transferred> {
    this.#admit('write', offset, data.length);
    return super.write(offset, data, fua, signal);
  }

  override flush(signal?: AbortSignal): Awaitable<void> {
    this.#admit('flush', 0, 0);
    return super.flush(signal);
  }

  override zero(offset: number, length: number, mode: ZeroMode, signal?: AbortSignal): Awaitable<void> {
    this.#admit('zero', offset, length);
    return super.zero(offset, length, mode, signal);
  }

  override trim(offset: number, length: number, fua: boolean, signal?: AbortSignal): Awaitable<void> {
    this.#admit('trim', offset, length);
    return super.trim(offset, length, fua, signal);
  }

  override cache(offset: number, length: number, signal?: AbortSignal): Awaitable<void> {
    this.#admit('cache', offset, length);
    return super.cache(offset, length, signal);
  }

  override extents(
    context: string,
    offset: number,
    length: number,
    sink: ExtentSink,
    signal?: AbortSignal,
  ): Awaitable<void> {
    this.#admit('extents', offset, length);
    return super.extents(context, offset, length, sink, signal);
  }

  /** Errors: DeviceError if this request is to fail. */
  #admit(method: FailingMethod, offset: number, length: number): void {
    if (this.#methods?.has(method) === false) return;
    const count = this.#count++;
    if (this.#when !== undefined && !this.#when({ method, offset, length, count })) return;
    if (this.#rate < 1 && this.#random() >= this.#rate) return;
    const where = method === 'flush' ? '' : ` of ${length} bytes at ${offset}`;
    throw new DeviceError(this.#code, `${method}${where} fails for a test`);
  }

  /** From 0 to 1, exclusively: mulberry32. */
  #random(): number {
    this.#state = (this.#state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(this.#state ^ (this.#state >>> 15), this.#state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  }
}
