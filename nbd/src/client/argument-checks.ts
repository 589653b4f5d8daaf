/**
 * Checks of what callers pass to the client, before anything of it is sent. A value of the wrong type is a TypeError, because the
 * program is wrong; a value of the right type that cannot be meant is an NbdClientError, or for an option a RangeError.
 */

import { types } from 'node:util';
import { kindOf } from '../kinds.js';
import { MAX_STRING_BYTES } from '../protocol/wire.js';
import { NbdClientError } from './client-error.js';

/** The longest delay of a timer, milliseconds: Node takes a longer one for 1 ms. */
const MAX_TIMER_MS = 2 ** 31 - 1;

/** Also for the arrays of another realm (vm, jest), for which instanceof is false. */
export function checkBytes(value: unknown, what: string): void {
  if (!types.isUint8Array(value)) throw new TypeError(`${what} must be a Uint8Array or Buffer, not ${kindOf(value)}`);
}

export function checkNumber(value: unknown, what: string): void {
  if (typeof value !== 'number') throw new TypeError(`${what} must be a number, not ${kindOf(value)}`);
}

export function checkSignal(value: AbortSignal | undefined): void {
  if (value === undefined) return;
  if (typeof (value as Partial<AbortSignal> | null)?.addEventListener !== 'function') {
    throw new TypeError(`signal must be an AbortSignal, not ${kindOf(value)}`);
  }
}

/** A string of the wire (proto.md, "Conventions"). Errors: TypeError; NbdClientError INVALID. */
export function checkText(value: unknown, what: string): void {
  if (typeof value !== 'string') throw new TypeError(`${what} must be a string, not ${kindOf(value)}`);
  if (value.includes('\0')) throw new NbdClientError('INVALID', `${what} contains NUL`);
  const bytes = Buffer.byteLength(value);
  if (bytes > MAX_STRING_BYTES) {
    throw new NbdClientError('INVALID', `${what} has ${bytes} bytes, at most ${MAX_STRING_BYTES} are allowed`);
  }
  // It would be sent as another name, with U+FFFD.
  if (!isWellFormed(value)) throw new NbdClientError('INVALID', `${what} has half of a surrogate pair`);
}

export function checkTexts(values: unknown, what: string): void {
  if (!Array.isArray(values)) throw new TypeError(`${what} must be an array of strings, not ${kindOf(values)}`);
  for (const value of values) checkText(value, `one of ${what}`);
}

/** @param fallback if `value` is undefined. Errors: TypeError, RangeError. */
export function checkedMs(value: number | undefined, what: string, fallback: number): number {
  if (value === undefined) return fallback;
  checkNumber(value, what);
  if (!(value >= 0 && value <= MAX_TIMER_MS)) {
    throw new RangeError(`${what} must be 0 (never) to ${MAX_TIMER_MS} milliseconds, not ${value}`);
  }
  return value;
}

/** A whole number from `least` on; `fallback` if `value` is undefined. Errors: TypeError, RangeError. */
export function checkedCount(value: number | undefined, what: string, fallback: number, least = 1): number {
  if (value === undefined) return fallback;
  checkNumber(value, what);
  if (!(value === Infinity || Number.isSafeInteger(value)) || value < least) {
    throw new RangeError(`${what} must be a whole number from ${least} on, not ${value}`);
  }
  return value;
}

function isWellFormed(text: string): boolean {
  return !/\p{Surrogate}/u.test(text);
}

/** What was thrown, which in JavaScript may be anything. */
export function asError(thrown: unknown): Error {
  return thrown instanceof Error ? thrown : new Error(String(thrown), { cause: thrown });
}
