/**
 * Checks the fields of a control request and turns them into values of their types. Owns what each field may hold and the
 * message that says what was found. Does nothing with the values.
 */
import { MAX_KEEP_OUT_MS } from '../../operations/control-protocol.js';
import { OperationError } from '../../operations/operations.js';
import type { Redundancy } from '../../store/vdi-record.js';
import { parseRedundancy, REDUNDANCY_HELP } from '../../store/redundancy.js';

export type Body = Readonly<Record<string, unknown>>;

/** The room that a store has in the mark of an unfinished VDI. */
export const MAX_RUN_DIGITS = 32;
export const MAX_OF_DIGITS = 64;

export function first(names: readonly string[]): string {
  return names[0] ?? '';
}

export function text(body: Body, field: string): string {
  const value = body[field];
  if (typeof value !== 'string') throw badRequest(`"${field}" must be a string, not ${JSON.stringify(value)}`);
  return value;
}

export function wholeNumber(body: Body, field: string): number {
  const value = body[field];
  if (typeof value !== 'number' || !Number.isSafeInteger(value)) {
    throw badRequest(`"${field}" must be a whole number, not ${JSON.stringify(value)}`);
  }
  return value;
}

export function connectionId(name: string): number {
  if (!/^\d{1,15}$/.test(name)) throw badRequest(`${JSON.stringify(name)} is not the number of a connection`);
  return Number(name);
}

export function keepOutIn(body: Body): number {
  const ms = body.keepOutMs === undefined ? 0 : wholeNumber(body, 'keepOutMs');
  if (ms < 0 || ms > MAX_KEEP_OUT_MS) throw badRequest(`"keepOutMs" must be 0 to ${MAX_KEEP_OUT_MS}, not ${ms}`);
  return ms;
}

export function offsetIn(query: URLSearchParams): number {
  const offset = query.get('offset') ?? '0';
  if (!/^\d{1,16}$/.test(offset)) throw badRequest(`"offset" must be a whole number, not ${JSON.stringify(offset)}`);
  return Number(offset);
}

export function flag(body: Body, field: string): boolean {
  const value = body[field] ?? false;
  if (typeof value !== 'boolean') throw badRequest(`"${field}" must be true or false, not ${JSON.stringify(value)}`);
  return value;
}

export function hex(body: Body, field: string, mostDigits: number): string {
  const value = text(body, field);
  if (!/^[0-9a-f]*$/.test(value) || value.length > mostDigits) {
    throw badRequest(`"${field}" must be at most ${mostDigits} hex digits, not ${JSON.stringify(value)}`);
  }
  return value;
}

export function copiesIn(body: Body): Redundancy | undefined {
  if (body.copies === undefined) return undefined;
  const redundancy = parseRedundancy(text(body, 'copies'));
  if (redundancy) return redundancy;
  throw badRequest(`"copies" must be ${REDUNDANCY_HELP}, not ${JSON.stringify(body.copies)}`);
}

export function optionalNumber(body: Body, key: string): number | undefined {
  return body[key] === undefined ? undefined : wholeNumber(body, key);
}

export function runIn(body: Body): string | undefined {
  return body.run === undefined ? undefined : hex(body, 'run', MAX_RUN_DIGITS);
}

export function badRequest(message: string): OperationError {
  return new OperationError('BAD_REQUEST', message);
}
