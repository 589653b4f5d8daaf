/** Whether bytes are all zeros, for code that skips zeros or frees their space. */

const ZEROS = Buffer.alloc(64 * 2 ** 10);

/** The first byte is checked first: in data it is rarely zero. */
export function isZeros(data: Buffer): boolean {
  if (data.length > 0 && data[0] !== 0) return false;
  for (let from = 0; from < data.length; from += ZEROS.length) {
    const length = Math.min(ZEROS.length, data.length - from);
    if (data.compare(ZEROS, 0, length, from, from + length) !== 0) return false;
  }
  return true;
}
