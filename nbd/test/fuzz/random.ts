/** Seeded choices: the same seed makes the same input. */

export class Random {
  private state: number;

  constructor(seed: number) {
    // Neighbouring seeds must give different first numbers.
    this.state = Math.imul(seed ^ 0x9e3779b9, 0x85ebca6b) >>> 0 || 1;
    for (let i = 0; i < 4; i++) this.next();
  }

  /** 32 random bits (xorshift). */
  next(): number {
    let x = this.state;
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    this.state = x >>> 0;
    return this.state;
  }

  /** A whole number from 0 to below `end`. */
  below(end: number): number {
    return Math.floor((this.next() / 2 ** 32) * end);
  }

  /** True once in `n`. */
  oneIn(n: number): boolean {
    return this.below(n) === 0;
  }

  pick<T>(from: readonly T[]): T {
    if (from.length === 0) throw new Error('nothing to pick from');
    return from[this.below(from.length)] as T;
  }

  bytes(length: number): Buffer {
    const bytes = Buffer.allocUnsafe(length);
    for (let at = 0; at < length; at++) bytes[at] = this.next() & 0xff;
    return bytes;
  }

  /** A number that finds off-by-one errors: small, near a power of two, near the end of a range, or any. */
  interesting(end: number): number {
    switch (this.below(6)) {
      case 0:
        return this.below(3);
      case 1:
        return Math.max(0, 2 ** this.below(40) + this.below(3) - 1);
      case 2:
        return Math.max(0, end + this.below(5) - 2);
      case 3:
        return this.below(64) * 512;
      default:
        return this.below(Math.max(1, end));
    }
  }

  /** `bytes` with a few mutations: bits flipped, bytes changed, removed, repeated or cut off. */
  mutate(bytes: Buffer): Buffer {
    let mutated = Buffer.from(bytes);
    for (let count = 1 + this.below(3); count > 0; count--) {
      const at = this.below(mutated.length + 1);
      switch (this.below(6)) {
        case 0:
        case 1:
          if (at < mutated.length) mutated[at] = (mutated[at] ?? 0) ^ (1 << this.below(8));
          break;
        case 2:
          if (at < mutated.length) mutated[at] = this.pick([0, 1, 0x7f, 0x80, 0xff]);
          break;
        case 3:
          mutated = Buffer.concat([mutated.subarray(0, at), mutated.subarray(at + 1 + this.below(8))]);
          break;
        case 4:
          mutated = Buffer.concat([mutated.subarray(0, at), this.bytes(1 + this.below(8)), mutated.subarray(at)]);
          break;
        default:
          mutated = mutated.subarray(0, at);
      }
    }
    return mutated;
  }

  /** `bytes` cut into chunks, as a network may do. */
  split(bytes: Buffer): Buffer[] {
    if (bytes.length === 0) return [];
    if (this.oneIn(2)) return [bytes];
    const chunks: Buffer[] = [];
    const most = this.pick([1, 7, 40, 500, 5000]);
    // Byte by byte only at first: for long inputs it takes long and finds nothing new.
    for (let at = 0; at < bytes.length;) {
      const end = chunks.length > 200 ? bytes.length : Math.min(bytes.length, at + 1 + this.below(most));
      chunks.push(bytes.subarray(at, end));
      at = end;
    }
    return chunks;
  }
}
