/**
 * Making and changing overlays: blocks that an overlay lacks are added to it, with their unaligned edges filled from below; where
 * the object below belongs to this overlay alone, they are changed there. Owns which of these happens, and that two requests for
 * one block do not undo each other: what has to wait for a file takes the overlay's turn. Callers have made sure that the overlay
 * belongs to one VDI, and make the changes durable (OverlayChanges).
 */
import type { Awaitable } from '../vdi-record.js';
import type { DataObjects, OverlayChanges } from './data-objects.js';
import { segmentFile, segmentOffset, type Layers } from './layers.js';
import { MAX_LOOP_WRITE } from './object-files.js';
import { OVERLAY_BLOCK } from './overlay-records.js';
import { SEGMENT_OBJECTS } from './overlays.js';
import { idxOf, localObjectKey, vidOf } from './reference-counts.js';
import { segmentOf, type SegmentSpace } from './segment-space.js';

/** Overlays over each other at most, for one object. Reads cross no more layers than these, and the object at the bottom. */
export const MAX_LAYERS = 16;

const NOTHING = Buffer.alloc(0);
/** For writes on the event loop that have to be filled up. */
const LOOP_BUFFER = Buffer.alloc(MAX_LOOP_WRITE);

export class OverlayWrites {
  readonly #layers: Layers;
  readonly #objects: DataObjects;
  readonly #space: SegmentSpace;
  /** Segment files that are being made. */
  readonly #making = new Map<number, Promise<void>>();
  /** Segment files that were made and have no overlay yet. */
  readonly #empty = new Set<number>();

  constructor(layers: Layers, objects: DataObjects, space: SegmentSpace) {
    this.#layers = layers;
    this.#objects = objects;
    this.#space = space;
  }

  /** See DataObjects.writeOver. */
  write(
    vid: number,
    idx: number,
    offset: number,
    data: Buffer,
    changes: OverlayChanges,
    who: unknown,
  ): Awaitable<void> {
    const { overlays, references, turns } = this.#layers;
    const key = localObjectKey(vid, idx);
    if (!turns.isTaken(key)) {
      const base = overlays.baseOf(vid, idx);
      const first = Math.floor(offset / OVERLAY_BLOCK);
      const end = Math.ceil((offset + data.length) / OVERLAY_BLOCK);
      if (base === vid || overlays.next(vid, idx, first, end, false) === end)
        return this.#writeOwn(vid, idx, offset, data, changes, who);
      if (references.of(base, idx) === 1) {
        if (overlays.next(vid, idx, first, end, true) === end)
          return this.#writeBelow(key, base, idx, offset, data, changes, who);
      } else if (this.#addNow(vid, idx, offset, data, changes)) {
        return this.#added(vid, idx, first, end, changes);
      }
    }
    return turns.run(key, () => this.#writeInTurn(vid, idx, offset, data, changes, who));
  }

  async #writeInTurn(
    vid: number,
    idx: number,
    offset: number,
    data: Buffer,
    changes: OverlayChanges,
    who: unknown,
  ): Promise<void> {
    const { overlays, references } = this.#layers;
    const base = overlays.baseOf(vid, idx);
    const end = Math.ceil((offset + data.length) / OVERLAY_BLOCK);
    if (base !== vid && references.of(base, idx) > 1) {
      const first = Math.floor(offset / OVERLAY_BLOCK);
      if (overlays.next(vid, idx, first, end, false) < end) {
        await this.#add(vid, idx, offset, data, changes, who);
        await this.#added(vid, idx, first, end, changes);
        return;
      }
    }
    for (let at = offset; at < offset + data.length;) {
      const block = Math.floor(at / OVERLAY_BLOCK);
      const has = base === vid || overlays.has(vid, idx, block);
      const toBlock = base === vid ? end : overlays.next(vid, idx, block, end, !has);
      const to = Math.min(toBlock * OVERLAY_BLOCK, offset + data.length);
      const part = data.subarray(at - offset, to - offset);
      if (has) await this.#writeOwn(vid, idx, at, part, changes, who);
      else await this.#writeBelow(localObjectKey(vid, idx), base, idx, at, part, changes, who);
      at = to;
    }
  }

  /** Blocks that the overlay has. */
  #writeOwn(
    vid: number,
    idx: number,
    offset: number,
    data: Buffer,
    changes: OverlayChanges,
    who: unknown,
  ): Awaitable<void> {
    const { segments, turns } = this.#layers;
    const key = localObjectKey(vid, idx);
    const later = segments.write(vid, idx >>> 8, this.#at(vid, idx, offset), data, who);
    if (later !== undefined) return turns.during(key, later).then(() => changes.wrote(segmentFile(segmentOf(key))));
    changes.wrote(segmentFile(segmentOf(key)));
  }

  /** Blocks that only the object below has, which nobody else needs: they are written there. */
  #writeBelow(
    key: number,
    base: number,
    idx: number,
    offset: number,
    data: Buffer,
    changes: OverlayChanges,
    who: unknown,
  ): Awaitable<void> {
    const { overlays, whole, turns } = this.#layers;
    if (overlays.baseOf(base, idx) !== 0) {
      const later = this.write(base, idx, offset, data, changes, who);
      return later === undefined ? undefined : turns.during(key, later);
    }
    const file = localObjectKey(base, idx);
    const later = whole.write(base, idx, offset, data, who);
    if (later !== undefined) return turns.during(key, later).then(() => changes.wrote(file));
    changes.wrote(file);
  }

  /** Write the blocks of the range into the segment file, on the event loop; false if that is not possible at once. */
  #addNow(vid: number, idx: number, offset: number, data: Buffer, changes: OverlayChanges): boolean {
    const { overlays, segments } = this.#layers;
    const first = Math.floor(offset / OVERLAY_BLOCK);
    const last = Math.floor((offset + data.length - 1) / OVERLAY_BLOCK);
    const fillsFirst = offset % OVERLAY_BLOCK !== 0 && !overlays.has(vid, idx, first);
    const fillsLast = (offset + data.length) % OVERLAY_BLOCK !== 0 && !overlays.has(vid, idx, last);
    let from = offset;
    let bytes = data;
    if (fillsFirst || fillsLast) {
      from = fillsFirst ? first * OVERLAY_BLOCK : offset;
      const to = fillsLast ? (last + 1) * OVERLAY_BLOCK : offset + data.length;
      if (to - from > LOOP_BUFFER.length) return false;
      const base = overlays.baseOf(vid, idx);
      bytes = LOOP_BUFFER.subarray(0, to - from);
      if (fillsFirst && !this.#objects.readCached(base, idx, from, bytes.subarray(0, OVERLAY_BLOCK))) return false;
      if (fillsLast && (last > first || !fillsFirst)) {
        const at = last * OVERLAY_BLOCK;
        if (!this.#objects.readCached(base, idx, at, bytes.subarray(at - from))) return false;
      }
      data.copy(bytes, offset - from);
    }
    if (!segments.writeNow(vid, idx >>> 8, this.#at(vid, idx, from), bytes)) return false;
    changes.wrote(segmentFile(segmentOf(localObjectKey(vid, idx))));
    return true;
  }

  /** The same in the thread pool. In the overlay's turn. */
  async #add(
    vid: number,
    idx: number,
    offset: number,
    data: Buffer,
    changes: OverlayChanges,
    who: unknown,
  ): Promise<void> {
    const { overlays, segments, turns } = this.#layers;
    const key = localObjectKey(vid, idx);
    const from = await this.#edge(vid, idx, offset, who);
    const end = offset + data.length;
    const inOneBlock = Math.floor(offset / OVERLAY_BLOCK) === Math.floor((end - 1) / OVERLAY_BLOCK);
    const to = inOneBlock && from !== undefined ? from.subarray(end % OVERLAY_BLOCK || OVERLAY_BLOCK) : undefined;
    const head = from?.subarray(0, offset % OVERLAY_BLOCK) ?? NOTHING;
    const tail = to ?? (await this.#edge(vid, idx, end, who))?.subarray(end % OVERLAY_BLOCK) ?? NOTHING;
    const bytes = head.length + tail.length === 0 ? data : Buffer.concat([head, data, tail]);
    const later = segments.write(vid, idx >>> 8, this.#at(vid, idx, offset - head.length), bytes, who);
    if (later !== undefined) await turns.during(key, later);
    changes.wrote(segmentFile(segmentOf(key)));
    if (overlays.baseOf(vid, idx) === 0) throw new Error('invariant: an overlay has gone during its turn');
  }

  /** The block around `at` as it is below, if the overlay lacks it and `at` is inside it. */
  async #edge(vid: number, idx: number, at: number, who: unknown): Promise<Buffer | undefined> {
    const { overlays } = this.#layers;
    const block = Math.floor(at / OVERLAY_BLOCK);
    if (at % OVERLAY_BLOCK === 0 || overlays.has(vid, idx, block)) return undefined;
    const bytes = Buffer.allocUnsafe(OVERLAY_BLOCK);
    await this.#objects.read(overlays.baseOf(vid, idx), idx, block * OVERLAY_BLOCK, bytes, who);
    return bytes;
  }

  /** The data of the blocks [first, end) is in the segment file: the overlay has them from here on. */
  #added(vid: number, idx: number, first: number, end: number, changes: OverlayChanges): Awaitable<void> {
    const { overlays } = this.#layers;
    const key = localObjectKey(vid, idx);
    changes.willChange(key);
    overlays.put(vid, idx, first, end, true);
    const logged = changes.changed(key, first, end, true);
    const base = overlays.baseOf(vid, idx);
    if (base === vid || overlays.next(vid, idx, 0, overlays.blocks(vid), false) < overlays.blocks(vid)) return logged;
    // It hides all of the object below.
    overlays.rebase(vid, idx, vid);
    return changes.rebased(key, base) ?? logged;
  }

  /** See DataObjects.zeroOver. */
  zero(
    vid: number,
    idx: number,
    offset: number,
    length: number,
    allocated: boolean,
    changes: OverlayChanges,
    who: unknown,
  ): Promise<void> {
    return this.#layers.turns.run(localObjectKey(vid, idx), () =>
      this.#zeroInTurn(vid, idx, offset, length, allocated, changes, who),
    );
  }

  async #zeroInTurn(
    vid: number,
    idx: number,
    offset: number,
    length: number,
    allocated: boolean,
    changes: OverlayChanges,
    who: unknown,
  ): Promise<void> {
    const { overlays, references } = this.#layers;
    const base = overlays.baseOf(vid, idx);
    const end = offset + length;
    const first = Math.floor(offset / OVERLAY_BLOCK);
    const endBlock = Math.ceil(end / OVERLAY_BLOCK);
    if (base === vid || overlays.next(vid, idx, first, endBlock, false) === endBlock)
      return this.#zeroOwn(vid, idx, offset, length, allocated, changes, who);
    if (references.of(base, idx) === 1) {
      for (let at = offset; at < end;) {
        const block = Math.floor(at / OVERLAY_BLOCK);
        const has = overlays.has(vid, idx, block);
        const to = Math.min(end, overlays.next(vid, idx, block, endBlock, !has) * OVERLAY_BLOCK);
        if (has) await this.#zeroOwn(vid, idx, at, to - at, allocated, changes, who);
        else await this.#zeroBelow(base, idx, at, to - at, allocated, changes, who);
        at = to;
      }
      return;
    }
    // Blocks that are zeroed in part are filled up first.
    for (const edge of [offset, end]) {
      const block = await this.#edge(vid, idx, edge, who);
      if (block === undefined) continue;
      const at = Math.floor(edge / OVERLAY_BLOCK) * OVERLAY_BLOCK;
      await this.#add(vid, idx, at, block, changes, who);
      await this.#added(vid, idx, at / OVERLAY_BLOCK, at / OVERLAY_BLOCK + 1, changes);
    }
    await this.#zeroOwn(vid, idx, offset, length, allocated, changes, who);
    await this.#added(vid, idx, first, endBlock, changes);
  }

  async #zeroOwn(
    vid: number,
    idx: number,
    offset: number,
    length: number,
    allocated: boolean,
    changes: OverlayChanges,
    who: unknown,
  ): Promise<void> {
    const { segments, turns } = this.#layers;
    const key = localObjectKey(vid, idx);
    await turns.during(key, segments.zero(vid, idx >>> 8, this.#at(vid, idx, offset), length, allocated, who));
    changes.wrote(segmentFile(segmentOf(key)));
  }

  async #zeroBelow(
    base: number,
    idx: number,
    offset: number,
    length: number,
    allocated: boolean,
    changes: OverlayChanges,
    who: unknown,
  ): Promise<void> {
    if (this.#layers.overlays.baseOf(base, idx) !== 0)
      return this.zero(base, idx, offset, length, allocated, changes, who);
    await this.#layers.whole.zero(base, idx, offset, length, allocated, who);
    changes.wrote(localObjectKey(base, idx));
  }

  /** See DataObjects.createOver. */
  create(
    vid: number,
    idx: number,
    below: number,
    size: number,
    offset: number,
    data: Buffer,
    changes: OverlayChanges,
    who: unknown,
  ): Awaitable<void> {
    const { overlays, references, segments, turns } = this.#layers;
    const key = localObjectKey(vid, idx);
    const isPossible =
      this.#layers.isReady &&
      below !== vid &&
      !turns.isTaken(key) &&
      segments.isOpen(vid, idx >>> 8) &&
      overlays.inSegment(vid, idx >>> 8) > 0 &&
      overlays.baseOf(vid, idx) === 0 &&
      overlays.isLoaded(vid, idx);
    if (isPossible && this.#space.takeBack(key) === undefined) {
      const base = this.#visible(below, idx);
      if (overlays.depthOf(base, idx) < MAX_LAYERS) {
        overlays.add(vid, idx, base, size);
        references.add(base, idx);
        if (data.length === 0) return;
        const quiet = new Quiet(changes);
        if (this.#addNow(vid, idx, offset, data, quiet)) return this.#addedNew(vid, idx, offset, data.length);
        return turns.run(key, () => this.#fillNew(vid, idx, offset, data, quiet, who));
      }
    }
    return this.#createLater(vid, idx, below, size, offset, data, changes, who);
  }

  /** The object at or below `base` that has a block or everything: overlays that lost all their blocks are passed over. */
  #visible(base: number, idx: number): number {
    const { overlays } = this.#layers;
    for (let at = base; ;) {
      const below = overlays.baseOf(at, idx);
      if (below === 0 || below === at) return at;
      if (overlays.next(at, idx, 0, overlays.blocks(at), true) < overlays.blocks(at)) return at;
      at = below;
    }
  }

  #addedNew(vid: number, idx: number, offset: number, length: number): void {
    const { overlays, references } = this.#layers;
    const blocks = overlays.blocks(vid);
    overlays.put(vid, idx, Math.floor(offset / OVERLAY_BLOCK), Math.ceil((offset + length) / OVERLAY_BLOCK), true);
    const base = overlays.baseOf(vid, idx);
    if (base === vid || overlays.next(vid, idx, 0, blocks, false) < blocks) return;
    overlays.rebase(vid, idx, vid);
    references.drop(base, idx); // the map that the new overlay is to replace refers to it still
  }

  async #fillNew(
    vid: number,
    idx: number,
    offset: number,
    data: Buffer,
    changes: OverlayChanges,
    who: unknown,
  ): Promise<void> {
    await this.#add(vid, idx, offset, data, changes, who);
    this.#addedNew(vid, idx, offset, data.length);
  }

  async #createLater(
    vid: number,
    idx: number,
    below: number,
    size: number,
    offset: number,
    data: Buffer,
    changes: OverlayChanges,
    who: unknown,
  ): Promise<void> {
    const key = localObjectKey(vid, idx);
    await this.#layers.prepare();
    await this.#space.takeBack(key);
    await this.#layers.turns.run(key, async () => {
      try {
        await this.#createInTurn(vid, idx, below, size, offset, data, changes, who);
      } catch (error) {
        this.#leave(key);
        throw error;
      }
    });
  }

  async #createInTurn(
    vid: number,
    idx: number,
    below: number,
    size: number,
    offset: number,
    data: Buffer,
    changes: OverlayChanges,
    who: unknown,
  ): Promise<void> {
    const { overlays, references } = this.#layers;
    const key = localObjectKey(vid, idx);
    const quiet = new Quiet(changes);
    // Asked again after a wait: the last overlay of the segment may have gone meanwhile, and the file with it.
    while (!this.#hasSegment(key)) await this.#makeSegment(key, size, changes, who);
    overlays.load(vid, idx);
    // It exists after an attempt that failed: what it has was to be written then, or is as below.
    if (below === vid) {
      await this.#createOverNothing(vid, idx, size, who);
    } else if (overlays.baseOf(vid, idx) === 0) {
      const base = this.#visible(below, idx);
      const isDeep = overlays.depthOf(base, idx) >= MAX_LAYERS;
      const over = isDeep ? (overlays.layersOf(base, idx).at(-1) as number) : base;
      overlays.add(vid, idx, over, size);
      references.add(over, idx);
      this.#empty.delete(segmentOf(key));
      if (isDeep) await this.#gather(vid, idx, base, over, quiet, who);
    }
    if (data.length === 0) return;
    if (below === vid) await this.#writeOwn(vid, idx, offset, data, quiet, who);
    else await this.#fillNew(vid, idx, offset, data, quiet, who);
  }

  /** It could not be made. One that was added goes with its reference; a file in which there is no overlay goes now. */
  #leave(key: number): void {
    if (this.#layers.overlays.baseOf(vidOf(key), idxOf(key)) !== 0) return;
    this.#empty.delete(segmentOf(key));
    this.#space.free(key);
  }

  /** What an earlier overlay of the name has left in the file would be its content. */
  async #createOverNothing(vid: number, idx: number, size: number, who: unknown): Promise<void> {
    const { overlays, segments } = this.#layers;
    if (overlays.baseOf(vid, idx) === 0) overlays.add(vid, idx, vid, size);
    this.#empty.delete(segmentOf(localObjectKey(vid, idx)));
    await segments.zero(vid, idx >>> 8, this.#at(vid, idx, 0), size, false, who);
  }

  /** Copy all blocks that the overlays from `base` down to above `bottom` have. */
  async #gather(
    vid: number,
    idx: number,
    base: number,
    bottom: number,
    changes: OverlayChanges,
    who: unknown,
  ): Promise<void> {
    const { overlays } = this.#layers;
    const blocks = overlays.blocks(vid);
    for (let at = base; at !== bottom; at = overlays.baseOf(at, idx)) {
      for (let from = overlays.next(at, idx, 0, blocks, true); from < blocks;) {
        const end = overlays.next(at, idx, from, blocks, false);
        const first = overlays.next(vid, idx, from, end, false);
        if (first === end) {
          from = overlays.next(at, idx, end, blocks, true);
          continue;
        }
        const to = overlays.next(vid, idx, first, end, true);
        const data = Buffer.allocUnsafe((to - first) * OVERLAY_BLOCK);
        await this.#objects.read(base, idx, first * OVERLAY_BLOCK, data, who);
        await this.#fillNew(vid, idx, first * OVERLAY_BLOCK, data, changes, who);
        from = overlays.next(at, idx, to, blocks, true);
      }
    }
  }

  #hasSegment(key: number): boolean {
    const segment = segmentOf(key);
    return this.#layers.overlays.inSegment(vidOf(segment), idxOf(segment)) > 0 || this.#empty.has(segment);
  }

  /** Make the segment file, in which no overlay is. `size`: of an object, bytes. */
  async #makeSegment(key: number, size: number, changes: OverlayChanges, who: unknown): Promise<void> {
    const segment = segmentOf(key);
    let making = this.#making.get(segment);
    if (making === undefined) {
      this.#space.forget(segment);
      changes.making(segmentFile(segment));
      making = this.#layers.segments
        .create(segment, SEGMENT_OBJECTS * size, 0, NOTHING, undefined, who)
        .then(() => void this.#empty.add(segment))
        .finally(() => {
          this.#making.delete(segment);
          // Also after a failure, which may leave an empty file.
          changes.made(segmentFile(segment));
        });
      this.#making.set(segment, making);
    }
    await making;
  }

  #at(vid: number, idx: number, offset: number): number {
    return segmentOffset(this.#layers.segments, vid, idx, offset);
  }
}

/** Of an overlay that no map names yet: only its data is noted. The map's change says the rest. */
class Quiet implements OverlayChanges {
  readonly #changes: OverlayChanges;

  constructor(changes: OverlayChanges) {
    this.#changes = changes;
  }

  wrote(file: number): void {
    this.#changes.wrote(file);
  }

  willChange(): void {}
  changed(): void {}
  rebased(): void {}
  making(): void {}
  made(): void {}
}
