/**
 * Reading what is stored about overlays: their bases when a store opens, with the references that they hold, and the blocks of
 * those that a VDI needs before it is used. Owns no state; overlays.ts does.
 */
import type { Metadata } from './metadata.js';
import type { Overlays } from './overlays.js';
import { OVERLAY_BLOCK } from './overlay-records.js';
import { idxOf, localObjectKey, vidOf, type ReferenceCounts } from './reference-counts.js';
import type { DataObjects } from './data-objects.js';
import { TimeSlice } from './time-slice.js';

export interface StoreWithOverlays {
  readonly metadata: Metadata;
  readonly objects: Pick<DataObjects, 'expectLength'>;
  readonly overlays: Overlays;
  readonly references: ReferenceCounts;
}

/** Reads all bases. Errors: DAMAGED, IO. */
export function loadBases({ metadata, objects, overlays }: StoreWithOverlays): void {
  let last = 0;
  for (const { vid, group, record } of metadata.overlayGroups()) {
    overlays.loadBases(vid, group, record);
    if (vid !== last) objects.expectLength((last = vid), overlays.blocks(vid) * OVERLAY_BLOCK);
  }
}

/**
 * Counts what overlays refer to, after the references of all maps were counted. Returns the keys of overlays to which nothing
 * refers: a crash has left their records.
 */
export function countBases({ objects, overlays, references }: Omit<StoreWithOverlays, 'metadata'>): number[] {
  let last = 0;
  /** Overlays that only other overlays refer to, and that are counted already. */
  const counted = new Set<number>();
  const unused: { readonly key: number; readonly base: number }[] = [];
  const count = (vid: number, idx: number): void => {
    for (let at = vid, base = overlays.baseOf(at, idx); base !== 0 && base !== at;) {
      const isFirst = references.of(base, idx) === 0;
      references.add(base, idx);
      if (!isFirst) return;
      // Nothing else refers to what is below: its own reference to what is further down is not counted yet.
      counted.add(localObjectKey(base, idx));
      at = base;
      base = overlays.baseOf(at, idx);
    }
  };
  for (const { key, base } of overlays.entries()) {
    const idx = idxOf(key);
    // What is below has the same size, and may be in no map.
    if (base !== last) objects.expectLength((last = base), overlays.blocks(vidOf(key)) * OVERLAY_BLOCK);
    if (references.of(vidOf(key), idx) === 0) unused.push({ key, base });
    else if (!counted.has(key)) count(vidOf(key), idx);
  }
  return unused.filter(({ key }) => references.of(vidOf(key), idxOf(key)) === 0).map(({ key }) => key);
}

/** Read the blocks of all overlays that the objects of this map consist of. Errors: DAMAGED, IO. */
export async function loadLayers({ metadata, overlays }: StoreWithOverlays, map: Uint32Array): Promise<void> {
  if (overlays.size === 0) return;
  await metadata.settled();
  const slice = new TimeSlice();
  for (let idx = 0; idx < map.length; idx++) {
    const owner = map[idx] as number;
    if (owner !== 0) loadChain(overlays, owner, idx);
    if (slice.isOver(idx)) {
      await slice.next();
      await metadata.settled();
    }
  }
}

/** The same for one object. */
export function loadChain(overlays: Overlays, owner: number, idx: number): void {
  for (let at = owner, base = overlays.baseOf(at, idx); base !== 0; base = overlays.baseOf(at, idx)) {
    overlays.load(at, idx);
    if (base === at) return;
    at = base;
  }
}
