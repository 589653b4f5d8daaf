/**
 * Data objects of both kinds: whole files, and overlays, whose blocks are in segment files and which lie over other objects
 * (FORMAT.md, Overlays). Owns how a request crosses the layers. overlays.ts knows which blocks an overlay has, overlay-writes.ts
 * changes overlays, and ObjectFiles reads and writes the files of both kinds. Decides nothing about maps or durability.
 */
import type { ExtentSink } from '../open-vdi.js';
import type { Awaitable } from '../vdi-record.js';
import { allDone } from '../../system/all-done.js';
import type { DataObjects, FoundObject, FoundSegment, OverlayChanges } from './data-objects.js';
import type { KeyTurns } from './key-turns.js';
import type { ObjectFiles } from './object-files.js';
import { OVERLAY_BLOCK } from './overlay-records.js';
import { isSegmentFile, segmentFile, segmentOffset, segmentOfFile, type Layers } from './layers.js';
import { OverlayWrites } from './overlay-writes.js';
import { SEGMENT_OBJECTS, type Overlays } from './overlays.js';
import { idxOf, localObjectKey, vidOf, type ReferenceCounts } from './reference-counts.js';
import { SegmentSpace, segmentOf } from './segment-space.js';

/** The bytes of an overlay up to `to`, all in the object of the vid `owner`. */
interface Part {
  readonly owner: number;
  readonly to: number;
}

export class LayeredObjects implements DataObjects {
  readonly #whole: ObjectFiles;
  readonly #segments: ObjectFiles;
  readonly #overlays: Overlays;
  readonly #turns: KeyTurns;
  readonly #references: ReferenceCounts;
  readonly #space: SegmentSpace;
  readonly #writes: OverlayWrites;

  constructor(layers: Layers) {
    this.#whole = layers.whole;
    this.#segments = layers.segments;
    this.#overlays = layers.overlays;
    this.#turns = layers.turns;
    this.#references = layers.references;
    this.#space = new SegmentSpace(layers.segments, layers.overlays, layers.turns);
    this.#writes = new OverlayWrites(layers, this, this.#space);
  }

  expectLength(vid: number, length: number): void {
    this.#whole.expectLength(vid, length);
    this.#segments.expectLength(vid, SEGMENT_OBJECTS * length);
  }

  isOverlay(vid: number, idx: number): boolean {
    return this.#overlays.baseOf(vid, idx) !== 0;
  }

  fileOf(key: number): number {
    return this.#overlays.baseOf(vidOf(key), idxOf(key)) === 0 ? key : segmentFile(segmentOf(key));
  }

  read(vid: number, idx: number, offset: number, into: Buffer, who: unknown = vid): Awaitable<void> {
    const base = this.#overlays.baseOf(vid, idx);
    if (base === 0) return this.#whole.read(vid, idx, offset, into, who);
    const end = Math.ceil((offset + into.length) / OVERLAY_BLOCK);
    const first = Math.floor(offset / OVERLAY_BLOCK);
    const has = base === vid || this.#overlays.has(vid, idx, first);
    const to = base === vid ? end : this.#overlays.next(vid, idx, first, end, !has);
    if (to < end) return this.#readParts(vid, idx, offset, into, who);
    if (!has) return this.read(base, idx, offset, into, who);
    return this.#readSegment(vid, idx, offset, into, who);
  }

  #readSegment(vid: number, idx: number, offset: number, into: Buffer, who: unknown): Awaitable<void> {
    const later = this.#segments.read(vid, idx >>> 8, this.#at(vid, idx, offset), into, who);
    if (later !== undefined) return this.#turns.during(localObjectKey(vid, idx), later);
  }

  /** All parts begin now: what gives up an object waits for the reads of it that have begun. */
  #readParts(vid: number, idx: number, offset: number, into: Buffer, who: unknown): Awaitable<void> {
    let pending: Promise<void>[] | undefined;
    for (const { owner, from, to } of this.#parts(vid, idx, offset, into.length)) {
      const part = into.subarray(from - offset, to - offset);
      const later =
        owner === vid ? this.#readSegment(vid, idx, from, part, who) : this.read(owner, idx, from, part, who);
      if (later !== undefined) (pending ??= []).push(later);
    }
    if (pending) return allDone(pending);
  }

  readCached(vid: number, idx: number, offset: number, into: Buffer): boolean {
    if (!this.isOverlay(vid, idx)) return this.#whole.readCached(vid, idx, offset, into);
    for (const { owner, from, to } of this.#parts(vid, idx, offset, into.length)) {
      const part = into.subarray(from - offset, to - offset);
      const done =
        owner === vid
          ? this.#segments.readCached(vid, idx >>> 8, this.#at(vid, idx, from), part)
          : this.readCached(owner, idx, from, part);
      if (!done) return false;
    }
    return true;
  }

  /** The range in parts that this overlay has itself (`owner` is `vid`) or that the object below has, in order. */
  *#parts(vid: number, idx: number, offset: number, length: number): Generator<Part & { readonly from: number }> {
    const end = offset + length;
    for (let at = offset; at < end;) {
      const part = this.#partAt(vid, idx, at, end);
      yield { ...part, from: at };
      at = part.to;
    }
  }

  /** The part that begins at `at`, up to `end` at most. */
  #partAt(vid: number, idx: number, at: number, end: number): Part {
    const base = this.#overlays.baseOf(vid, idx);
    if (base === vid) return { owner: vid, to: end };
    const block = Math.floor(at / OVERLAY_BLOCK);
    const has = this.#overlays.has(vid, idx, block);
    const next = this.#overlays.next(vid, idx, block, Math.ceil(end / OVERLAY_BLOCK), !has);
    return { owner: has ? vid : base, to: Math.min(end, next * OVERLAY_BLOCK) };
  }

  /** Where a byte of the overlay is in its segment file. */
  #at(vid: number, idx: number, offset: number): number {
    return segmentOffset(this.#segments, vid, idx, offset);
  }

  write(vid: number, idx: number, offset: number, data: Buffer, who: unknown = vid): Awaitable<void> {
    return this.#whole.write(vid, idx, offset, data, who);
  }

  writeOver(
    vid: number,
    idx: number,
    offset: number,
    data: Buffer,
    changes: OverlayChanges,
    who: unknown = vid,
  ): Awaitable<void> {
    return this.#writes.write(vid, idx, offset, data, changes, who);
  }

  zeroOver(
    vid: number,
    idx: number,
    offset: number,
    length: number,
    allocated: boolean,
    changes: OverlayChanges,
    who: unknown = vid,
  ): Promise<void> {
    return this.#writes.zero(vid, idx, offset, length, allocated, changes, who);
  }

  createOver(
    vid: number,
    idx: number,
    base: number,
    size: number,
    offset: number,
    data: Buffer,
    changes: OverlayChanges,
    who: unknown = vid,
  ): Awaitable<void> {
    return this.#writes.create(vid, idx, base, size, offset, data, changes, who);
  }

  create(
    key: number,
    size: number,
    offset: number,
    data: Buffer,
    from: number | undefined,
    who: unknown = vidOf(key),
  ): Promise<void> {
    this.#segments.expectLength(vidOf(key), SEGMENT_OBJECTS * size);
    return this.#whole.create(key, size, offset, data, from, who);
  }

  zero(
    vid: number,
    idx: number,
    offset: number,
    length: number,
    allocated: boolean,
    who: unknown = vid,
  ): Promise<void> {
    return this.#whole.zero(vid, idx, offset, length, allocated, who);
  }

  canZeroFast(allocated: boolean): boolean {
    return this.#whole.canZeroFast(allocated);
  }

  async willNeed(vid: number, idx: number, offset: number, length: number, who: unknown = vid): Promise<void> {
    if (!this.isOverlay(vid, idx)) return this.#whole.willNeed(vid, idx, offset, length, who);
    // It counts as work on the overlay, which is not given up meanwhile.
    await this.#turns.during(localObjectKey(vid, idx), this.#willNeedParts(vid, idx, offset, length, who));
  }

  async #willNeedParts(vid: number, idx: number, offset: number, length: number, who: unknown): Promise<void> {
    for (const { owner, from, to } of Array.from(this.#parts(vid, idx, offset, length))) {
      if (owner !== vid) await this.willNeed(owner, idx, from, to - from, who);
      else await this.#segments.willNeed(vid, idx >>> 8, this.#at(vid, idx, from), to - from, who);
    }
  }

  extents(
    vid: number,
    idx: number,
    offset: number,
    length: number,
    sink: ExtentSink,
    who: unknown = vid,
  ): Awaitable<void> {
    if (!this.isOverlay(vid, idx)) return this.#whole.extents(vid, idx, offset, length, sink, who);
    return this.#extentsOver(vid, idx, offset, length, sink, who);
  }

  async #extentsOver(
    vid: number,
    idx: number,
    offset: number,
    length: number,
    sink: ExtentSink,
    who: unknown,
  ): Promise<void> {
    const start = this.#at(vid, idx, 0);
    const end = offset + length;
    /** The end of what was reported; -1 when no more is wanted. */
    const walk = { at: offset };
    const note: ExtentSink = (at, size, hole) => {
      walk.at = sink(at, size, hole) ? at + size : -1;
      return walk.at >= 0;
    };
    while (walk.at >= 0 && walk.at < end) {
      // One part at a time: the overlay may change while the question is asked. Given up meanwhile: the rest counts as data.
      if (!this.isOverlay(vid, idx)) return;
      const { at } = walk;
      const { owner, to } = this.#partAt(vid, idx, at, end);
      if (owner === vid) {
        const ofFile: ExtentSink = (from, size, hole) => note(from - start, size, hole);
        const later = this.#segments.extents(vid, idx >>> 8, start + at, to - at, ofFile, who);
        if (later !== undefined) await this.#turns.during(localObjectKey(vid, idx), later);
      } else {
        const later = this.extents(owner, idx, at, to - at, note, who);
        if (later !== undefined) await later;
      }
      if (walk.at >= 0 && walk.at < to) note(walk.at, to - walk.at, false);
    }
  }

  changes(owner: number, before: number, idx: number, offset: number, length: number, sink: ExtentSink): boolean {
    const overlays = this.#overlays;
    const over = overlays.layersOf(owner, idx);
    const under = overlays.layersOf(before, idx);
    const common = over.find((vid) => under.includes(vid));
    if (common === undefined) return false;
    const layers = [...over.slice(0, over.indexOf(common)), ...under.slice(0, under.indexOf(common))];
    const endBlock = Math.ceil((offset + length) / OVERLAY_BLOCK);
    for (let at = offset; at < offset + length;) {
      const block = Math.floor(at / OVERLAY_BLOCK);
      const having = layers.filter((vid) => overlays.has(vid, idx, block));
      const isChanged = having.length > 0;
      // The longest run of one of those that have the block; up to the next block that any of them has.
      const ends = (isChanged ? having : layers).map((vid) => overlays.next(vid, idx, block, endBlock, !isChanged));
      const end = isChanged ? Math.max(...ends) : Math.min(...ends, endBlock);
      const to = Math.min(end * OVERLAY_BLOCK, offset + length);
      if (!sink(at, to - at, isChanged)) return true;
      at = to;
    }
    return true;
  }

  isDense(vid: number, idx: number): boolean {
    return !this.isOverlay(vid, idx) && this.#whole.isDense(vid, idx);
  }

  sync(file: number, who?: unknown): Promise<void> {
    if (isSegmentFile(file)) return this.#segments.sync(segmentOfFile(file), who);
    return this.#whole.sync(file, who);
  }

  isUnneeded(file: number): boolean {
    if (!isSegmentFile(file)) return this.#references.of(vidOf(file), idxOf(file)) === 0;
    const segment = segmentOfFile(file);
    return this.#overlays.inSegment(vidOf(segment), idxOf(segment)) === 0;
  }

  async syncNames(files: Iterable<number>): Promise<void> {
    const { whole, segments } = split(files);
    await this.#whole.syncNames(whole);
    if (segments.length > 0) await this.#segments.syncNames(segments);
  }

  namesLostWith(files: Iterable<number>): (file: number) => boolean {
    const { whole, segments } = split(files);
    const isLostWhole = this.#whole.namesLostWith(whole);
    return (file) => (isSegmentFile(file) ? segments.length > 0 : isLostWhole(file));
  }

  idle(key: number): Promise<void> | undefined {
    if (this.isOverlay(vidOf(key), idxOf(key))) return this.#turns.idle(key);
    return this.#whole.idle(key);
  }

  remove(key: number, onError: (error: unknown) => void): number | undefined {
    const vid = vidOf(key);
    const idx = idxOf(key);
    const base = this.#overlays.baseOf(vid, idx);
    if (base === 0) {
      this.#whole.remove(key, onError);
      return undefined;
    }
    const isDetached = this.#overlays.isDetached(key);
    this.#overlays.remove(vid, idx);
    this.#space.free(key, onError);
    return base === vid || isDetached ? undefined : localObjectKey(base, idx);
  }

  roomToRemove(): Promise<void> | undefined {
    return this.#whole.roomToRemove();
  }

  async removed(): Promise<void> {
    await this.#space.freed();
    await this.#whole.removed();
  }

  problemOf(key: number, length: number): string | undefined {
    const base = this.#overlays.baseOf(vidOf(key), idxOf(key));
    if (base === 0) return this.#whole.problemOf(key, length);
    const own = this.#segments.problemOf(segmentOf(key), SEGMENT_OBJECTS * length);
    if (own !== undefined || base === vidOf(key)) return own;
    return this.problemOf(localObjectKey(base, idxOf(key)), length);
  }

  scan(): AsyncGenerator<FoundObject> {
    return this.#whole.scan();
  }

  removeFound(found: FoundObject | FoundSegment): Promise<void> {
    return 'isUsed' in found ? this.#segments.removeFound(found) : this.#whole.removeFound(found);
  }

  async syncRemovals(): Promise<void> {
    await this.#space.sync();
    await this.#segments.syncRemovals();
    await this.#whole.syncRemovals();
  }

  /** Each has the key of a segment (segmentOf). */
  async *scanSegments(): AsyncGenerator<FoundSegment> {
    for await (const found of this.#segments.scan()) {
      const segment = found.key;
      const vid = vidOf(segment);
      if (segment < 0 || this.#overlays.inSegment(vid, idxOf(segment)) === 0) {
        yield { ...found, isUsed: false, leftovers: [] };
        continue;
      }
      const leftovers: number[] = [];
      // Without holes, the space of an overlay that is gone is given back with the file: what it holds is no mistake.
      const isLooked = found.damage === undefined && this.#segments.canZeroFast(false);
      for (let n = 0; isLooked && n < SEGMENT_OBJECTS; n++) {
        const idx = idxOf(segment) * SEGMENT_OBJECTS + n;
        if (this.isOverlay(vid, idx)) continue;
        if (await this.#hasData(segment, n)) leftovers.push(localObjectKey(vid, idx));
      }
      yield { ...found, isUsed: true, leftovers };
    }
  }

  async #hasData(segment: number, n: number): Promise<boolean> {
    const size = this.#segments.lengthOf(vidOf(segment)) / SEGMENT_OBJECTS;
    let hasData = false;
    await this.#segments.extents(vidOf(segment), idxOf(segment), n * size, size, (_at, _length, hole) => {
      hasData ||= !hole;
      return hole;
    });
    return hasData;
  }

  freeLeftovers(keys: readonly number[], onError: (error: unknown) => void): void {
    for (const key of keys) this.#space.free(key, onError);
  }

  async close(): Promise<void> {
    await this.removed();
    await this.#segments.close();
    await this.#whole.close();
  }
}

function split(files: Iterable<number>): { whole: number[]; segments: number[] } {
  const whole: number[] = [];
  const segments: number[] = [];
  for (const file of files) {
    if (isSegmentFile(file)) segments.push(segmentOfFile(file));
    else whole.push(file);
  }
  return { whole, segments };
}
