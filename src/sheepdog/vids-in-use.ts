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
const EMPTY = Buffer.alloc(4096);

export class VidsInUse {
  readonly #used: Buffer;
  readonly #deleted: Buffer;

  /** The answers to READ_VDIS and READ_DEL_VDIS. Vids of deleted VDIs are in use, too. */
  constructor(used: Buffer, deleted: Buffer) {
    this.#used = used;
    this.#deleted = deleted;
  }

  isUsed(vid: number): boolean {
    return hasBit(this.#used, vid);
  }

  /** In use and not deleted. */
  isLive(vid: number): boolean {
    return hasBit(this.#used, vid) && !hasBit(this.#deleted, vid);
  }

  /** Known to be deleted. A vid that is neither live nor deleted may be one that a just started node does not know yet. */
  isDeleted(vid: number): boolean {
    return hasBit(this.#deleted, vid);
  }

  /** All live vids, in ascending order. */
  live(): number[] {
    const vids: number[] = [];
    for (let from = 0; from < this.#used.length; from += EMPTY.length) {
      const to = Math.min(from + EMPTY.length, this.#used.length);
      if (this.#used.compare(EMPTY, 0, to - from, from, to) === 0) continue;
      for (let at = from; at < to; at++) {
        const bits = (this.#used[at] as number) & ~(this.#deleted[at] as number);
        if (bits === 0) continue;
        for (let bit = 0; bit < 8; bit++) if (bits & (1 << bit)) vids.push(at * 8 + bit);
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

function hasBit(bitmap: Buffer, vid: number): boolean {
  return (((bitmap[vid >>> 3] ?? 0) >>> (vid & 7)) & 1) === 1;
}
