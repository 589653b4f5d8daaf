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

/** The method that `geometry` announces and `device` lacks, as a message; undefined if none. */
export function missingMethod(device: BlockDevice, geometry: Geometry): string | undefined {
  if (geometry.canTrim && device.trim === undefined) return 'canTrim without a method trim';
  if (geometry.canZero && device.zero === undefined) return 'canZero without a method zero';
  if (geometry.canCache && device.cache === undefined) return 'canCache without a method cache';
  if (geometry.contexts.length > 0 && device.extents === undefined) return 'contexts without a method extents';
  return undefined;
}

/**
 * Why `geometry` cannot be announced, or undefined if it can ("Size constraints").
 */
export function geometryProblem(geometry: Geometry): string | undefined {
  const { size, minimumBlockSize, preferredBlockSize } = geometry;
  if (!Number.isSafeInteger(size) || size < 0) return `size ${size} is not an integer from 0 to 2^53-1`;
  if (!isPowerOfTwo(minimumBlockSize) || minimumBlockSize > MAX_MINIMUM_BLOCK_SIZE) {
    return `minimumBlockSize ${minimumBlockSize} is not a power of two from 1 to ${MAX_MINIMUM_BLOCK_SIZE}`;
  }
  const leastPreferred = Math.max(minimumBlockSize, LEAST_PREFERRED_BLOCK_SIZE);
  if (!isPowerOfTwo(preferredBlockSize) || preferredBlockSize < leastPreferred || preferredBlockSize > MAX_PAYLOAD) {
    return `preferredBlockSize ${preferredBlockSize} is not a power of two from ${leastPreferred} to ${MAX_PAYLOAD}`;
  }
  const { contexts, wideContexts = [] } = geometry;
  const badContext = contexts.find((name) => !isContextName(name));
  if (badContext !== undefined) return `context ${JSON.stringify(badContext)} is not NAMESPACE:LEAF`;
  if (new Set(contexts).size !== contexts.length) return 'a context is listed twice';
  const unknown = wideContexts.find((name) => !contexts.includes(name));
  if (unknown !== undefined) return `wideContexts has ${JSON.stringify(unknown)}, which contexts lacks`;
  return undefined;
}

/** "Metadata querying": a namespace of printable characters, a colon, and a leaf, which distinguishes it from a query. */
function isContextName(name: string): boolean {
  return /^[^\p{C}\p{Z}:]+:./u.test(name) && decodeString(Buffer.from(name)) === name;
}

function isPowerOfTwo(value: number): boolean {
  return Number.isInteger(value) && value >= 1 && value <= 0x4000_0000 && (value & (value - 1)) === 0;
}
