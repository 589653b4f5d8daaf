/** Sizes as people write them: "10G", "512M", "1.5T", "4096". All units are binary, as in Sheepdog and qemu-img. */

const UNITS = 'BKMGTP';

/** Text that is not a size; the message says what was given and what is valid. */
export class SizeError extends Error {}

/**
 * Bytes of "10G", "1.5T", "512MiB", "4096", "4096B". K, M, G, T, P are powers of 1024, in upper or lower case. "KB" and the
 * like are refused, because for many people they mean powers of 1000. Errors: SizeError.
 */
export function parseSize(text: string): number {
  const match = /^(\d{1,16})(?:\.(\d{1,6}))?\s*([BKMGTP]?)(iB)?$/i.exec(text.trim());
  const unit = match?.[3]?.toUpperCase() ?? '';
  if (!match || (match[4] && (unit === '' || unit === 'B'))) throw notASize(text);
  const factor = 1024 ** Math.max(UNITS.indexOf(unit || 'B'), 0);
  if (match[2] !== undefined && factor === 1) throw new SizeError(`"${text}": there are no fractions of a byte`);
  const bytes = Number(`${match[1]}.${match[2] ?? 0}`) * factor;
  if (bytes === 0) throw new SizeError(`"${text}": a size must be above zero`);
  if (!Number.isSafeInteger(Math.round(bytes))) throw new SizeError(`"${text}" is more than any VDI can have`);
  if (!Number.isInteger(bytes))
    throw new SizeError(`"${text}" is not a whole number of bytes; give it in a smaller unit`);
  return bytes;
}

function notASize(text: string): SizeError {
  return new SizeError(`"${text}" is no size; give a number and a unit, for example 10G, 512M, 1.5T, or bytes: 4096`);
}

/** Two sizes for one message, in bytes if they differ but would look the same. */
export function formatSizes(a: number, b: number): [string, string] {
  const texts: [string, string] = [formatSize(a), formatSize(b)];
  return a === b || texts[0] !== texts[1] ? texts : [`${a} bytes`, `${b} bytes`];
}

/** "10 GiB", "1.5 GiB", "512 B": at most four significant digits. */
export function formatSize(bytes: number): string {
  let exponent = 0;
  while (exponent < UNITS.length - 1 && bytes >= 1024 ** (exponent + 1)) exponent++;
  if (exponent === 0) return `${bytes} B`;
  const value = bytes / 1024 ** exponent;
  const digits = value >= 100 ? 0 : value >= 10 ? 1 : 2;
  return `${Number(value.toFixed(digits))} ${UNITS[exponent]}iB`;
}
