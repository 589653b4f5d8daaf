/**
 * `instanceof` for the error classes of this package where it is loaded twice (two versions in one program, CommonJS beside
 * ESM, a bundle): an error is of the class that it was made by, whichever copy that was. It owns the rule; each class owns its
 * brand, a symbol of the global registry that stands on its prototype.
 */

/**
 * Whether `value` is an instance for `value instanceof asked`. For `branded` itself the brand decides; for a subclass, which
 * inherits the method, the prototype chain, as usual.
 */
export function isInstance(asked: unknown, branded: unknown, brand: symbol, value: unknown): boolean {
  if (asked !== branded) return Function.prototype[Symbol.hasInstance].call(asked, value);
  return typeof value === 'object' && value !== null && brand in value;
}
