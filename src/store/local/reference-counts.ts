/**
 * How many maps refer to each data object. Nothing of this is stored: it is counted from the maps when the store opens.
 * A reference that a VDI has given up in memory still counts until that VDI's map is durable, because after a crash the
 * old map is the truth again: whoever is told "exclusive" may therefore overwrite without asking.
 */
import { MAX_DATA_OBJECTS } from '../object-store.js';

const MAX_VID = 2 ** 24 - 1;

/** (vid, idx) as one number, exact: 24 + 20 bits. */
export function objectKey(vid: number, idx: number): number {
  return vid * MAX_DATA_OBJECTS + idx;
}

export function vidOf(key: number): number {
  return Math.floor(key / MAX_DATA_OBJECTS);
}

export function idxOf(key: number): number {
  return key % MAX_DATA_OBJECTS;
}

export class ReferenceCounts {
  readonly #counts = new Map<number, Uint32Array>();
  readonly #objects = new Map<number, number>(); // vid -> its objects with a count above 0
  #lastVid = -1;
  #last: Uint32Array = new Uint32Array(0);

  of(vid: number, idx: number): number {
    return this.#of(vid)[idx] ?? 0;
  }

  add(vid: number, idx: number): void {
    let counts = this.#of(vid);
    if (idx >= counts.length) counts = this.#grow(vid, idx);
    const before = counts[idx] ?? 0;
    counts[idx] = before + 1;
    if (before === 0) this.#objects.set(vid, (this.#objects.get(vid) ?? 0) + 1);
  }

  /** Returns what is left. */
  drop(vid: number, idx: number): number {
    const counts = this.#of(vid);
    const before = counts[idx] ?? 0;
    if (before === 0) throw new Error(`invariant: object (${vid}, ${idx}) lost a reference it did not have`);
    counts[idx] = before - 1;
    if (before === 1) {
      const left = (this.#objects.get(vid) ?? 1) - 1;
      if (left > 0) this.#objects.set(vid, left);
      else {
        this.#objects.delete(vid);
        this.#counts.delete(vid);
        this.#lastVid = -1;
      }
    }
    return before - 1;
  }

  addAll(map: Uint32Array): void {
    for (let idx = 0; idx < map.length; idx++) {
      const owner = map[idx] as number;
      if (owner !== 0) this.add(owner, idx);
    }
  }

  /** Some object of this vid is still referred to, so the vid must not be given to a new VDI. */
  uses(vid: number): boolean {
    return this.#objects.has(vid);
  }

  get highestVid(): number {
    let highest = 0;
    for (const vid of this.#objects.keys()) highest = Math.max(highest, vid);
    return highest;
  }

  get objects(): number {
    let sum = 0;
    for (const count of this.#objects.values()) sum += count;
    return sum;
  }

  *keys(): Generator<number> {
    for (const [vid, counts] of this.#counts) {
      for (let idx = 0; idx < counts.length; idx++) if (counts[idx] !== 0) yield objectKey(vid, idx);
    }
  }

  #of(vid: number): Uint32Array {
    if (vid !== this.#lastVid) {
      const counts = this.#counts.get(vid);
      if (!counts) return EMPTY;
      this.#lastVid = vid;
      this.#last = counts;
    }
    return this.#last;
  }

  #grow(vid: number, idx: number): Uint32Array {
    if (vid <= 0 || vid > MAX_VID) throw new Error(`invariant: vid ${vid} out of range`);
    const old = this.#counts.get(vid);
    const counts = new Uint32Array(Math.min(MAX_DATA_OBJECTS, Math.max(64, 2 ** Math.ceil(Math.log2(idx + 1)))));
    if (old) counts.set(old);
    this.#counts.set(vid, counts);
    this.#lastVid = vid;
    this.#last = counts;
    return counts;
  }
}

const EMPTY = new Uint32Array(0);
