/**
 * Which objects are overlays, what they lie over, and which of their blocks they have: in memory, for the whole store. The bases
 * of all overlays are here from the start; bitmaps are read from the metadata by groups, when a VDI that needs them is opened.
 * Owns this state. Counts no references, reads no data, and does not make anything durable: its callers do, in the right order.
 */
import { countBits, nextBit, putBits } from './block-bits.js';
import {
  basesOf,
  blocksOf,
  damagedGroup,
  decodeGroup,
  GROUP_OBJECTS,
  GROUP_SHIFT,
  OVERLAY_BLOCK,
  storedOverlay,
  wordsOf,
  type OverlayWrite,
} from './overlay-records.js';
import { idxOf, localObjectKey, vidOf } from './reference-counts.js';

/** Neighbouring objects whose overlays are in one segment file. A multiple of GROUP_OBJECTS. */
export const SEGMENT_OBJECTS = 256;
const SEGMENT_SHIFT = 8;

/** Reads what is stored; undefined if there is nothing. Errors: those of reading the metadata. */
export type ReadGroup = (vid: number, group: number) => Uint8Array | undefined;

/** The overlays of one vid. */
class OverlaysOfVid {
  readonly words: number;
  /** By group: the base of each object, 0 for none. */
  readonly bases: (Uint32Array | undefined)[] = [];
  /** By group: the bitmaps of its objects; undefined if they were not read yet. */
  readonly bits: (Uint32Array | undefined)[] = [];
  /** By segment: how many overlays it has. */
  readonly live: number[] = [];
  count = 0;

  constructor(readonly blocks: number) {
    this.words = wordsOf(blocks);
  }
}

export class Overlays {
  readonly #vids = new Map<number, OverlaysOfVid>();
  readonly #read: ReadGroup;
  /** Overlays whose reference to the object below belongs to somebody else: they are given up, and their record is stored still. */
  readonly #detached = new Set<number>();
  #lastVid = -1;
  #last: OverlaysOfVid | undefined;

  constructor(read: ReadGroup) {
    this.#read = read;
  }

  /** Forget all of them. */
  clear(): void {
    this.#vids.clear();
    this.#detached.clear();
    this.#lastVid = -1;
  }

  /** How many there are. */
  get size(): number {
    let sum = 0;
    for (const { count } of this.#vids.values()) sum += count;
    return sum;
  }

  /** What the object lies over: a vid; its own if nothing is below; 0 if the object is no overlay. */
  baseOf(vid: number, idx: number): number {
    if (vid !== this.#lastVid) {
      this.#lastVid = vid;
      this.#last = this.#vids.get(vid);
    }
    if (this.#last === undefined) return 0;
    return this.#last.bases[idx >>> GROUP_SHIFT]?.[idx & (GROUP_OBJECTS - 1)] ?? 0;
  }

  /** Whether it has overlays: a new VDI must not get this vid. */
  uses(vid: number): boolean {
    return this.#vids.has(vid);
  }

  /** Overlays of the vid in the segment. */
  inSegment(vid: number, segment: number): number {
    return this.#vids.get(vid)?.live[segment] ?? 0;
  }

  /** How many of the object and those below it are overlays. */
  depthOf(vid: number, idx: number): number {
    let depth = 0;
    for (let at = vid, base = this.baseOf(vid, idx); base !== 0; base = this.baseOf(at, idx)) {
      depth++;
      if (base === at) break;
      at = base;
    }
    return depth;
  }

  /** The vids of the object and of those below it, from the top. The last one has all of its content itself. */
  layersOf(vid: number, idx: number): number[] {
    const layers = [vid];
    for (let at = vid, base = this.baseOf(at, idx); base !== 0 && base !== at; base = this.baseOf(at, idx))
      layers.push((at = base));
    return layers;
  }

  /**
   * The keys, those below before those over them: blocks that an overlay has given to the one below must not be missing in both.
   * Neighbours stay together, because they share records.
   */
  fromBelow(keys: Iterable<number>): number[] {
    const depths = new Map<number, number>();
    for (const key of keys) depths.set(key, this.depthOf(vidOf(key), idxOf(key)));
    return [...depths].sort(([a, depth], [b, other]) => depth - other || a - b).map(([key]) => key);
  }

  /** All keys (localObjectKey) with their bases, in no order. */
  *entries(): Generator<{ readonly key: number; readonly base: number }> {
    for (const [vid, of] of this.#vids) {
      for (const [group, bases] of of.bases.entries()) {
        if (bases === undefined) continue;
        for (let n = 0; n < GROUP_OBJECTS; n++) {
          const base = bases[n] as number;
          if (base !== 0) yield { key: localObjectKey(vid, group * GROUP_OBJECTS + n), base };
        }
      }
    }
  }

  /** The bases of a stored record. To be called for each record when the store opens. Errors: DAMAGED. */
  loadBases(vid: number, group: number, record: Uint8Array): void {
    const stored = basesOf(record);
    if (stored === undefined) throw damagedGroup(vid, group);
    const of = this.#of(vid, stored.blocks);
    for (let n = 0; n < GROUP_OBJECTS; n++) {
      const base = stored.bases[n] as number;
      if (base !== 0) this.#setBase(of, group * GROUP_OBJECTS + n, base);
    }
  }

  /** Whether the bitmap of the object is in memory. Everything below needs that. */
  isLoaded(vid: number, idx: number): boolean {
    const of = this.#vids.get(vid);
    return (
      of === undefined || of.bits[idx >>> GROUP_SHIFT] !== undefined || of.bases[idx >>> GROUP_SHIFT] === undefined
    );
  }

  /** Read the bitmaps of the object's group, if that was not done yet. Errors: DAMAGED, and those of reading. */
  load(vid: number, idx: number): void {
    const of = this.#vids.get(vid);
    const group = idx >>> GROUP_SHIFT;
    const bases = of?.bases[group];
    if (of === undefined || bases === undefined || of.bits[group] !== undefined) return;
    const bits = new Uint32Array(GROUP_OBJECTS * of.words);
    const record = this.#read(vid, group);
    const stored = record === undefined ? undefined : decodeGroup(record);
    if (record !== undefined && stored === undefined) throw damagedGroup(vid, group);
    for (const [n, member] of (stored?.members ?? []).entries())
      if (member !== undefined && bases[n] !== 0) bits.set(member.words, n * of.words + member.first);
    of.bits[group] = bits;
  }

  /** A new overlay over `base`, which is its own vid for nothing, without any block. `size`: of an object, bytes. */
  add(vid: number, idx: number, base: number, size: number): void {
    const of = this.#of(vid, blocksOf(size));
    this.load(vid, idx);
    const group = idx >>> GROUP_SHIFT;
    const bits = (of.bits[group] ??= new Uint32Array(GROUP_OBJECTS * of.words));
    const at = (idx & (GROUP_OBJECTS - 1)) * of.words;
    bits.fill(0, at, at + of.words);
    this.#setBase(of, idx, base);
  }

  /** From here on the object lies over `base`; its own vid for nothing. */
  rebase(vid: number, idx: number, base: number): void {
    this.#setBase(this.#existing(vid, idx), idx, base);
  }

  /** The object is no overlay any more. */
  remove(vid: number, idx: number): void {
    const of = this.#existing(vid, idx);
    const group = idx >>> GROUP_SHIFT;
    const bases = of.bases[group] as Uint32Array;
    bases[idx & (GROUP_OBJECTS - 1)] = 0;
    if (bases.every((base) => base === 0)) {
      of.bases[group] = undefined;
      of.bits[group] = undefined;
    }
    const segment = idx >>> SEGMENT_SHIFT;
    of.live[segment] = (of.live[segment] ?? 1) - 1;
    of.count--;
    this.#detached.delete(localObjectKey(vid, idx));
    if (of.count > 0) return;
    this.#vids.delete(vid);
    this.#lastVid = -1;
  }

  /** See `#detached`. */
  isDetached(key: number): boolean {
    return this.#detached.size > 0 && this.#detached.has(key);
  }

  detach(key: number, isDetached = true): void {
    if (isDetached) this.#detached.add(key);
    else this.#detached.delete(key);
  }

  /** Blocks of each object of this vid. */
  blocks(vid: number): number {
    return this.#vids.get(vid)?.blocks ?? 0;
  }

  /** The first block in [from, end) that the overlay has, or with `has` false has not; else `end`. */
  next(vid: number, idx: number, from: number, end: number, has: boolean): number {
    const of = this.#existing(vid, idx);
    return nextBit(this.#bits(of, idx), (idx & (GROUP_OBJECTS - 1)) * of.words, from, end, has);
  }

  has(vid: number, idx: number, block: number): boolean {
    const of = this.#existing(vid, idx);
    const word = this.#bits(of, idx)[(idx & (GROUP_OBJECTS - 1)) * of.words + (block >>> 5)] as number;
    return ((word >>> (block & 31)) & 1) === 1;
  }

  /** From here on the overlay has the blocks [from, end), or with `has` false has them not. */
  put(vid: number, idx: number, from: number, end: number, has: boolean): void {
    const of = this.#existing(vid, idx);
    putBits(this.#bits(of, idx), (idx & (GROUP_OBJECTS - 1)) * of.words, from, end, has);
  }

  /** How many blocks the overlay has. */
  count(vid: number, idx: number): number {
    const of = this.#existing(vid, idx);
    return countBits(this.#bits(of, idx), (idx & (GROUP_OBJECTS - 1)) * of.words, of.words);
  }

  /** The overlay as it is now, to be stored. Undefined if the object is none. */
  stored(key: number): OverlayWrite | undefined {
    const vid = vidOf(key);
    const idx = idxOf(key);
    const base = this.baseOf(vid, idx);
    if (base === 0) return undefined;
    const of = this.#existing(vid, idx);
    const at = (idx & (GROUP_OBJECTS - 1)) * of.words;
    return { ...storedOverlay(base, this.#bits(of, idx), at, of.words), blocks: of.blocks };
  }

  /** Make the overlay as it is stored; an overlay that is not stored stays as it is. Returns its former base. */
  reset(key: number): number {
    const vid = vidOf(key);
    const idx = idxOf(key);
    const before = this.baseOf(vid, idx);
    const record = this.#read(vid, idx >>> GROUP_SHIFT);
    const stored = record === undefined ? undefined : decodeGroup(record)?.members[idx & (GROUP_OBJECTS - 1)];
    if (before === 0 || stored === undefined) return before;
    this.add(vid, idx, stored.base, this.#existing(vid, idx).blocks * OVERLAY_BLOCK);
    const of = this.#existing(vid, idx);
    this.#bits(of, idx).set(stored.words, (idx & (GROUP_OBJECTS - 1)) * of.words + stored.first);
    return before;
  }

  #of(vid: number, blocks: number): OverlaysOfVid {
    let of = this.#vids.get(vid);
    if (of === undefined) {
      this.#vids.set(vid, (of = new OverlaysOfVid(blocks)));
      this.#lastVid = -1;
    }
    return of;
  }

  #existing(vid: number, idx: number): OverlaysOfVid {
    if (this.baseOf(vid, idx) === 0 || this.#last === undefined)
      throw new Error(`invariant: object (${vid}, ${idx}) is no overlay`);
    return this.#last;
  }

  #bits(of: OverlaysOfVid, idx: number): Uint32Array {
    const bits = of.bits[idx >>> GROUP_SHIFT];
    if (bits === undefined) throw new Error(`invariant: the blocks of an overlay at ${idx} were not loaded`);
    return bits;
  }

  #setBase(of: OverlaysOfVid, idx: number, base: number): void {
    const group = idx >>> GROUP_SHIFT;
    let bases = of.bases[group];
    if (bases === undefined) of.bases[group] = bases = new Uint32Array(GROUP_OBJECTS);
    const at = idx & (GROUP_OBJECTS - 1);
    if (bases[at] === 0) {
      const segment = idx >>> SEGMENT_SHIFT;
      of.live[segment] = (of.live[segment] ?? 0) + 1;
      of.count++;
    }
    bases[at] = base;
  }
}
