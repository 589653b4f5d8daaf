/**
 * Which blocks of overlays have data in the segment files of a damaged store. Owns what counts as data: a block that is allocated
 * and not zeros, because some filesystems allocate more than one block at a time. Reads only; decides nothing about overlays.
 */
import type { HostDisk } from '../../system/disk.js';
import { readToEnd } from '../../system/whole-io.js';
import { nextBit, putBits } from './block-bits.js';
import { blocksOf, OVERLAY_BLOCK, wordsOf } from './overlay-records.js';
import { SEGMENT_OBJECTS } from './overlays.js';
import { openPlainFile } from './plain-file.js';
import { idxOf, localObjectKey, vidOf } from './reference-counts.js';
import { isObjectSize, type FoundFiles } from './rescue-sources.js';

/** Read at a time. */
const READ_BLOCKS = 256;

/** The words of the bitmap of an overlay whose blocks are known, or undefined; by key (localObjectKey). */
export type KnownBlocks = (key: number) => Uint32Array | undefined;

export class SegmentData {
  readonly #disk: HostDisk;
  readonly #found: FoundFiles;
  readonly #blocks = new Map<number, Uint32Array>();

  constructor(disk: HostDisk, found: FoundFiles) {
    this.#disk = disk;
    this.#found = found;
  }

  /** Bitmaps of the blocks with data, by key (localObjectKey), of the segments that were scanned; without those that have none. */
  get blocks(): ReadonlyMap<number, Uint32Array> {
    return this.#blocks;
  }

  /** The length of objects in a segment file, by its length. Undefined if there is none, or if it is damaged. */
  objectSize(segment: number): number | undefined {
    const size = (this.#found.files.get(segment)?.size ?? 0) / SEGMENT_OBJECTS;
    return isObjectSize(size) ? size : undefined;
  }

  /**
   * Look for data in all segment files whose vid `mustScan`. Blocks that are known count as data where they are allocated. What
   * cannot be read counts as data: the copy of it will fail, and say so.
   */
  async scan(mustScan: (vid: number) => boolean, known: KnownBlocks): Promise<void> {
    for (const segment of this.#found.files.keys()) if (mustScan(vidOf(segment))) await this.#scanFile(segment, known);
  }

  async #scanFile(segment: number, known: KnownBlocks): Promise<void> {
    const size = this.objectSize(segment);
    if (size === undefined) return;
    let fd: number;
    try {
      fd = openPlainFile(this.#disk, this.#found.pathOf(segment));
    } catch {
      return; // its overlays are listed as lost
    }
    try {
      const end = SEGMENT_OBJECTS * size;
      for (let at = 0; at < end;) {
        const data = await this.#disk.nextData(fd, at);
        if (data < 0 || data >= end) return;
        const hole = Math.min(await this.#disk.nextHole(fd, data), end);
        at = Math.floor(data / OVERLAY_BLOCK) * OVERLAY_BLOCK;
        while (at < hole) {
          const to = Math.min(at + READ_BLOCKS * OVERLAY_BLOCK, Math.ceil(hole / OVERLAY_BLOCK) * OVERLAY_BLOCK);
          // A read does not cross objects.
          const part = Math.min(to, (Math.floor(at / size) + 1) * size);
          await this.#note(fd, segment, size, at, part, known);
          at = part;
        }
      }
    } finally {
      this.#disk.closeSync(fd);
    }
  }

  /** The range [from, to) of the file is allocated. */
  async #note(fd: number, segment: number, size: number, from: number, to: number, known: KnownBlocks): Promise<void> {
    const key = localObjectKey(vidOf(segment), idxOf(segment) * SEGMENT_OBJECTS + Math.floor(from / size));
    const first = (from % size) / OVERLAY_BLOCK;
    const end = first + (to - from) / OVERLAY_BLOCK;
    const isKnown = known(key);
    let bytes: Buffer | undefined;
    if (isKnown === undefined || nextBit(isKnown, 0, first, end, false) < end) {
      bytes = Buffer.alloc(to - from);
      try {
        await readToEnd(this.#disk, fd, bytes, from);
      } catch {
        bytes = undefined;
      }
    }
    for (let block = first; block < end; block++) {
      const at = (block - first) * OVERLAY_BLOCK;
      const hasBit = isKnown !== undefined && nextBit(isKnown, 0, block, block + 1, true) === block;
      if (!hasBit && bytes && ZEROS.equals(bytes.subarray(at, at + OVERLAY_BLOCK))) continue;
      let words = this.#blocks.get(key);
      if (!words) this.#blocks.set(key, (words = new Uint32Array(wordsOf(blocksOf(size)))));
      putBits(words, 0, block, block + 1, true);
    }
  }
}

const ZEROS = Buffer.alloc(OVERLAY_BLOCK);
