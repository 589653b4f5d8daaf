/**
 * What kind of thing a program has given, for the messages that refuse it, and the two checks that all options need. It owns
 * these words; what an argument may be, its owner knows.
 */

/** "null", "an array", "a promise", "a Buffer", "a string". Never throws, and shows nothing of the value. */
export function kindOf(value: unknown): string {
  if (value === null || value === undefined) return String(value);
  if (value === '') return 'an empty string';
  if (typeof value !== 'object') return `a ${typeof value}`;
  try {
    if (isThenable(value)) return 'a promise';
    if (Array.isArray(value)) return 'an array';
    const { name } = (value as { readonly constructor?: { readonly name?: unknown } }).constructor ?? {};
    if (typeof name !== 'string' || name === '' || name === 'Object') return 'an object';
    return `${/^[AEIOU]/.test(name) ? 'an' : 'a'} ${name}`;
  } catch {
    // A getter or a proxy of the program has thrown.
    return 'an object';
  }
}

/** Errors: what a getter or a proxy of the program throws. */
export function isThenable(value: unknown): boolean {
  return typeof value === 'object' && value !== null && typeof (value as { then?: unknown }).then === 'function';
}

/** Errors: TypeError if `value` is no object with options. */
export function checkObject(value: unknown, what: string): void {
  if (typeof value === 'object' && value !== null && !Array.isArray(value)) return;
  throw new TypeError(`${what} must be an object, not ${kindOf(value)}`);
}

/** Errors: TypeError if `value` is neither undefined nor a function. */
export function checkFunction(value: unknown, what: string): void {
  if (value === undefined || typeof value === 'function') return;
  throw new TypeError(`${what} must be a function, not ${kindOf(value)}`);
}
