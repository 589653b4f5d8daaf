/**
 * Whether a device has transferred all bytes of a read or write, by what its method returned, and whether their memory is still
 * there. It owns these rules; it knows neither requests nor replies.
 */

/**
 * Why `result`, which `read` returned or resolved with, is not a whole read into `into`; undefined if it is. A device that
 * returns a buffer has filled that one and not `into`.
 */
export function readShortfall(result: unknown, into: Uint8Array): string | undefined {
  if (result === undefined || result === null || isSameView(result, into)) return undefined;
  return countShortfall('read', countOf(result, 'bytesRead'), result, into.length);
}

/** The same for `write` of `length` bytes. What is not a count says nothing: an expression as the method's body returns anything. */
export function writeShortfall(result: unknown, length: number): string | undefined {
  const count = countOf(result, 'bytesWritten');
  return count === undefined ? undefined : countShortfall('write', count, result, length);
}

function countShortfall(
  method: string,
  count: number | undefined,
  result: unknown,
  length: number,
): string | undefined {
  if (count === length) return undefined;
  if (count !== undefined) return `${method} returned ${count} for ${length} bytes`;
  const kind = ArrayBuffer.isView(result) || result instanceof ArrayBuffer ? 'another buffer' : `a ${typeof result}`;
  return `${method} returned ${kind}; it must fill \`into\`, and return nothing or the number of bytes`;
}

function countOf(result: unknown, field: 'bytesRead' | 'bytesWritten'): number | undefined {
  if (typeof result === 'number') return result;
  if (typeof result !== 'object' || result === null || !(field in result)) return undefined;
  const count: unknown = (result as Record<typeof field, unknown>)[field];
  return typeof count === 'number' ? count : undefined;
}

/** `into.fill(…)` returns it, and so does a method that ends with `return into`. */
function isSameView(result: unknown, into: Uint8Array): boolean {
  if (result === into) return true;
  if (!(result instanceof Uint8Array) || result.buffer !== into.buffer) return false;
  return result.byteOffset === into.byteOffset && result.length === into.length;
}

/** Why a request fails whose memory the device has given away. */
export const DETACHED =
  'the device has transferred (detached) the memory of a request, which is not its own; it must copy the data';

/** Whether the memory of `view`, which had `length` bytes, was given away, as postMessage and structuredClone can. */
export function isDetached(view: Uint8Array, length: number): boolean {
  return view.length !== length;
}
