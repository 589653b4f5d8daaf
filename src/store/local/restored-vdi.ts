/**
 * A VDI of a process that was killed, while the changes in its map logs are applied: its map and its overlays in memory. Stores
 * nothing: store-recovery.ts decides whether what comes out of it is stored.
 */
import { StoreError } from '../store-error.js';
import type { VdiRecord } from '../vdi-record.js';
import type { DataObjects } from './data-objects.js';
import { BASED, BELOW, HAS_BLOCKS, LACKS_BLOCKS, MADE_WHOLE, OVERLAID, OWNER, unpackBlocks } from './map-log-format.js';
import type { LoggedChange } from './map-log-reading.js';
import type { Metadata } from './metadata.js';
import type { Overlays } from './overlays.js';
import { localObjectKey } from './reference-counts.js';

export interface StoreOfRestored {
  readonly metadata: Pick<Metadata, 'map'>;
  readonly objects: Pick<DataObjects, 'expectLength'>;
  readonly overlays: Overlays;
}

export class RestoredVdi {
  readonly map: Uint32Array;
  /** Indexes of map entries that have changed. */
  readonly changed = new Set<number>();
  /** Keys of overlays that have changed or are gone. */
  readonly overlays = new Set<number>();
  /** The flush that would have stored all this. */
  generation = 0;
  /** Why the changes cannot be applied. */
  problem: string | undefined;
  readonly #overlays: Overlays;
  readonly #objects: Pick<DataObjects, 'expectLength'>;
  readonly #size: number;
  readonly #name: string;
  /** The overlay that the next entry is about, if it is not the map's. */
  #below: { readonly idx: number; readonly vid: number } | undefined;

  /** Errors: those of reading the metadata. */
  constructor(store: StoreOfRestored, record: VdiRecord) {
    this.map = store.metadata.map(record);
    this.#overlays = store.overlays;
    this.#objects = store.objects;
    this.#size = 2 ** record.blockSizeShift;
    this.#name = record.name;
  }

  /** The entries of all logs of the VDI, oldest first. */
  apply({ idx, kind, value, generation }: LoggedChange): void {
    this.generation = Math.max(this.generation, generation);
    if (idx >= this.map.length) return; // the VDI was made smaller since
    try {
      this.#apply(idx, kind, value);
    } catch (error) {
      const what = error instanceof StoreError ? error.message : `an entry of kind ${kind} does not fit`;
      this.problem ??= `a log of ${this.#name}, object ${idx}: ${what}`;
    }
  }

  #apply(idx: number, kind: number, value: number): void {
    const before = this.map[idx] as number;
    if (kind === OWNER || kind === OVERLAID || kind === MADE_WHOLE) {
      if (kind === OVERLAID) {
        this.#objects.expectLength(value, this.#size);
        // Over nothing, all of it is its own.
        this.#overlays.add(value, idx, before === 0 ? value : before, this.#size);
        this.overlays.add(localObjectKey(value, idx));
      } else if (kind === MADE_WHOLE && this.#overlays.baseOf(value, idx) !== 0) {
        this.#overlays.remove(value, idx);
        this.overlays.add(localObjectKey(value, idx));
      }
      this.map[idx] = value;
      this.changed.add(idx);
      return;
    }
    if (kind === BELOW) {
      this.#below = { idx, vid: value };
      return;
    }
    const vid = this.#below?.idx === idx ? this.#below.vid : before;
    this.#below = undefined;
    this.#overlays.load(vid, idx);
    this.overlays.add(localObjectKey(vid, idx));
    if (kind === BASED) this.#overlays.rebase(vid, idx, value);
    else if (kind === HAS_BLOCKS || kind === LACKS_BLOCKS) {
      const { first, end } = unpackBlocks(value);
      if (end > this.#overlays.blocks(vid)) throw new StoreError('DAMAGED', `it has no block ${end - 1}`);
      this.#overlays.put(vid, idx, first, end, kind === HAS_BLOCKS);
    } else throw new StoreError('FORMAT', `an entry of kind ${kind} is not known to this version`);
  }
}
