/**
 * `instanceof` for the error classes of this package where it is loaded twice (two versions in one program, CommonJS beside
 * ESM, a bundle): an error is of the class that it was made by, whichever copy that was. It owns the rule, and leaves no trace
 * in the types: those of two copies fit each other.
 */

/**
 * Mark all instances of `branded` with a symbol of the global registry, by which `instanceof branded` then decides. For its
 * subclasses the prototype chain does, as usual. `name`: that of the class.
 */
export function brand(branded: { readonly prototype: object }, name: string): void {
  const mark = Symbol.for(`nbd-server-ts.${name}`);
  Object.defineProperty(branded.prototype, mark, { value: true });
  Object.defineProperty(branded, Symbol.hasInstance, {
    value(this: unknown, value: unknown): boolean {
      // Inherited by subclasses.
      if (this !== branded) return Function.prototype[Symbol.hasInstance].call(this, value);
      return typeof value === 'object' && value !== null && mark in value;
    },
  });
}
