/**
 * Which vids of a cluster are in use, and where among them a name's are: nodes give a new VDI or snapshot the first free
 * vid from a place that its name says (sheep/vdi.c, vdi_lookup). Owns the reading of the nodes' two bitmaps.
 */
import { bytesOfText } from '../text/name-bytes.js';
import { MAX_VID } from './object-ids.js';

const FNV_OFFSET = 0xcbf29ce484222325n;
const FNV_PRIME = 0x100000001b3n;
const MASK_64 = 2n ** 64n - 1n;
/** A part of a bitmap with no vid in it. Nearly all are: of 16 million vids a cluster uses some thousands. */
const EMPTY = Buffer.alloc(4096);

export class VidsInUse {
  readonly #used: Buffer;
  readonly #deleted: Buffer;

  /** Bitmaps as READ_VDIS and READ_DEL_VDIS answer them: those of deleted VDIs are in use, too. */
  constructor(used: Buffer, deleted: Buffer) {
    this.#used = used;
    this.#deleted = deleted;
  }

  isUsed(vid: number): boolean {
    return hasBit(this.#used, vid);
  }

  /** It has an inode, and is not deleted. */
  isLive(vid: number): boolean {
    return hasBit(this.#used, vid) && !hasBit(this.#deleted, vid);
  }

  /** The nodes say so. Of what is neither live nor deleted a node that has just started may not have heard yet. */
  isDeleted(vid: number): boolean {
    return hasBit(this.#deleted, vid);
  }

  /** All that are, in ascending order. */
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

  /** Live ones from the first place of `name` up to the first that is free: all of that name are among them. */
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

/** Where the nodes begin to look for a name: the low 24 bits of FNV-1a over its bytes, and never 0. */
export function firstVid(name: string): number {
  let hash = FNV_OFFSET;
  for (const byte of bytesOfText(name)) hash = ((hash ^ BigInt(byte)) * FNV_PRIME) & MASK_64;
  return Number(hash & BigInt(MAX_VID)) || 1;
}

function hasBit(bitmap: Buffer, vid: number): boolean {
  return (((bitmap[vid >>> 3] ?? 0) >>> (vid & 7)) & 1) === 1;
}
