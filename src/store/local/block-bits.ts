/**
 * Bitmaps in 32-bit words, for the presence of an overlay's blocks. A bitmap is a part of a larger array: `at` is the index of
 * its first word, and bit n is in word `at + (n >>> 5)`. Nothing is allocated, and no range is checked: callers do that.
 */

const WORD_BITS = 32;
const ALL = 0xffff_ffff;

/** The first bit in [from, end) that is set, or with `value` false is not set; `end` if there is none. */
export function nextBit(words: Uint32Array, at: number, from: number, end: number, value: boolean): number {
  for (let bit = from; bit < end;) {
    // Bits that are looked for are 1 here.
    let word = words[at + (bit >>> 5)] as number;
    if (!value) word = ~word;
    word >>>= bit & (WORD_BITS - 1);
    if (word !== 0) return Math.min(end, bit + lowestBit(word));
    bit += WORD_BITS - (bit & (WORD_BITS - 1));
  }
  return end;
}

function lowestBit(word: number): number {
  return WORD_BITS - 1 - Math.clz32(word & -word);
}

/** Set or clear the bits [from, end). */
export function putBits(words: Uint32Array, at: number, from: number, end: number, value: boolean): void {
  for (let bit = from; bit < end;) {
    const shift = bit & (WORD_BITS - 1);
    const count = Math.min(WORD_BITS - shift, end - bit);
    const mask = count === WORD_BITS ? ALL : ((1 << count) - 1) << shift;
    const index = at + (bit >>> 5);
    const word = words[index] as number;
    words[index] = value ? word | mask : word & ~mask;
    bit += count;
  }
}

/** How many bits of `count` words are set. */
export function countBits(words: Uint32Array, at: number, count: number): number {
  let sum = 0;
  for (let index = at; index < at + count; index++) {
    let word = words[index] as number;
    word -= (word >>> 1) & 0x5555_5555;
    word = (word & 0x3333_3333) + ((word >>> 2) & 0x3333_3333);
    sum += Math.imul((word + (word >>> 4)) & 0x0f0f_0f0f, 0x0101_0101) >>> 24;
  }
  return sum;
}
