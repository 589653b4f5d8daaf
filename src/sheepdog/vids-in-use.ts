/**
 * Which vids of a cluster are in use, and which of them may belong to a name: nodes give a new VDI or snapshot the first free
 * vid at or after the hash of its name (sheep/vdi.c, vdi_lookup). Owns the reading of the nodes' two bitmaps.
 */
import { bytesOfText } from '../text/name-bytes.js';
import { MAX_VID } from './object-ids.js';

const FNV_OFFSET = 0xcbf29ce484222325n;
const FNV_PRIME = 0x100000001b3n;
const MASK_64 = 2n ** 64n - 1n;
/** A part of a bitmap without vids, as nearly all are: of 16 million vids a cluster uses some thousands. */
const PART_BYTES = 4096;
const EMPTY = Buffer.alloc(PART_BYTES);

export class VidsInUse {
  readonly #used: Bitmap;
  readonly #deleted: Bitmap;

  /**
   * The answers to READ_VDIS and READ_DEL_VDIS. Vids of deleted VDIs are in use, too. Takes copies: the caller may use the
   * buffers again.
   */
  constructor(used: Buffer, deleted: Buffer) {
    this.#used = new Bitmap(used);
    this.#deleted = new Bitmap(deleted);
  }

  isUsed(vid: number): boolean {
    return this.#used.has(vid);
  }

  /** In use and not deleted. */
  isLive(vid: number): boolean {
    return this.#used.has(vid) && !this.#deleted.has(vid);
  }

  /** Known to be deleted. A vid that is neither live nor deleted may be one that a just started node does not know yet. */
  isDeleted(vid: number): boolean {
    return this.#deleted.has(vid);
  }

  /** All live vids, in ascending order. */
  live(): number[] {
    const vids: number[] = [];
    for (const [number, used] of this.#used.parts) {
      const deleted = this.#deleted.parts.get(number) ?? EMPTY;
      for (const [n, byte] of used.entries()) {
        const bits = byte & ~(deleted[n] ?? 0);
        if (bits === 0) continue;
        const first = (number * PART_BYTES + n) * 8;
        for (let bit = 0; bit < 8; bit++) if (bits & (1 << bit)) vids.push(first + bit);
      }
    }
    return vids;
  }

  /** Live vids from the hash of `name` up to the first free one: they include all VDIs of that name. */
  placesOf(name: string): number[] {
    const vids: number[] = [];
    const first = firstVid(name);
    for (let vid = first; this.isUsed(vid);) {
      if (this.isLive(vid)) vids.push(vid);
      vid = vid === MAX_VID ? 1 : vid + 1;
      if (vid === first) break;
    }
    return vids;
  }
}

/** Where nodes begin to look for a name: the low 24 bits of FNV-1a over its bytes, never 0. */
export function firstVid(name: string): number {
  let hash = FNV_OFFSET;
  for (const byte of bytesOfText(name)) hash = ((hash ^ BigInt(byte)) * FNV_PRIME) & MASK_64;
  return Number(hash & BigInt(MAX_VID)) || 1;
}

/** A bit for each vid. Keeps the parts that are not empty, in ascending order. */
class Bitmap {
  readonly parts = new Map<number, Buffer>();

  constructor(bytes: Buffer) {
    for (let from = 0; from < bytes.length; from += PART_BYTES) {
      const to = Math.min(from + PART_BYTES, bytes.length);
      if (bytes.compare(EMPTY, 0, to - from, from, to) === 0) continue;
      this.parts.set(from / PART_BYTES, Buffer.from(bytes.subarray(from, to)));
    }
  }

  has(vid: number): boolean {
    const at = vid >>> 3;
    const byte = this.parts.get(Math.floor(at / PART_BYTES))?.[at % PART_BYTES] ?? 0;
    return ((byte >>> (vid & 7)) & 1) === 1;
  }
}
