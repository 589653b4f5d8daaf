/**
 * The changes of one open VDI that are not durable yet. A flush takes all of them over as one batch, and gives the batch back if
 * it fails. Owns these sets and the numbers of flushes; never reads or writes a file.
 */

import type { OverlayWrite } from './overlay-records.js';

/** What one flush takes over. */
export interface Batch {
  /** The vid under which the map is stored. */
  readonly vid: number;
  /** The number of the flush. */
  readonly generation: number;
  readonly objects: ReadonlySet<number>;
  readonly created: ReadonlySet<number>;
  readonly overlays: ReadonlySet<number>;
  /** Of `overlays` that have changed since: what they were when the flush began. */
  readonly before: Map<number, OverlayWrite | undefined>;
  readonly pages: ReadonlySet<number>;
  readonly releases: readonly number[];
  readonly recordChanged: boolean;
  readonly obsolete: readonly number[];
  /** The flush has succeeded. */
  isDurable: boolean;
}

/** The sets may be added to; only `take` replaces them. Files are as DataObjects.fileOf names them, overlays are keys (localObjectKey). */
export class UnflushedChanges {
  /** Files with data that is not synced. Added when a write has reached the file, not before: a sync in between misses it. */
  objects = new Set<number>();
  /** New files whose names are not durable. */
  created = new Set<number>();
  /** Overlays whose base or blocks are not stored as they are. */
  overlays = new Set<number>();
  /** Pages of the map (map-pages.ts). */
  pages = new Set<number>();
  /** References that the VDI holds beside those of its map, one entry each: dropped when the map is durable. */
  releases: number[] = [];
  /** Vids whose records the next flush removes: their snapshot has failed. */
  obsolete: number[] = [];
  recordChanged = false;
  /** New files that are being made, or are made and not in the map yet. No flush takes them over. */
  readonly creating = new Set<number>();
  /** The batch of the flush in flight. */
  inFlight: Batch | undefined;
  /** New objects whose names the durable half of a snapshot syncs. */
  moving: readonly ReadonlySet<number>[] = [];
  #generation: number;

  /** `generation`: of the next flush. Numbers are never reused, also not by later openings of the VDI. */
  constructor(generation: number) {
    this.#generation = generation;
  }

  get generation(): number {
    return this.#generation;
  }

  /** The sets are handed over, not copied: they may be very large. */
  take(vid: number): Batch {
    const batch: Batch = {
      vid,
      generation: this.#generation++,
      objects: this.objects,
      created: this.created,
      overlays: this.overlays,
      before: new Map(),
      pages: this.pages,
      releases: this.releases,
      recordChanged: this.recordChanged,
      obsolete: this.obsolete,
      isDurable: false,
    };
    this.objects = new Set();
    this.created = new Set();
    this.overlays = new Set();
    this.pages = new Set();
    this.releases = [];
    this.recordChanged = false;
    this.obsolete = [];
    return batch;
  }

  /** The flush of the batch has failed: the next one takes its changes over, with those made since. */
  giveBack(batch: Batch): void {
    for (const key of batch.objects) this.objects.add(key);
    for (const key of batch.created) this.created.add(key);
    for (const key of batch.overlays) this.overlays.add(key);
    for (const page of batch.pages) this.pages.add(page);
    this.releases = [...batch.releases, ...this.releases];
    this.recordChanged ||= batch.recordChanged;
    this.obsolete = [...batch.obsolete, ...this.obsolete];
  }

  /** Overlays that are not stored as they are, with those of the flush in flight. */
  get unstoredOverlays(): Iterable<number> {
    return this.inFlight ? new Set([...this.inFlight.overlays, ...this.overlays]) : this.overlays;
  }

  /** With those of the flush in flight. */
  get supersededVids(): readonly number[] {
    return this.inFlight ? [...this.inFlight.obsolete, ...this.obsolete] : this.obsolete;
  }

  /** Whether one of these is a new object whose name is not durable. */
  hasUnsyncedName(isLost: (key: number) => boolean): boolean {
    for (const keys of [this.creating, this.created, this.inFlight?.created ?? [], ...this.moving])
      for (const key of keys) if (isLost(key)) return true;
    return false;
  }
}

/** Can be iterated more than once. */
export function both(first: Iterable<number>, second: Iterable<number>): Iterable<number> {
  return {
    *[Symbol.iterator]() {
      yield* first;
      yield* second;
    },
  };
}
