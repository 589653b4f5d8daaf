/**
 * The erasure code of the nodes: how the strips of an object depend on each other. Owns the arithmetic in GF(256) and the
 * search for the wrong strip; reads nothing.
 *
 * The code is that of lib/fec.c (fec_new). For each byte, the data strips are the values of a polynomial of degree < D at the
 * points 0, 1, a, a^2, ... in this order, and the parity strips are its values at the next points. So any D strips determine
 * every other strip by interpolation. `a` is the root of x^8+x^4+x^3+x^2+1.
 */

const FIELD = 256;
const POLYNOMIAL = 0x11d;
/** SD_EC_DATA_STRIPE_SIZE: bytes of data in a stripe. */
export const STRIPE_BYTES = 512;

const EXP = new Uint8Array(2 * FIELD);
const LOG = new Uint8Array(FIELD);
for (let n = 0, power = 1; n < FIELD - 1; n++) {
  EXP[n] = EXP[n + FIELD - 1] = power;
  LOG[power] = n;
  power <<= 1;
  if (power >= FIELD) power ^= POLYNOMIAL;
}

function multiply(a: number, b: number): number {
  return a === 0 || b === 0 ? 0 : (EXP[(LOG[a] as number) + (LOG[b] as number)] as number);
}

function divide(a: number, b: number): number {
  return a === 0 ? 0 : (EXP[(LOG[a] as number) + FIELD - 1 - (LOG[b] as number)] as number);
}

/** All multiples of a factor: multiplying by it becomes one look-up. */
function multiplesOf(factor: number): Uint8Array {
  return Uint8Array.from({ length: FIELD }, (_, n) => multiply(factor, n));
}

function pointOf(strip: number): number {
  return strip === 0 ? 0 : (EXP[strip - 1] as number);
}

/** `wrongStrip`: -1 if it cannot be determined. */
export type StripeSink = (stripe: number, wrongStrip: number) => void;

/** Compares strips of these numbers with each other; there must be more of them than data strips. */
export class StripComparison {
  readonly #strips: readonly number[];
  readonly #data: number;
  /** For each strip after the first D, by each of the first D: its factor, and all multiples of the factor. */
  readonly #factors: readonly Uint8Array[];
  readonly #multiples: readonly (readonly Uint8Array[])[];

  constructor(data: number, strips: readonly number[]) {
    if (strips.length <= data) throw new Error('invariant: too few strips to compare');
    const base = strips.slice(0, data);
    this.#strips = strips;
    this.#data = data;
    this.#factors = strips.slice(data).map((strip) => Uint8Array.from(base, (each) => weight(base, each, strip)));
    this.#multiples = this.#factors.map((factors) => Array.from(factors, multiplesOf));
  }

  /**
   * Reports wrong stripes. `parts`: the same range of each strip, in the constructor's order. `stripBytes`: bytes that a stripe
   * has in each strip. Stripes are numbered from 0 within `parts`.
   */
  compare(parts: readonly Buffer[], stripBytes: number, sink: StripeSink): void {
    const base = parts.slice(0, this.#data);
    const length = base[0]?.length ?? 0;
    const differences = this.#multiples.map((multiples, k) =>
      difference(base, multiples, parts[this.#data + k] as Buffer),
    );
    const zeros = Buffer.alloc(length);
    if (differences.every((each) => zeros.equals(each))) return;
    for (let from = 0, stripe = 0; from < length; from += stripBytes, stripe++) {
      const to = Math.min(from + stripBytes, length);
      if (differences.every((each) => zeros.compare(each, from, to, from, to) === 0)) continue;
      sink(stripe, this.#wrongStrip(differences, from, to));
    }
  }

  /** A wrong strip changes every comparison by a factor of its own. With fewer than two comparisons it cannot be determined. */
  #wrongStrip(differences: readonly Buffer[], from: number, to: number): number {
    if (differences.length < 2) return -1;
    const wrong = differences.filter((each) => each.subarray(from, to).some((byte) => byte !== 0));
    if (wrong.length === 1) return this.#strips[this.#data + differences.indexOf(wrong[0] as Buffer)] as number;
    const [first] = differences as [Buffer];
    for (let n = 0; n < this.#data; n++) {
      const isIt = differences.every((each, k) => {
        for (let at = from; at < to; at++) {
          const error = divide(first[at] as number, this.#factors[0]?.[n] as number);
          if (each[at] !== multiply(error, this.#factors[k]?.[n] as number)) return false;
        }
        return true;
      });
      if (isIt) return this.#strips[n] as number;
    }
    return -1;
  }
}

/** Lagrange: the factor of the value at strip `each` of `base` in the value at `strip`. */
function weight(base: readonly number[], each: number, strip: number): number {
  let value = 1;
  for (const other of base) {
    if (other === each) continue;
    value = multiply(value, pointOf(strip) ^ pointOf(other));
    value = divide(value, pointOf(each) ^ pointOf(other));
  }
  return value;
}

/** What must be added to `found` to equal the value that the base strips determine. */
function difference(base: readonly Buffer[], multiples: readonly Uint8Array[], found: Buffer): Buffer {
  const sum = Buffer.from(found);
  for (const [n, part] of base.entries()) {
    const products = multiples[n] as Uint8Array;
    for (let at = 0; at < sum.length; at++) {
      sum[at] = (sum[at] as number) ^ (products[part[at] as number] as number);
    }
  }
  return sum;
}
