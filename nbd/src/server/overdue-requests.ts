/**
 * Requests that a device does not answer in time (Limits.requestTimeoutMs). It owns their clock, for all connections of an event
 * loop, and the ranges of changes that were given up on: the device may still make them, so nothing else may change these
 * ranges until it has settled. It answers nobody: each request knows how.
 *
 * One timer, and no timer at all while nothing is in flight. Requests are a list in the order in which they began; a tick looks
 * at its front only. Time is counted in ticks, never in less: a loop that stood still makes a request late, not overdue.
 */

import { DeviceError } from '../block-device.js';
import { CMD } from '../protocol/wire.js';

/** A tick is this part of the limit, and between these lengths, milliseconds. */
const TICKS = 16;
const SHORTEST_TICK_MS = 5;
const LONGEST_TICK_MS = 1000;

/** A request that the device answers later. Objects may be reused. */
export abstract class TimedRequest {
  /** NBD_CMD_* number, and its range, bytes. */
  abstract readonly type: number;
  abstract readonly offset: number;
  abstract readonly length: number;
  /** It was answered without the device, which has not settled yet. */
  isOverdue = false;
  /** For OverdueRequests only. */
  older: TimedRequest | undefined;
  younger: TimedRequest | undefined;
  beganAt = 0;

  /** Answer it now: its time is up. `error` says so. */
  abstract overdue(error: DeviceError): void;
}

export class OverdueRequests {
  /** Ranges that must not be changed now, of all exports; most of the time none. */
  takenRanges = 0;
  /** Whether requests have a time limit. */
  readonly isOn: boolean;

  readonly #limitMs: number;
  readonly #tickMs: number;
  /** Whole ticks in the limit. */
  readonly #limitTicks: number;
  readonly #takenOf = new Map<string, Set<TimedRequest>>();
  #first: TimedRequest | undefined;
  #last: TimedRequest | undefined;
  #tick = 0;
  #timer: NodeJS.Timeout | undefined;
  #hasBegun = false;

  /** @param limitMs 0: no limit */
  constructor(limitMs: number) {
    this.isOn = limitMs > 0 && Number.isFinite(limitMs);
    this.#limitMs = limitMs;
    this.#tickMs = Math.min(LONGEST_TICK_MS, Math.max(SHORTEST_TICK_MS, Math.ceil(limitMs / TICKS)));
    this.#limitTicks = Math.ceil(limitMs / this.#tickMs);
  }

  /** `request` is with the device. Only if `isOn`. */
  begin(request: TimedRequest): void {
    const last = this.#last;
    request.beganAt = this.#tick;
    request.older = last;
    this.#last = request;
    if (last === undefined) this.#first = request;
    else last.younger = request;
    this.#hasBegun = true;
    this.#timer ??= setInterval(this.#look, this.#tickMs);
  }

  /** The device has answered `request` in time. */
  end(request: TimedRequest): void {
    const { older, younger } = request;
    if (older === undefined && this.#first !== request) return;
    if (older === undefined) this.#first = younger;
    else older.younger = younger;
    if (younger === undefined) this.#last = older;
    else younger.older = older;
    request.older = request.younger = undefined;
  }

  /** Whether a change of this range must not be made now, since an overdue one may still happen. */
  isTaken(exportKey: string, offset: number, length: number): boolean {
    for (const other of this.#takenOf.get(exportKey) ?? []) {
      if (offset < other.offset + other.length && other.offset < offset + length) return true;
    }
    return false;
  }

  /** An overdue request: if it is a change, its range stays taken until `settled`. */
  take(exportKey: string, request: TimedRequest): void {
    if (!isChange(request.type)) return;
    let taken = this.#takenOf.get(exportKey);
    if (taken === undefined) this.#takenOf.set(exportKey, (taken = new Set()));
    taken.add(request);
    this.takenRanges++;
  }

  /** The device has answered it after all. */
  settled(exportKey: string, request: TimedRequest): void {
    const taken = this.#takenOf.get(exportKey);
    if (taken?.delete(request) !== true) return;
    this.takenRanges--;
    if (taken.size === 0) this.#takenOf.delete(exportKey);
  }

  readonly #look = (): void => {
    this.#tick++;
    if (this.#first === undefined && !this.#hasBegun) {
      clearInterval(this.#timer);
      this.#timer = undefined;
      return;
    }
    this.#hasBegun = false;
    for (let request = this.#first; request !== undefined; request = this.#first) {
      // The tick in which it began may have been almost over.
      if (this.#tick - request.beganAt <= this.#limitTicks) return;
      this.end(request);
      request.isOverdue = true;
      request.overdue(new DeviceError('EIO', `the export did not answer within ${this.#limitMs} ms`));
    }
  };
}

/** Whether a request of this type changes its range. */
export function isChange(type: number): boolean {
  return type === CMD.WRITE || type === CMD.TRIM || type === CMD.WRITE_ZEROES;
}
