/**
 * The SHA-256 of every block of a disk. A backup is checked against it, in whichever files its bytes are; two disks are
 * compared by it. Owns the form of the table: 32 bytes for each block in order, zeros for a block of zeros. The hash of the
 * table, the tree hash, identifies the content of the whole disk without reading its zeros; it is not the SHA-256 of the image.
 */
import { createHash } from 'node:crypto';
import { OperationError } from '../operations/operations.js';
import type { HostDisk } from '../system/disk.js';
import { isZeros } from '../system/zeros.js';
import { readWhole, replaceFile } from './target-files.js';

const HASH_BYTES = 32;
const HASH_WORDS = HASH_BYTES / Uint32Array.BYTES_PER_ELEMENT;
/** The entry of a block of zeros. */
export const NO_HASH = Buffer.alloc(HASH_BYTES);
/** A block is a data object of the VDI, but not larger than this: several blocks are in memory at a time. */
export const MAX_BLOCK_BYTES = 16 * 2 ** 20;
/** Blocks of one disk: a table of 512 MiB. Enough for 256 TiB in blocks of 16 MiB, 64 TiB in blocks of 4 MiB. */
export const MAX_BLOCKS = 2 ** 24;

/** The size of a block, in bytes, for a VDI with objects of 2^blockSizeShift bytes. */
export function blockBytesOf(blockSizeShift: number): number {
  return Math.min(2 ** blockSizeShift, MAX_BLOCK_BYTES);
}

/** The table's entry for a block of these bytes. */
export function hashOf(block: Buffer): Buffer {
  return isZeros(block) ? NO_HASH : createHash('sha256').update(block).digest();
}

export class BlockHashes {
  /** Blocks of the disk; the last one may be shorter than blockBytes. */
  readonly count: number;
  readonly #table: Buffer;
  /** The same bytes. A disk of terabytes has a million entries, nearly all zeros, and a Buffer for each would cost most of it. */
  readonly #words: Uint32Array;

  /** All zeros, or a copy of `previous`, filled up with zeros or cut to `size`. Errors: TOO_LARGE. */
  constructor(
    readonly size: number,
    readonly blockBytes: number,
    previous?: BlockHashes,
  ) {
    this.count = Math.ceil(size / blockBytes);
    if (this.count > MAX_BLOCKS) {
      throw new OperationError(
        'TOO_LARGE',
        `a disk of ${size} bytes has ${this.count} blocks of ${blockBytes} bytes; ${MAX_BLOCKS} can be hashed`,
      );
    }
    this.#table = Buffer.alloc(this.count * HASH_BYTES);
    this.#words = new Uint32Array(this.#table.buffer, this.#table.byteOffset, this.count * HASH_WORDS);
    if (previous) previous.#table.copy(this.#table);
  }

  /** Read a table. Errors: DAMAGED (it does not have this tree hash). */
  static async load(
    disk: HostDisk,
    file: string,
    size: number,
    blockBytes: number,
    treeHash: string,
  ): Promise<BlockHashes> {
    const bytes = Math.ceil(size / blockBytes) * HASH_BYTES;
    const found = await readWhole(disk, file, bytes);
    if (found.length === bytes) {
      const hashes = new BlockHashes(size, blockBytes);
      found.copy(hashes.#table);
      if (hashes.treeHash === treeHash) return hashes;
    }
    throw new OperationError('DAMAGED', `${file} is damaged: it is not the list of hashes that was written`);
  }

  save(disk: HostDisk, file: string): Promise<void> {
    return replaceFile(disk, file, this.#table);
  }

  /**
   * SHA-256 of the table. Two disks of one size and with blocks of one size that have the same tree hash have the same
   * content.
   */
  get treeHash(): string {
    return createHash('sha256').update(this.#table).digest('hex');
  }

  lengthOf(index: number): number {
    return Math.min(this.blockBytes, this.size - index * this.blockBytes);
  }

  isZero(index: number): boolean {
    if (index >= this.count) return true;
    const from = index * HASH_WORDS;
    for (let n = from; n < from + HASH_WORDS; n++) if (this.#words[n] !== 0) return false;
    return true;
  }

  /** Whether the block has this hash. Blocks behind the end are zeros. */
  is(index: number, hash: Buffer): boolean {
    if (index >= this.count) return hash.equals(NO_HASH);
    const from = index * HASH_BYTES;
    return this.#table.compare(hash, 0, HASH_BYTES, from, from + HASH_BYTES) === 0;
  }

  /** Whether the block has the same hash in both tables. Blocks behind the end are zeros. */
  agrees(index: number, other: BlockHashes): boolean {
    if (index >= this.count) return other.isZero(index);
    if (index >= other.count) return this.isZero(index);
    const from = index * HASH_WORDS;
    for (let n = from; n < from + HASH_WORDS; n++) if (this.#words[n] !== other.#words[n]) return false;
    return true;
  }

  set(index: number, hash: Buffer): void {
    hash.copy(this.#table, index * HASH_BYTES);
  }
}
