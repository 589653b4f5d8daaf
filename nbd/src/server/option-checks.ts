/** Options of the wrong kind are refused where they are given. It owns the words; what an option may be, its owner knows. */

/** Errors: TypeError if `given` is no object with options. */
export function checkOptions(name: string, given: unknown): void {
  if (typeof given === 'object' && given !== null && !Array.isArray(given)) return;
  throw new TypeError(`${name} must be an object, not ${kindOf(given)}`);
}

/** Errors: TypeError if `given` is neither undefined nor a function. */
export function checkCallback(name: string, given: unknown): void {
  if (given === undefined || typeof given === 'function') return;
  throw new TypeError(`${name} must be a function, not ${kindOf(given)}`);
}

function kindOf(given: unknown): string {
  if (given === null || given === undefined) return String(given);
  return Array.isArray(given) ? 'an array' : typeof given === 'object' ? 'an object' : `a ${typeof given}`;
}
