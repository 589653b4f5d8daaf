/**
 * A device's geometry, checked before anything is announced. It owns the rules; a device that breaks them has a bug, and is not
 * served. The defaults are in device.ts.
 */

import type { BlockDevice, CompleteDevice, Geometry } from '../block-device.js';
import { decodeString, LEAST_PREFERRED_BLOCK_SIZE, MAX_MINIMUM_BLOCK_SIZE, MAX_PAYLOAD } from '../protocol/wire.js';

/**
 * A device as requests reach it. It has all methods that its geometry announces (see missingMethod); requestError refuses the
 * commands of the others.
 */
export type ServedDevice = BlockDevice & Pick<CompleteDevice, 'zero' | 'trim' | 'cache' | 'extents'>;

/** Whether `device` says that its reads fill their memory. */
export function fillsBuffer(device: BlockDevice): boolean {
  try {
    return device.fillsBuffer === true;
  } catch {
    // A getter or a proxy of the program has thrown.
    return false;
  }
}

/** The method that `device` lacks, of those that each has and those that `geometry` announces, as a message; undefined if none. */
export function missingMethod(device: BlockDevice, geometry: Geometry): string | undefined {
  if (typeof device.read !== 'function') return 'the device has no method read';
  if (!geometry.readOnly && typeof device.write !== 'function') return 'not readOnly without a method write';
  if (geometry.canFlush && typeof device.flush !== 'function') return 'canFlush without a method flush';
  if (geometry.canTrim && typeof device.trim !== 'function') return 'canTrim without a method trim';
  if (geometry.canZero && typeof device.zero !== 'function') return 'canZero without a method zero';
  if (geometry.canCache && typeof device.cache !== 'function') return 'canCache without a method cache';
  if (geometry.contexts.length > 0 && typeof device.extents !== 'function') return 'contexts without a method extents';
  return undefined;
}

/**
 * Why `geometry` cannot be announced, or undefined if it can ("Size constraints").
 */
export function geometryProblem(geometry: Geometry): string | undefined {
  const { size, minimumBlockSize, preferredBlockSize } = geometry;
  if (typeof size !== 'number') return `size is a value of type ${typeof size}, not a number`;
  if (!Number.isSafeInteger(size) || size < 0) return `size ${size} is not an integer from 0 to 2^53-1`;
  if (!isPowerOfTwo(minimumBlockSize) || minimumBlockSize > MAX_MINIMUM_BLOCK_SIZE) {
    return `minimumBlockSize ${minimumBlockSize} is not a power of two from 1 to ${MAX_MINIMUM_BLOCK_SIZE}`;
  }
  const leastPreferred = Math.max(minimumBlockSize, LEAST_PREFERRED_BLOCK_SIZE);
  if (!isPowerOfTwo(preferredBlockSize) || preferredBlockSize < leastPreferred || preferredBlockSize > MAX_PAYLOAD) {
    return `preferredBlockSize ${preferredBlockSize} is not a power of two from ${leastPreferred} to ${MAX_PAYLOAD}`;
  }
  const { contexts, wideContexts = [] } = geometry;
  for (const list of [contexts, wideContexts] as readonly unknown[]) {
    if (!Array.isArray(list)) return 'contexts is not a list of names';
  }
  const badContext = contexts.find((name) => !isContextName(name));
  if (badContext !== undefined) return `context ${JSON.stringify(badContext)} is not NAMESPACE:LEAF`;
  if (new Set(contexts).size !== contexts.length) return 'a context is listed twice';
  const unknown = wideContexts.find((name) => !contexts.includes(name));
  if (unknown !== undefined) return `wideContexts has ${JSON.stringify(unknown)}, which contexts lacks`;
  return undefined;
}

/** "Metadata querying": a namespace of printable characters, a colon, and a leaf, which distinguishes it from a query. */
function isContextName(name: string): boolean {
  return typeof name === 'string' && /^[^\p{C}\p{Z}:]+:./u.test(name) && decodeString(Buffer.from(name)) === name;
}

function isPowerOfTwo(value: number): boolean {
  return Number.isInteger(value) && value >= 1 && value <= 0x4000_0000 && (value & (value - 1)) === 0;
}
