/**
 * The overlays of a damaged store, as far as they can be known: those of a copy of the metadata, brought up to what is in the
 * segment files where they have changed since. Owns the rules by which blocks in a file tell what an overlay has, and which blocks
 * are uncertain. Uses the table of the store itself (overlays.ts), so that what is rescued is stored by the same code.
 */
import { nextBit } from './block-bits.js';
import { countBases } from './overlay-loading.js';
import { blocksOf, wordsOf, type OverlayWrite } from './overlay-records.js';
import { Overlays } from './overlays.js';
import { idxOf, localObjectKey, ReferenceCounts, vidOf } from './reference-counts.js';
import type { ExistingObjects } from './rescue-replay.js';
import type { KnownBlocks, SegmentData } from './rescue-segments.js';
import { isObjectSize, type FoundFiles, type MetadataState, type ObjectFile } from './rescue-sources.js';
import { segmentOf } from './segment-space.js';

/** More layers than any store has: the records are damaged, and refer to each other in a circle. */
const TOO_MANY_LAYERS = 4096;

/** What has happened to overlays since the copy that they are known from. */
export interface OverlayNews {
  /** Whether records of overlays of this vid have changed. */
  hasChanged(vid: number): boolean;
  /** Whether overlays of this vid may have given blocks to the objects below. */
  hasMerged(vid: number): boolean;
}

/** Blocks [first, end) of an object that come from the object `vid`. */
export interface LayerRun {
  readonly vid: number;
  readonly first: number;
  readonly end: number;
}

/** Why blocks are uncertain. taken: the copy lacks them. merged: the object below may have newer ones. */
export type Uncertainty = 'taken' | 'merged';

export class RescuedOverlays implements ExistingObjects {
  /** All that are known or were taken, also those that no map needs. */
  readonly table: Overlays;
  readonly #news: OverlayNews;
  readonly #whole: ReadonlyMap<number, ObjectFile>;
  readonly #segments: FoundFiles;
  readonly #data: SegmentData;
  readonly #uncertain: Readonly<Record<Uncertainty, Map<number, Uint32Array>>> = {
    taken: new Map(),
    merged: new Map(),
  };

  /** `whole`: object files by key. `data`: scanned, where `news` says that something has changed. */
  constructor(
    state: MetadataState | undefined,
    news: OverlayNews,
    whole: ReadonlyMap<number, ObjectFile>,
    segments: FoundFiles,
    data: SegmentData,
  ) {
    this.#news = news;
    this.#whole = whole;
    this.#segments = segments;
    this.#data = data;
    this.table = tableOf(state);
    if (state !== undefined) this.#bringUpToDate(state);
  }

  #bringUpToDate(state: MetadataState): void {
    const { table } = this;
    this.#cutCircles();
    const references = new ReferenceCounts();
    for (const record of state.records.values()) references.addAll(state.mapOf(record));
    countBases({ objects: { expectLength: () => undefined }, overlays: table, references });
    for (const { key, base } of [...table.entries()]) {
      table.load(vidOf(key), idxOf(key));
      if (!this.#news.hasChanged(vidOf(key))) continue;
      if (this.#whole.has(key)) {
        // Trimmed, and made anew as a whole file.
        table.remove(vidOf(key), idxOf(key));
        continue;
      }
      if (base === vidOf(key)) continue; // all of its content is in its file
      const had = bitsOf(table, key);
      const isAlone = references.of(base, idxOf(key)) === 1;
      if (isAlone && state.merged.has(vidOf(key)) && !this.#goesUp(key, base)) this.#leave(key, had);
      else this.#take(key, had);
    }
    for (const { key } of [...table.entries()]) this.#findBase(key);
  }

  /** Records that refer to each other in a circle are damage: one of them then lies over nothing. */
  #cutCircles(): void {
    const { table } = this;
    for (const { key } of [...table.entries()]) {
      const idx = idxOf(key);
      let at = vidOf(key);
      for (let steps = 0; ; steps++) {
        const base = table.baseOf(at, idx);
        if (base === 0 || base === at) break;
        if (steps > TOO_MANY_LAYERS) {
          table.rebase(at, idx, at);
          break;
        }
        at = base;
      }
    }
  }

  /**
   * Of an overlay that is alone over its base: whether a merge takes blocks from the base. Else blocks in the file that the
   * overlay lacks are what a merge has left there: writes to such blocks go into the base.
   */
  #goesUp(key: number, base: number): boolean {
    const { table } = this;
    const [vid, idx] = [vidOf(key), idxOf(key)];
    const own = table.count(vid, idx);
    const below = table.baseOf(base, idx);
    if (below === 0 || below === base) return table.blocks(vid) - own < own;
    table.load(base, idx);
    let others = 0;
    const blocks = table.blocks(vid);
    for (let block = 0; block < blocks; block++)
      if (table.has(base, idx, block) && !table.has(vid, idx, block)) others++;
    return others < own;
  }

  /** The overlay has all blocks that have data in its file. `had`: those that the copy says it has. */
  #take(key: number, had: Uint32Array): void {
    const [vid, idx] = [vidOf(key), idxOf(key)];
    const taken = this.#newInFile(key, had);
    const blocks = this.table.blocks(vid);
    for (let from = nextBit(taken, 0, 0, blocks, true); from < blocks;) {
      const end = nextBit(taken, 0, from, blocks, false);
      this.table.put(vid, idx, from, end, true);
      from = nextBit(taken, 0, end, blocks, true);
    }
    this.#doubt('taken', key, taken);
    if (!this.#news.hasMerged(vid)) return;
    this.#doubt('merged', key, taken);
    this.#doubt('merged', key, had);
  }

  /** The overlay has only the blocks that the copy says it has. Others in its file may be newer than those below. */
  #leave(key: number, had: Uint32Array): void {
    this.#doubt('merged', key, this.#newInFile(key, had));
    if (this.#news.hasMerged(vidOf(key))) this.#doubt('merged', key, had);
  }

  /** Blocks that have data in the file of the overlay, and that it is not known to have. */
  #newInFile(key: number, had: Uint32Array): Uint32Array {
    const words = new Uint32Array(had.length);
    const data = this.#data.blocks.get(key);
    for (let at = 0; at < words.length; at++) words[at] = (data?.[at] ?? 0) & ~(had[at] as number);
    return words;
  }

  #doubt(why: Uncertainty, key: number, words: Uint32Array): void {
    if (words.every((word) => word === 0)) return;
    const sum = this.#uncertain[why].get(key) ?? new Uint32Array(words.length);
    for (const [at, word] of words.entries()) sum[at] = (sum[at] as number) | word;
    this.#uncertain[why].set(key, sum);
  }

  /** What the overlay lies over may be merged, or gone: then it lies over what that one lay over. */
  #findBase(key: number): void {
    const { table } = this;
    const [vid, idx] = [vidOf(key), idxOf(key)];
    let base = table.baseOf(vid, idx);
    for (let steps = 0; base !== 0 && base !== vid; steps++) {
      if (steps > TOO_MANY_LAYERS) base = vid;
      else if (this.#isCollapsed(base, idx)) {
        this.#doubt('merged', key, bitsOf(table, localObjectKey(base, idx)));
        const below = table.baseOf(base, idx);
        base = below === base ? vid : below;
      } else if (this.#news.hasChanged(vid) && !this.has(localObjectKey(base, idx))) {
        const below = table.baseOf(base, idx);
        base = below === 0 || below === base ? vid : below;
      } else break;
    }
    if (base !== table.baseOf(vid, idx)) table.rebase(vid, idx, base);
  }

  /** The overlay has given all its blocks to the object below, and may be gone. */
  #isCollapsed(vid: number, idx: number): boolean {
    const base = this.table.baseOf(vid, idx);
    if (base === 0 || base === vid || !this.#news.hasChanged(vid) || !this.#news.hasMerged(vid)) return false;
    return !this.#data.blocks.has(localObjectKey(vid, idx));
  }

  /** Whether the object exists: as a file, as an overlay of the copy that is still there, or as new blocks in a segment file. */
  has(key: number): boolean {
    if (this.#whole.has(key)) return true;
    const [vid, idx] = [vidOf(key), idxOf(key)];
    if (this.table.baseOf(vid, idx) === 0) return this.#news.hasChanged(vid) && this.#data.blocks.has(key);
    // The file of a segment goes with its last overlay.
    return !this.#isCollapsed(vid, idx) && this.#segments.files.has(segmentOf(key));
  }

  *keys(): Generator<number> {
    yield* this.#whole.keys();
    for (const key of this.#data.blocks.keys())
      if (!this.#whole.has(key) && this.#news.hasChanged(vidOf(key))) yield key;
  }

  below(vid: number, idx: number): number {
    let at = vid;
    for (let steps = 0; this.#isCollapsed(at, idx) && steps < TOO_MANY_LAYERS; steps++) at = this.table.baseOf(at, idx);
    return at !== vid && this.has(localObjectKey(at, idx)) ? at : 0;
  }

  isBelow(vid: number, owner: number, idx: number): boolean {
    return owner !== 0 && this.table.layersOf(owner, idx).includes(vid);
  }

  take(vid: number, idx: number, owner: number, size: number): boolean {
    const key = localObjectKey(vid, idx);
    if (this.#whole.has(key)) return true;
    if (this.table.baseOf(vid, idx) !== 0) return this.table.baseOf(vid, idx) === vid;
    const isThere = owner !== 0 && this.has(localObjectKey(owner, idx)) && !this.isBelow(vid, owner, idx);
    this.table.add(vid, idx, isThere ? owner : vid, size);
    if (isThere) this.#take(key, new Uint32Array(wordsOf(blocksOf(size))));
    return !isThere;
  }

  /** Where the blocks of an object are, from the first to the last. */
  *layers(owner: number, idx: number, blocks: number, first = 0, end = blocks): Generator<LayerRun> {
    const base = this.table.baseOf(owner, idx);
    if (base === 0 || base === owner) {
      yield { vid: owner, first, end };
      return;
    }
    for (let at = first; at < end;) {
      const has = this.table.has(owner, idx, at);
      const to = this.table.next(owner, idx, at, end, !has);
      if (has) yield { vid: owner, first: at, end: to };
      else yield* this.layers(base, idx, blocks, at, to);
      at = to;
    }
  }

  /** The uncertain blocks of a run, as runs. */
  *uncertainIn({ vid, first, end }: LayerRun, idx: number, why: Uncertainty): Generator<LayerRun> {
    const words = this.#uncertain[why].get(localObjectKey(vid, idx));
    if (words === undefined) return;
    for (let from = nextBit(words, 0, first, end, true); from < end;) {
      const to = nextBit(words, 0, from, end, false);
      yield { vid, first: from, end: to };
      from = nextBit(words, 0, to, end, true);
    }
  }

  /** The overlay as it is to be stored; undefined if the object is none. */
  stored(key: number): OverlayWrite | undefined {
    return storedOf(this.table, key);
  }

  sizeOf(key: number): number | undefined {
    const size = this.#whole.get(key)?.size ?? this.#data.objectSize(segmentOf(key));
    return size !== undefined && isObjectSize(size) ? size : undefined;
  }

  /** The segment files of these overlays, and how many of them each has. */
  *files(overlays: readonly { readonly key: number }[]): Generator<{ file: ObjectFile; keys: number; size: number }> {
    const counts = new Map<number, number>();
    for (const { key } of overlays) counts.set(segmentOf(key), (counts.get(segmentOf(key)) ?? 0) + 1);
    for (const [segment, keys] of counts) {
      const file = this.#segments.files.get(segment);
      if (file) yield { file, keys, size: this.#data.objectSize(segment) ?? file.size };
    }
  }

  /** A log says what the overlay has: nothing of it is uncertain. */
  isTold(key: number): void {
    for (const words of Object.values(this.#uncertain)) words.delete(key);
  }

  /** Whether one of the layers of the object is an overlay that has changed since the copy. */
  hasChanged(owner: number, idx: number): boolean {
    for (const vid of this.table.layersOf(owner, idx))
      if (this.table.baseOf(vid, idx) !== 0 && this.#news.hasChanged(vid)) return true;
    return false;
  }

  /** Whether the layer cannot be read, as far as its file tells. `size`: of an object, bytes. */
  isLost(vid: number, idx: number, size: number): boolean {
    const key = localObjectKey(vid, idx);
    if (this.table.baseOf(vid, idx) === 0) return this.#whole.get(key)?.size !== size;
    return this.#data.objectSize(segmentOf(key)) !== size;
  }
}

function tableOf(state: MetadataState | undefined): Overlays {
  const table = new Overlays((vid, group) => state?.overlays.get(vid)?.get(group));
  for (const [vid, groups] of state?.overlays ?? [])
    for (const [group, record] of groups) table.loadBases(vid, group, record);
  return table;
}

function storedOf(table: Overlays, key: number): ReturnType<Overlays['stored']> {
  if (table.baseOf(vidOf(key), idxOf(key)) === 0) return undefined;
  table.load(vidOf(key), idxOf(key));
  return table.stored(key);
}

/** The bitmap of an overlay, in words. */
function bitsOf(table: Overlays, key: number): Uint32Array {
  const stored = storedOf(table, key);
  const words = new Uint32Array(wordsOf(table.blocks(vidOf(key))));
  if (stored) words.set(stored.words, stored.first);
  return words;
}

/** The blocks of overlays as the state has them. For a scan of the files. */
export function knownBlocks(state: MetadataState | undefined): KnownBlocks {
  const table = tableOf(state);
  return (key) => (table.baseOf(vidOf(key), idxOf(key)) === 0 ? undefined : bitsOf(table, key));
}
