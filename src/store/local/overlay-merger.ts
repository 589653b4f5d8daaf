/**
 * Merges overlays in the background: where an object below an overlay has lost its last other reference, and where too many
 * overlays lie over each other. Owns when that happens, how fast, and the figures about it. What one step does is in
 * overlay-merge.ts. Nothing of it is stored: after a crash the next look finds what is left.
 */
import { performance } from 'node:perf_hooks';
import type { Merging, MergeState } from '../object-store.js';
import { OverlayMerge, type MergeHost, type MergePlan } from './overlay-merge.js';
import type { LocalVdi } from './local-vdi.js';
import { loadChain } from './overlay-loading.js';
import { OVERLAY_BLOCK } from './overlay-records.js';
import { idxOf, localObjectKey, vidOf } from './reference-counts.js';
import { TimeSlice } from './time-slice.js';

/** Objects with more overlays over each other are flattened in the background, up to FLAT_LAYERS below the others. */
export const MANY_LAYERS = 8;
const FLAT_LAYERS = 4;
/** Bytes that merges move in a second, at most. */
const MERGE_RATE = 64 * 2 ** 20;
/** A merge works for one part of the time in so many; for less where the event loop is busy with clients. */
const QUIET_SHARE = 2;
const BUSY_SHARE = 10;
const BUSY_LOOP = 0.5;
/** References come and go together: a look waits for this time. */
const LOOK_DELAY_MS = 500;
/** After an error, and where something has to wait, for a temporary snapshot for example. */
const RETRY_MS = 10_000;

export interface MergerHost extends MergeHost {
  readonly open: ReadonlyMap<number, LocalVdi>;
  /** Then nothing is merged. */
  readonly readOnlyBecause: string | undefined;
  /** How long a look waits for more to come. */
  readonly mergeDelayMs?: number | undefined;
  /** An event for the operator's log, not a warning. */
  note(line: string, details?: object): void;
  backgroundError(error: unknown): void;
}

interface Work {
  readonly key: number;
  /** The open VDI to which the overlay belongs alone. */
  readonly vdi: LocalVdi | undefined;
  /** The object to flatten down to; undefined: merge with what is directly below. */
  readonly bottom: number | undefined;
}

export class OverlayMerger implements Merging {
  readonly #host: MergerHost;
  readonly #merge: OverlayMerge;
  #timer: NodeJS.Timeout | undefined;
  #working: Promise<void> | undefined;
  #isWanted = false;
  #isPaused = false;
  #isClosed = false;
  #holds = 0;
  /** Overlays whose last attempt has failed: that was logged. */
  readonly #failed = new Set<number>();
  /** The VDI whose overlay a step is working on. */
  #current: { readonly vdi: LocalVdi | undefined; readonly done: Promise<unknown> } | undefined;
  #wake: (() => void) | undefined;

  constructor(host: MergerHost) {
    this.#host = host;
    this.#merge = new OverlayMerge(host);
  }

  /** References were given up, a VDI was opened, or a snapshot has ended: there may be something to merge. */
  look(): void {
    if (this.#host.readOnlyBecause !== undefined) return;
    this.#isWanted = true;
    this.#later(this.#host.mergeDelayMs ?? LOOK_DELAY_MS);
  }

  pause(isPaused: boolean): void {
    this.#isPaused = isPaused;
    if (!isPaused) this.look();
  }

  /** Do `work` while no step runs and none begins: it wants to see a store in which nothing changes. */
  async still<T>(work: () => Promise<T>): Promise<T> {
    this.#holds++;
    try {
      this.#wake?.();
      await this.#working;
      return await work();
    } finally {
      this.#holds--;
      this.look();
    }
  }

  /** Resolves when no step works on this VDI. */
  async left(vdi: LocalVdi): Promise<void> {
    while (this.#current?.vdi === vdi) await this.#current.done.catch(() => undefined);
  }

  /** Resolves when everything that can be merged now is merged. For tests. */
  async settled(): Promise<void> {
    for (;;) {
      clearTimeout(this.#timer);
      this.#timer = undefined;
      this.#begin();
      await this.#working;
      if (!this.#isWanted || this.#isStopped) return;
    }
  }

  /** No step runs when it resolves, and none begins. */
  async close(): Promise<void> {
    this.#isClosed = true;
    clearTimeout(this.#timer);
    this.#wake?.();
    await this.#working;
  }

  /** Of one map, or of the whole store. Looks at each overlay, in time slices. */
  async state(map?: Uint32Array): Promise<MergeState> {
    const slice = new TimeSlice();
    let overlays = 0;
    let bytes = 0;
    let step = 0;
    await this.#host.metadata.settled();
    for (const key of map === undefined ? this.#keys() : keysOf(map)) {
      if (slice.isOver(++step)) {
        await slice.next();
        await this.#host.metadata.settled();
      }
      const plan = this.#planOf(key);
      if (plan === undefined) continue;
      overlays++;
      bytes += plan.blocks * OVERLAY_BLOCK;
    }
    return { overlays, bytes, isPaused: this.#isPaused };
  }

  *#keys(): Generator<number> {
    for (const { key } of this.#host.layers.overlays.entries()) yield key;
  }

  #planOf(key: number): MergePlan | undefined {
    const { overlays, references } = this.#host.layers;
    const idx = idxOf(key);
    const base = overlays.baseOf(vidOf(key), idx);
    if (base === 0 || base === vidOf(key) || references.of(base, idx) !== 1) return undefined;
    loadChain(overlays, vidOf(key), idx);
    const plan = this.#merge.plan(key);
    // An overlay without blocks costs nothing: it goes when its VDI is open.
    return plan?.blocks === 0 && this.#vdiOf(key) === undefined ? undefined : plan;
  }

  #later(ms: number): void {
    if (this.#isClosed || this.#working !== undefined) return;
    this.#timer ??= setTimeout(() => {
      this.#timer = undefined;
      this.#begin();
    }, ms).unref();
  }

  #begin(): void {
    if (this.#isStopped || this.#working !== undefined) return;
    this.#isWanted = false;
    this.#working = this.#pass()
      .catch((error: unknown) => {
        this.#host.backgroundError(error);
        return true;
      })
      .then((hasWaiting) => {
        this.#working = undefined;
        if (this.#isWanted) this.#later(this.#host.mergeDelayMs ?? LOOK_DELAY_MS);
        else if (hasWaiting) this.#later(RETRY_MS);
      });
  }

  /** Merge what can be merged now. Resolves to whether something has to wait. */
  async #pass(): Promise<boolean> {
    const slice = new TimeSlice();
    const found: number[] = [];
    let step = 0;
    for (const { key, base } of this.#host.layers.overlays.entries()) {
      if (slice.isOver(++step)) await slice.next();
      if (this.#isWork(key, base)) found.push(key);
    }
    let moved = 0;
    let count = 0;
    let hasWaiting = false;
    for (const key of found) {
      if (this.#isStopped) break;
      const bytes = await this.#mergeOrLog(key);
      if (bytes === undefined) hasWaiting = true;
      else if (bytes >= 0) {
        moved += bytes;
        count++;
      }
    }
    if (count > 0) this.#host.note(`merged ${count} overlays, and moved ${moved} bytes for that`, { count, moved });
    return hasWaiting;
  }

  /** What cannot be merged, because it is damaged or the disk is full, does not keep others from it. It is tried again later. */
  async #mergeOrLog(key: number): Promise<number | undefined> {
    try {
      const bytes = await this.#mergeOne(key);
      this.#failed.delete(key);
      return bytes;
    } catch (error) {
      if (!this.#failed.has(key)) this.#host.backgroundError(error);
      this.#failed.add(key);
      return undefined;
    }
  }

  get #isStopped(): boolean {
    return this.#isClosed || this.#isPaused || this.#holds > 0 || this.#host.readOnlyBecause !== undefined;
  }

  #isWork(key: number, base: number): boolean {
    const { overlays, references } = this.#host.layers;
    const vid = vidOf(key);
    if (base === vid) return false;
    return references.of(base, idxOf(key)) === 1 || overlays.depthOf(vid, idxOf(key)) > MANY_LAYERS;
  }

  /** Returns the bytes that were moved; -1 if there was nothing to do; undefined if it has to wait. */
  async #mergeOne(key: number): Promise<number | undefined> {
    const { metadata, layers } = this.#host;
    let moved = 0;
    for (let isFirst = true; !this.#isStopped; isFirst = false) {
      await metadata.settled();
      const { overlays } = layers;
      if (overlays.baseOf(vidOf(key), idxOf(key)) === 0) return isFirst ? -1 : moved;
      loadChain(overlays, vidOf(key), idxOf(key));
      const work = this.#workOf(key);
      if (work === undefined) return isFirst ? -1 : moved;
      const start = performance.now();
      const idle = performance.eventLoopUtilization();
      const done =
        work.bottom === undefined
          ? this.#merge.step(work.key, work.vdi)
          : this.#merge.flatten(work.key, work.bottom, work.vdi);
      this.#current = { vdi: work.vdi, done };
      const result = await done.finally(() => (this.#current = undefined));
      moved += result.moved;
      if (result.outcome === 'waiting') return undefined;
      await this.#rest(performance.now() - start, result.moved, performance.eventLoopUtilization(idle).utilization);
    }
    return undefined;
  }

  #workOf(key: number): Work | undefined {
    const { overlays } = this.#host.layers;
    if (this.#planOf(key) !== undefined) return { key, vdi: this.#vdiOf(key), bottom: undefined };
    const vid = vidOf(key);
    const idx = idxOf(key);
    const depth = overlays.depthOf(vid, idx);
    if (depth <= MANY_LAYERS) return undefined;
    // The older ones, so that what has changed between the latest snapshots stays exact.
    const layers = overlays.layersOf(vid, idx);
    const upper = layers[depth - FLAT_LAYERS] as number;
    const bottom = layers.at(-1) as number;
    const upperKey = localObjectKey(upper, idx);
    return { key: upperKey, vdi: this.#vdiOf(upperKey), bottom };
  }

  /** The open VDI to which the overlay belongs alone. */
  #vdiOf(key: number): LocalVdi | undefined {
    const { references } = this.#host.layers;
    if (references.of(vidOf(key), idxOf(key)) !== 1) return undefined;
    for (const vdi of this.#host.open.values()) if (vdi.map[idxOf(key)] === vidOf(key)) return vdi;
    return undefined;
  }

  async #rest(took: number, moved: number, utilization: number): Promise<void> {
    // Tests that decide when merges happen do not wait for them.
    if (this.#host.mergeDelayMs !== undefined) return new Promise((resolve) => void setImmediate(resolve));
    const share = utilization > BUSY_LOOP ? BUSY_SHARE : QUIET_SHARE;
    const pause = Math.max((moved / MERGE_RATE) * 1000 - took, took * (share - 1), 0);
    if (this.#isClosed) return;
    await new Promise<void>((resolve) => {
      const timer = setTimeout(resolve, pause).unref();
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
    this.#wake = undefined;
  }
}

function* keysOf(map: Uint32Array): Generator<number> {
  for (let idx = 0; idx < map.length; idx++) if (map[idx] !== 0) yield localObjectKey(map[idx] as number, idx);
}
