/**
 * Merging of one overlay with what is below it, in steps of a few blocks. Down: blocks of the overlay go into the object below,
 * which nobody else refers to. Up: blocks of the overlays below go into this one. What anybody reads stays the same at every
 * moment, also after a crash in between. Owns which way is cheaper, and the order in which a step becomes durable. Does not decide
 * when to merge: overlay-merger.ts does.
 */
import type { Awaitable } from '../vdi-record.js';
import type { DataObjects, OverlayChanges } from './data-objects.js';
import { segmentFile, segmentOffset, type Layers } from './layers.js';
import type { Metadata } from './metadata.js';
import { OVERLAY_BLOCK } from './overlay-records.js';
import { SEGMENT_OBJECTS } from './overlays.js';
import { idxOf, localObjectKey, vidOf } from './reference-counts.js';
import { segmentOf } from './segment-space.js';

/** Blocks of one step for an open VDI: its writes to this object wait for a step. */
const OPEN_STEP_BLOCKS = 16;
/** Blocks of one step for an object that nobody writes: each step costs a sync and a commit. */
const IDLE_STEP_BLOCKS = 256;

/** The open VDI to which an overlay belongs alone: its flushes make the steps durable. */
export interface MergingVdi {
  readonly notes: OverlayChanges;
  /** Whether the overlay at idx, of the vid `vid`, is this VDI's alone, now. */
  mayMerge(vid: number, idx: number): boolean;
  /** The overlay at idx has no blocks: the map shall name the object below. False if that must wait. */
  collapse(idx: number): boolean;
}

export interface MergeHost {
  readonly layers: Layers;
  readonly objects: DataObjects;
  readonly metadata: Metadata;
  release(keys: readonly number[]): void;
}

/** What a merge has to move, in blocks. */
export interface MergePlan {
  readonly direction: 'down' | 'up';
  readonly blocks: number;
  /** Up: the object that the overlay will lie over. Its own vid for nothing. */
  readonly to: number;
}

/** What became of a step. `moved`: bytes. Waiting: somebody has begun to use the overlay, and it may go on later. */
export interface MergeStep {
  readonly moved: number;
  readonly outcome: 'going' | 'done' | 'waiting';
}

/** Blocks [first, end). */
interface Run {
  readonly first: number;
  readonly end: number;
}

function moved(runs: readonly Run[]): MergeStep {
  return { moved: runs.reduce((sum, { first, end }) => sum + end - first, 0) * OVERLAY_BLOCK, outcome: 'going' };
}

const DONE: MergeStep = { moved: 0, outcome: 'done' };
const WAITING: MergeStep = { moved: 0, outcome: 'waiting' };

export class OverlayMerge {
  readonly #host: MergeHost;

  constructor(host: MergeHost) {
    this.#host = host;
  }

  /** How the overlay can be merged with the object below, which belongs to it alone. Undefined if it cannot. */
  plan(key: number): MergePlan | undefined {
    const { overlays, references } = this.#host.layers;
    const vid = vidOf(key);
    const idx = idxOf(key);
    const base = overlays.baseOf(vid, idx);
    if (base === 0 || base === vid || overlays.isDetached(key)) return undefined;
    if (references.of(vid, idx) === 0 || references.of(base, idx) !== 1) return undefined;
    const own = overlays.count(vid, idx);
    const below = overlays.baseOf(base, idx);
    if (below === 0 || below === base) {
      const others = overlays.blocks(vid) - own;
      return others < own ? { direction: 'up', blocks: others, to: vid } : { direction: 'down', blocks: own, to: base };
    }
    const others = this.#lacking(vid, idx, base);
    return others < own ? { direction: 'up', blocks: others, to: below } : { direction: 'down', blocks: own, to: base };
  }

  /** How many blocks `base` has that the overlay lacks. */
  #lacking(vid: number, idx: number, base: number): number {
    let sum = 0;
    for (const { first, end } of this.#runsToTake(vid, idx, base)) sum += end - first;
    return sum;
  }

  /** Blocks that `from` has and the overlay lacks. If `from` is no overlay, it has all. */
  *#runsToTake(vid: number, idx: number, from: number): Generator<Run> {
    const { overlays } = this.#host.layers;
    const blocks = overlays.blocks(vid);
    const below = overlays.baseOf(from, idx);
    const hasAll = below === 0 || below === from;
    for (let at = 0; at < blocks;) {
      const lacks = overlays.next(vid, idx, at, blocks, false);
      const first = hasAll || lacks === blocks ? lacks : overlays.next(from, idx, lacks, blocks, true);
      if (first === blocks) return;
      if (overlays.has(vid, idx, first)) {
        at = first;
        continue;
      }
      let end = overlays.next(vid, idx, first, blocks, true);
      if (!hasAll) end = overlays.next(from, idx, first, end, false);
      yield { first, end };
      at = end;
    }
  }

  /** One step down or up by `plan`, if that is possible now. Errors: those of reading, writing, syncing and storing. */
  step(key: number, vdi: MergingVdi | undefined): Promise<MergeStep> {
    const { turns } = this.#host.layers;
    return turns.run(key, async () => {
      // Writes that have begun without a turn.
      for (let busy = turns.uncounted(key); busy !== undefined; busy = turns.uncounted(key)) await busy;
      const plan = this.plan(key);
      if (plan === undefined) return DONE;
      if (!mayGoOn(vdi, key)) return WAITING;
      return plan.direction === 'down' ? this.#down(key, vdi) : this.#up(key, plan.to, vdi);
    });
  }

  /**
   * Make the overlay lie over `bottom`, which is further down: take the blocks of everything in between, which stays as it is,
   * because snapshots refer to it.
   */
  flatten(key: number, bottom: number, vdi: MergingVdi | undefined): Promise<MergeStep> {
    const { turns, overlays } = this.#host.layers;
    return turns.run(key, async () => {
      for (let busy = turns.uncounted(key); busy !== undefined; busy = turns.uncounted(key)) await busy;
      const idx = idxOf(key);
      const base = overlays.baseOf(vidOf(key), idx);
      if (base === 0 || base === bottom) return DONE;
      if (!mayGoOn(vdi, key)) return WAITING;
      for (let from = base; from !== bottom; from = overlays.baseOf(from, idx)) {
        const runs = this.#runsOfStep(vidOf(key), idx, from, vdi);
        if (runs.length > 0) return this.#take(key, runs, vdi);
      }
      return this.#rebase(key, bottom, vdi, false);
    });
  }

  async #down(key: number, vdi: MergingVdi | undefined): Promise<MergeStep> {
    const { layers, objects } = this.#host;
    const { overlays } = layers;
    const vid = vidOf(key);
    const idx = idxOf(key);
    const base = overlays.baseOf(vid, idx);
    const blocks = overlays.blocks(vid);
    const runs: Run[] = [];
    let left = stepBlocks(vdi);
    for (let at = 0; left > 0;) {
      const first = overlays.next(vid, idx, at, blocks, true);
      if (first === blocks) break;
      const end = overlays.next(vid, idx, first, Math.min(blocks, first + left), false);
      runs.push({ first, end });
      left -= end - first;
      at = end;
    }
    if (runs.length === 0) return vdi === undefined || vdi.collapse(idx) ? DONE : WAITING;
    let wrote = 0;
    for (const { first, end } of runs) {
      const data = Buffer.allocUnsafe((end - first) * OVERLAY_BLOCK);
      await objects.read(vid, idx, first * OVERLAY_BLOCK, data, MERGES);
      // Nobody sees these blocks of the object below, and so nothing is said about them before they are there.
      wrote = await this.#writeBelow(base, idx, first, data, vdi);
    }
    if (!mayGoOn(vdi, key)) return WAITING;
    this.#host.metadata.noter?.merges(vid);
    const isOverlay = overlays.baseOf(base, idx) !== 0;
    if (vdi === undefined) {
      await objects.sync(wrote, MERGES);
      if (isOverlay) {
        for (const { first, end } of runs) overlays.put(base, idx, first, end, true);
        await this.#store(localObjectKey(base, idx));
      }
      for (const { first, end } of runs) overlays.put(vid, idx, first, end, false);
      await this.#store(key);
      return moved(runs);
    }
    vdi.notes.wrote(wrote);
    if (isOverlay) void this.#note(vdi, localObjectKey(base, idx), runs, true);
    const logged = this.#note(vdi, key, runs, false);
    if (logged !== undefined) await logged;
    return moved(runs);
  }

  /** From here on the overlay has these blocks, or has them not. */
  #note(vdi: MergingVdi, key: number, runs: readonly Run[], has: boolean): Awaitable<void> {
    vdi.notes.willChange(key);
    let logged: Awaitable<void> = undefined;
    for (const { first, end } of runs) {
      this.#host.layers.overlays.put(vidOf(key), idxOf(key), first, end, has);
      // Entries are logged in order.
      logged = vdi.notes.changed(key, first, end, has);
    }
    return logged;
  }

  /** Returns the file that was written. */
  async #writeBelow(
    base: number,
    idx: number,
    first: number,
    data: Buffer,
    vdi: MergingVdi | undefined,
  ): Promise<number> {
    const { overlays, segments, whole } = this.#host.layers;
    const offset = first * OVERLAY_BLOCK;
    if (overlays.baseOf(base, idx) === 0) {
      await whole.write(base, idx, offset, data, vdi ?? MERGES);
      return localObjectKey(base, idx);
    }
    const at = segmentOffset(segments, base, idx, offset);
    await segments.write(base, Math.floor(idx / SEGMENT_OBJECTS), at, data, vdi ?? MERGES);
    return segmentFile(segmentOf(localObjectKey(base, idx)));
  }

  async #up(key: number, to: number, vdi: MergingVdi | undefined): Promise<MergeStep> {
    const { overlays } = this.#host.layers;
    const vid = vidOf(key);
    const base = overlays.baseOf(vid, idxOf(key));
    const runs = this.#runsOfStep(vid, idxOf(key), base, vdi);
    if (runs.length > 0) return this.#take(key, runs, vdi);
    return this.#rebase(key, to, vdi, true);
  }

  /** Blocks that `from` has and the overlay lacks, as many as one step takes. */
  #runsOfStep(vid: number, idx: number, from: number, vdi: MergingVdi | undefined): Run[] {
    const runs: Run[] = [];
    let left = stepBlocks(vdi);
    for (const { first, end } of this.#runsToTake(vid, idx, from)) {
      runs.push({ first, end: Math.min(end, first + left) });
      left -= end - first;
      if (left <= 0) break;
    }
    return runs;
  }

  /** Copy blocks from below into the overlay. */
  async #take(key: number, runs: readonly Run[], vdi: MergingVdi | undefined): Promise<MergeStep> {
    const { layers, objects } = this.#host;
    const { overlays, segments } = layers;
    const vid = vidOf(key);
    const idx = idxOf(key);
    const start = segmentOffset(segments, vid, idx, 0);
    for (const { first, end } of runs) {
      const data = Buffer.allocUnsafe((end - first) * OVERLAY_BLOCK);
      await objects.read(overlays.baseOf(vid, idx), idx, first * OVERLAY_BLOCK, data, MERGES);
      const at = start + first * OVERLAY_BLOCK;
      await segments.write(vid, Math.floor(idx / SEGMENT_OBJECTS), at, data, vdi ?? MERGES);
    }
    if (!mayGoOn(vdi, key)) return WAITING;
    const file = segmentFile(segmentOf(key));
    if (vdi === undefined) {
      await objects.sync(file, MERGES);
      for (const { first, end } of runs) overlays.put(vid, idx, first, end, true);
      await this.#store(key);
      return moved(runs);
    }
    vdi.notes.wrote(file);
    const logged = this.#note(vdi, key, runs, true);
    if (logged !== undefined) await logged;
    return moved(runs);
  }

  /**
   * The overlay has all that it needs: from here on it lies over `to`, or over nothing. `isAlone`: what was directly below goes,
   * and its reference to `to` is this overlay's now.
   */
  async #rebase(key: number, to: number, vdi: MergingVdi | undefined, isAlone: boolean): Promise<MergeStep> {
    const { overlays, references } = this.#host.layers;
    const vid = vidOf(key);
    const idx = idxOf(key);
    const before = overlays.baseOf(vid, idx);
    const below = localObjectKey(before, idx);
    if (to !== vid) {
      if (isAlone) overlays.detach(below);
      else references.add(to, idx);
    }
    vdi?.notes.willChange(key);
    overlays.rebase(vid, idx, to);
    if (vdi !== undefined) {
      await vdi.notes.rebased(key, before);
      return DONE;
    }
    try {
      await this.#store(key);
    } catch (error) {
      // What is stored lies over the former object still: it stays, and the next attempt stores it.
      overlays.rebase(vid, idx, before);
      if (to !== vid) {
        if (isAlone) overlays.detach(below, false);
        else this.#host.release([localObjectKey(to, idx)]);
      }
      throw error;
    }
    this.#host.release([below]);
    return DONE;
  }

  /** Store an overlay that nobody writes. Blocks that were written before a snapshot may not be durable yet: its data goes first. */
  async #store(key: number): Promise<void> {
    const { layers, metadata, objects } = this.#host;
    await objects.sync(segmentFile(segmentOf(key)), MERGES);
    await metadata.storeOverlays([key], (each) => layers.overlays.stored(each));
  }
}

function mayGoOn(vdi: MergingVdi | undefined, key: number): boolean {
  return vdi === undefined || vdi.mayMerge(vidOf(key), idxOf(key));
}

function stepBlocks(vdi: MergingVdi | undefined): number {
  return vdi === undefined ? IDLE_STEP_BLOCKS : OPEN_STEP_BLOCKS;
}

/** The owner of this work, for its share of threads and descriptors. */
const MERGES = Symbol('merges of overlays');
