/**
 * Ranges of a disk that a rescue tells about, for people: gathered object by object, neighbours as one. Owns how they are counted.
 */
import type { VdiRecord } from '../vdi-record.js';
import { OVERLAY_BLOCK } from './overlay-records.js';

/** Bytes [from, to) of a disk. */
export interface DiskRange {
  readonly from: number;
  readonly to: number;
}

export class DiskRanges {
  readonly #size: number;
  readonly #objectSize: number;
  readonly #ranges: { from: number; to: number }[] = [];
  readonly #objects = new Set<number>();

  constructor({ size, blockSizeShift }: VdiRecord) {
    this.#size = size;
    this.#objectSize = 2 ** blockSizeShift;
  }

  /** How many objects have a part in the ranges. */
  get objects(): number {
    return this.#objects.size;
  }

  addObject(idx: number): void {
    this.#add(idx, 0, this.#objectSize);
  }

  /** Blocks [first, end) of the object. */
  addBlocks(idx: number, { first, end }: { readonly first: number; readonly end: number }): void {
    this.#add(idx, first * OVERLAY_BLOCK, end * OVERLAY_BLOCK);
  }

  #add(idx: number, offset: number, end: number): void {
    const from = idx * this.#objectSize + offset;
    const to = Math.min(idx * this.#objectSize + end, this.#size);
    if (to <= from) return;
    this.#objects.add(idx);
    this.#ranges.push({ from, to });
  }

  /** In order, without overlaps. */
  list(): readonly DiskRange[] {
    const list: { from: number; to: number }[] = [];
    for (const { from, to } of this.#ranges.sort((a, b) => a.from - b.from)) {
      const last = list.at(-1);
      if (last === undefined || last.to < from) list.push({ from, to });
      else last.to = Math.max(last.to, to);
    }
    return list;
  }
}
