/**
 * What a program has given as a device, checked before anybody is served: each mistake that can be seen without calling the
 * device has one clear message. It owns these rules; those of the geometry itself are in server/geometry.ts.
 */

import type { CompleteDevice, Geometry } from './block-device.js';
import { completeDevice, type AnyDevice } from './device.js';
import { geometryProblem } from './server/geometry.js';
import { isThenable, kindOf } from './kinds.js';

/** Methods that a device may lack. */
const OPTIONAL_METHODS = ['write', 'flush', 'zero', 'trim', 'cache', 'extents', 'isHole', 'close'] as const;
/** Fields that are true or false, of the geometry and beside it. */
const FLAGS = [
  ...(['readOnly', 'canFlush', 'canFua', 'canTrim', 'canZero', 'canFastZero', 'canCache'] as const),
  ...(['multiConn', 'rotational', 'fillsBuffer'] as const),
];

/**
 * The complete device of what was given as one. `what` names it in errors ("the device", `export "a"`).
 * Errors: TypeError, with everything that a program needs to find its mistake.
 */
export function checkedDevice(given: unknown, what: string): CompleteDevice {
  const problem = shapeProblem(given);
  if (problem !== undefined) throw new TypeError(`${what} cannot be served: ${problem}`);
  const device = given as AnyDevice;
  const complete = completeDevice(device);
  const geometry = geometryProblem(complete.geometry) ?? missing(device, complete.geometry);
  if (geometry !== undefined) throw new TypeError(`${what} cannot be served: ${geometry}`);
  return complete;
}

/** The same for a device that was opened for a client: one that cannot be served is closed again. */
export async function checkedOpened(given: unknown, what: string): Promise<CompleteDevice> {
  try {
    return checkedDevice(given, what);
  } catch (error) {
    try {
      await (given as Partial<AnyDevice> | undefined)?.close?.('disconnect');
    } catch {
      // Its first mistake is the one to mend.
    }
    throw error;
  }
}

/** Why `given` is no device at all; undefined if it is one, good or bad. */
function shapeProblem(given: unknown): string | undefined {
  if (isThenable(given)) return 'it is a promise; await it';
  if (typeof given === 'function') return 'it is a function; createServer takes a function that gives a device';
  if (typeof given !== 'object' || given === null) return `it is ${kindOf(given)}, and a device is an object`;
  const methods = given as Readonly<Record<string, unknown>>;
  if (typeof methods.read !== 'function') {
    return methods.read === undefined ? `it is ${kindOf(given)} without a method read` : notAFunction('read', methods);
  }
  for (const name of OPTIONAL_METHODS) {
    if (methods[name] !== undefined && typeof methods[name] !== 'function') return notAFunction(name, methods);
  }
  if (!('geometry' in given)) return fieldProblem(methods);
  const { geometry } = given;
  if (typeof geometry !== 'object' || geometry === null) return `geometry is ${kindOf(geometry)}, not an object`;
  return fieldProblem({ ...geometry, fillsBuffer: methods.fillsBuffer });
}

function notAFunction(name: string, device: Readonly<Record<string, unknown>>): string {
  return `${name} is ${kindOf(device[name])}, not a function; leave out what the device cannot do`;
}

/** The types of the fields; their values are checked with the whole geometry. */
function fieldProblem(fields: Readonly<Record<string, unknown>>): string | undefined {
  const { size, contexts, wideContexts } = fields;
  if (size === undefined) return 'it has no size, in bytes';
  if (typeof size !== 'number') {
    return `size is ${kindOf(size)}, not a number${typeof size === 'bigint' ? '; give Number(size)' : ''}`;
  }
  for (const name of FLAGS) {
    const flag = fields[name];
    if (flag !== undefined && typeof flag !== 'boolean') return `${name} is ${kindOf(flag)}, not true or false`;
  }
  for (const [name, list] of Object.entries({ contexts, wideContexts })) {
    const isList = Array.isArray(list) && list.every((context) => typeof context === 'string');
    if (list !== undefined && !isList) return `${name} is ${kindOf(list)}, not an array of names`;
  }
  return undefined;
}

/** What `geometry` announces and `device` cannot do; undefined if nothing. */
function missing(device: AnyDevice, geometry: Geometry): string | undefined {
  const { readOnly, canFlush, canTrim, canZero, canCache, contexts } = geometry;
  const has = (name: (typeof OPTIONAL_METHODS)[number]): boolean => device[name] !== undefined;
  if (!readOnly && !has('write')) return 'it is not readOnly, and has no method write';
  if (canFlush && !has('flush')) return 'canFlush without a method flush';
  if (canTrim && !has('trim')) return 'canTrim without a method trim';
  if (canZero && !has('zero') && !has('write')) return 'canZero without a method zero or write';
  if (canCache && !has('cache')) return 'canCache without a method cache';
  if (contexts.length > 0 && !has('extents')) return 'contexts without a method extents';
  return undefined;
}
