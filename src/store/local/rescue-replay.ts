/**
 * The VDIs of a damaged store as they were after the last recorded change: the state of a copy, with the changes since and the
 * objects that are newer than its maps. Owns the rules by which an object's name tells its owner. Reads no file.
 */
import type { VdiRecord } from '../vdi-record.js';
import type { RecordedChange } from './change-format.js';
import { idxOf, localObjectKey, vidOf } from './reference-counts.js';

/** A VDI or snapshot, and what is known of its map. */
export interface ReplayedVdi {
  record: VdiRecord;
  /** idx -> vid of the object's owner. */
  map: Uint32Array;
  /** The map may have changed since it was known exactly. */
  isChanged: boolean;
  /** idx of objects that were taken by their name: the known map does not have them. */
  readonly newer: Set<number>;
  /** idx of objects that the known map has and that are not there; its map has no entry for them if it `isChanged`. */
  readonly missing: Set<number>;
  /** idx of overlays of the known map that have given all their blocks to the object below: the map has that one. */
  readonly merged: Set<number>;
  /** Vids under which it has made objects, oldest first: its own, and those that temporary snapshots have given. */
  readonly creationVids: number[];
}

/** Objects that exist, as keys (localObjectKey); whole or overlays. */
export interface ExistingObjects {
  has(key: number): boolean;
  keys(): Iterable<number>;
  /** The length of an object, by its file. Undefined if it is no length of objects. */
  sizeOf(key: number): number | undefined;
  /** The vid of the object that has the content of an overlay that is gone, because the two were merged; 0 if there is none. */
  below(vid: number, idx: number): number;
  /** Whether the object (vid, idx) is one of the layers of (owner, idx). */
  isBelow(vid: number, owner: number, idx: number): boolean;
  /**
   * A map gets the object (vid, idx) by its name, instead of the one of `owner`, 0 for none. `size`: of an object, bytes. Returns
   * whether all of its content is new to the map; else the object lies over the other one.
   */
  take(vid: number, idx: number, owner: number, size: number): boolean;
}

export class Replay {
  readonly vdis = new Map<number, ReplayedVdi>();
  /** Vids that had a record and have none any more. */
  readonly removed = new Set<number>();
  readonly #objects: ExistingObjects;
  /** vid -> idx of its objects. */
  readonly #byVid = new Map<number, number[]>();
  /** Creation vid -> vid of its VDI, also of VDIs that are gone. */
  readonly #madeFor = new Map<number, number>();

  constructor(objects: ExistingObjects) {
    this.#objects = objects;
    for (const key of objects.keys()) {
      const found = this.#byVid.get(vidOf(key));
      if (found) found.push(idxOf(key));
      else this.#byVid.set(vidOf(key), [idxOf(key)]);
    }
  }

  /** A VDI of the copy. */
  add(record: VdiRecord, map: Uint32Array): void {
    this.vdis.set(record.vid, vdiOf(record, map));
  }

  /** Whether a VDI, known or removed, has made objects under this vid. */
  knows(vid: number): boolean {
    return this.vdis.has(vid) || this.removed.has(vid) || this.#madeFor.has(vid);
  }

  apply(change: RecordedChange): void {
    if ('put' in change) this.#put(change.put);
    else if ('removed' in change) for (const vid of change.removed) this.#remove(vid);
    else if ('map' in change) {
      const vdi = this.vdis.get(change.map);
      if (vdi) vdi.isChanged = true;
    } else if ('names' in change) this.name(change.names, change.for);
  }

  /** The working VDI `of` makes its new objects under `vid` from here on. */
  name(vid: number, of: number): void {
    this.#madeFor.set(vid, of);
    this.vdis.get(of)?.creationVids.push(vid);
  }

  #remove(vid: number): void {
    if (this.vdis.delete(vid)) this.removed.add(vid);
  }

  #put(record: VdiRecord): void {
    const known = this.vdis.get(record.vid);
    if (known) {
      known.record = record;
      known.map = resized(known.map, record);
      return;
    }
    this.removed.delete(record.vid);
    const parent = this.vdis.get(record.parentVid);
    // A snapshot, a clone and a rollback begin with the map that the parent has at this moment.
    if (parent) this.settle(parent);
    const vdi = vdiOf(record, resized(parent?.map ?? new Uint32Array(0), record));
    if (parent) {
      vdi.isChanged = parent.isChanged;
      for (const idx of parent.newer) vdi.newer.add(idx);
      for (const idx of parent.missing) vdi.missing.add(idx);
      for (const idx of parent.merged) vdi.merged.add(idx);
    }
    // The parent is unknown: the record was read, but not what its map began with.
    if (!parent && record.parentVid !== 0) vdi.isChanged = true;
    this.vdis.set(record.vid, vdi);
  }

  /** All maps, after the last change. */
  settleAll(): void {
    for (const vdi of this.vdis.values()) this.settle(vdi);
  }

  /**
   * Bring the map of a VDI up to the objects that exist. Of a map that has not changed, every object must be there. Of one that
   * has, an object of the VDI's own creation vids that exists is newer than the map's, unless the map has one of a later vid: an
   * object is removed when no map has it. One that does not exist was trimmed, or is lost.
   */
  settle(vdi: ReplayedVdi): void {
    const { map, creationVids } = vdi;
    if (vdi.isChanged) {
      const rank = new Map(creationVids.map((vid, n) => [vid, n]));
      for (const [n, vid] of creationVids.entries()) {
        for (const idx of this.#byVid.get(vid) ?? []) {
          if (idx >= map.length || map[idx] === vid) continue;
          const owner = map[idx] as number;
          if ((rank.get(owner) ?? -1) > n && this.#objects.has(localObjectKey(owner, idx))) continue;
          // An overlay of a temporary snapshot's vid lies over it.
          if (this.#objects.isBelow(vid, owner, idx)) continue;
          const size = 2 ** vdi.record.blockSizeShift;
          // Its creation was not finished.
          if (this.#objects.sizeOf(localObjectKey(vid, idx)) !== size) continue;
          const isNew = this.#objects.take(vid, idx, owner, size);
          map[idx] = vid;
          if (isNew) vdi.newer.add(idx);
          vdi.missing.delete(idx);
        }
      }
    }
    for (let idx = 0; idx < map.length; idx++) {
      const owner = map[idx] as number;
      if (owner === 0 || this.#objects.has(localObjectKey(owner, idx))) continue;
      const below = this.#objects.below(owner, idx);
      if (below !== 0) {
        map[idx] = below;
        vdi.merged.add(idx);
        continue;
      }
      vdi.missing.add(idx);
      if (vdi.isChanged) map[idx] = 0;
    }
  }
}

function vdiOf(record: VdiRecord, map: Uint32Array): ReplayedVdi {
  return {
    record,
    map,
    isChanged: false,
    newer: new Set(),
    missing: new Set(),
    merged: new Set(),
    creationVids: [record.vid],
  };
}

/** A copy of `map`, with an entry for each object of the record's size. */
function resized(map: Uint32Array, { size, blockSizeShift }: VdiRecord): Uint32Array {
  const copy = new Uint32Array(Math.ceil(size / 2 ** blockSizeShift));
  copy.set(map.subarray(0, copy.length));
  return copy;
}
