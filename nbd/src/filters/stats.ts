/**
 * A filter that counts requests, bytes, errors and durations. It owns the counters, and changes nothing that passes.
 */

import type { Awaitable, CompleteDevice, ExtentSink, Transferred, ZeroMode } from '../block-device.js';
import type { AnyDevice } from '../device.js';
import { readShortfall, writeShortfall } from '../transferred.js';
import { Forwarding, isPromise } from './forwarding.js';

/** Buckets of a histogram: the last one has everything of half a minute and more. */
const BUCKETS = 27;

/** The counters of one method. They only grow. */
export interface MethodCounters {
  /** Requests that have been answered, errors included. */
  readonly requests: number;
  readonly errors: number;
  /** Bytes of the ranges of requests that succeeded. */
  readonly bytes: number;
  /** Requests that have not been answered yet. */
  readonly inFlight: number;
  /** All durations together, milliseconds. */
  readonly totalMs: number;
  /** `durations[i]`: requests that took less than 2^i microseconds, and not less than 2^(i-1). The last one: all longer ones. */
  readonly durations: readonly number[];
}

/** The methods that are counted. */
export type CountedMethod = 'read' | 'write' | 'flush' | 'zero' | 'trim' | 'cache' | 'extents';

/** A device with counters. */
export interface StatsDevice extends CompleteDevice {
  /** Reads that the server answers from `isHole` do not reach the device, and are not counted. */
  readonly counters: Readonly<Record<CountedMethod, MethodCounters>>;
}

/** `device` with counters of its requests. A read or write of fewer bytes than asked counts as an error. */
export function stats(device: AnyDevice): StatsDevice {
  return new Stats(device);
}

class Counters implements MethodCounters {
  requests = 0;
  errors = 0;
  bytes = 0;
  inFlight = 0;
  totalMs = 0;
  readonly durations = new Array<number>(BUCKETS).fill(0);

  /** Count `act`; `shortfallOf` tells whether its result is less than what was asked. */
  count<T>(length: number, act: () => Awaitable<T>, shortfallOf?: (result: T) => string | undefined): Awaitable<T> {
    const began = performance.now();
    let answer: Awaitable<T>;
    this.inFlight++;
    try {
      answer = act();
    } catch (error) {
      this.#end(began, 0, true);
      throw error;
    }
    if (isPromise(answer)) {
      return answer.then(
        (result) => {
          this.#end(began, length, shortfallOf?.(result) !== undefined);
          return result;
        },
        (error: unknown) => {
          this.#end(began, 0, true);
          throw error;
        },
      );
    }
    this.#end(began, length, shortfallOf?.(answer) !== undefined);
    return answer;
  }

  #end(began: number, length: number, hasFailed: boolean): void {
    const ms = performance.now() - began;
    this.inFlight--;
    this.requests++;
    this.totalMs += ms;
    if (hasFailed) this.errors++;
    else this.bytes += length;
    const bucket = Math.min(BUCKETS - 1, 32 - Math.clz32(Math.min(ms * 1000, 0x7fff_ffff)));
    this.durations[bucket] = (this.durations[bucket] ?? 0) + 1;
  }
}

class Stats extends Forwarding implements StatsDevice {
  readonly counters = {
    ...{ read: new Counters(), write: new Counters(), flush: new Counters(), zero: new Counters() },
    ...{ trim: new Counters(), cache: new Counters(), extents: new Counters() },
  };

  override read(offset: number, into: Buffer, signal?: AbortSignal): Awaitable<Transferred> {
    const act = (): Awaitable<Transferred> => super.read(offset, into, signal);
    return this.counters.read.count(into.length, act, (result) => readShortfall(result, into));
  }

  override write(offset: number, data: Buffer, fua: boolean, signal?: AbortSignal): Awaitable<Transferred> {
    const act = (): Awaitable<Transferred> => super.write(offset, data, fua, signal);
    return this.counters.write.count(data.length, act, (result) => writeShortfall(result, data.length));
  }

  override flush(signal?: AbortSignal): Awaitable<void> {
    return this.counters.flush.count(0, () => super.flush(signal));
  }

  override zero(offset: number, length: number, mode: ZeroMode, signal?: AbortSignal): Awaitable<void> {
    return this.counters.zero.count(length, () => super.zero(offset, length, mode, signal));
  }

  override trim(offset: number, length: number, fua: boolean, signal?: AbortSignal): Awaitable<void> {
    return this.counters.trim.count(length, () => super.trim(offset, length, fua, signal));
  }

  override cache(offset: number, length: number, signal?: AbortSignal): Awaitable<void> {
    return this.counters.cache.count(length, () => super.cache(offset, length, signal));
  }

  override extents(
    context: string,
    offset: number,
    length: number,
    sink: ExtentSink,
    signal?: AbortSignal,
  ): Awaitable<void> {
    return this.counters.extents.count(length, () => super.extents(context, offset, length, sink, signal));
  }
}
