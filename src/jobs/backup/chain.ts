/**
 * The content of one backup: a raw image and the increments on top of it, read as one disk. Owns the open files. Verifies hashes
 * only in readChecked; never writes.
 */
import { OperationError } from '../../operations/operations.js';
import type { HostDisk } from '../../system/disk.js';
import type { OpenFile } from '../../system/open-file.js';
import { hashOf, type BlockHashes } from '../block-hashes.js';
import { IncrementReader } from './qcow2-file.js';
import { openRegular, readable } from '../target-files.js';

/** One file of a chain, and the size of its disk in bytes. */
export interface Link {
  readonly file: string;
  readonly size: number;
}

export class Chain {
  readonly #disk: HostDisk;
  #size: number;
  readonly #base: OpenFile;
  readonly #baseFile: string;
  /** The number of files, the image first, whose cache was dropped. */
  #dropped = 0;
  /** From the bottom to the top. */
  readonly #links: IncrementReader[] = [];

  private constructor(disk: HostDisk, base: OpenFile, baseFile: string, size: number) {
    this.#disk = disk;
    this.#base = base;
    this.#baseFile = baseFile;
    this.#size = size;
  }

  /** Open an image of `size` bytes, without increments. Errors: DAMAGED, BAD_TARGET. */
  static async openImage(disk: HostDisk, file: string, size: number): Promise<Chain> {
    return new Chain(disk, await present(file, () => openRegular(disk, file, 'r')), file, size);
  }

  /** Open the image and its increments, the lowest first. Errors: DAMAGED, BAD_TARGET. */
  static async open(disk: HostDisk, image: Link, increments: readonly Link[]): Promise<Chain> {
    const chain = await Chain.openImage(disk, image.file, image.size);
    try {
      for (const link of increments) await chain.add(link);
      return chain;
    } catch (error) {
      await chain.close();
      throw error;
    }
  }

  /** Put one more increment on top. Errors: DAMAGED, BAD_TARGET. */
  async add({ file, size }: Link): Promise<void> {
    const link = await present(file, () => IncrementReader.open(this.#disk, file));
    this.#links.push(link); // to be closed with the others
    if (link.size !== size) {
      throw new OperationError('DAMAGED', `${file} is damaged: its disk has ${link.size} bytes, not ${size}`);
    }
    this.#size = size;
  }

  /** Of the disk, in bytes. */
  get size(): number {
    return this.#size;
  }

  /** Fill `into`; bytes behind the end are zeros. Errors: DAMAGED (names the file that cannot be read). */
  read(offset: number, into: Buffer): Promise<void> {
    return this.#read(this.#links.length, offset, into);
  }

  /** The uppermost increment; undefined if there is only the image. */
  get top(): IncrementReader | undefined {
    return this.#links.at(-1);
  }

  /**
   * The first offset, from `offset` on, where a file of the chain holds something; the size of the disk if there is none.
   * Everything before it reads as zeros. With `only`, just this increment counts: everything before is as in the files below.
   */
  async nextStored(offset: number, only?: IncrementReader): Promise<number> {
    if (only) return only.nextOwn(offset);
    const found = await readable(this.#baseFile, () => this.#base.nextData(offset));
    let next = found < 0 ? this.#size : Math.min(found, this.#size);
    for (const link of this.#links) {
      if (next <= offset) break;
      next = Math.min(next, await link.nextOwn(offset));
    }
    return next;
  }

  /** Read a block and compare it with its hash. Errors: DAMAGED (names the files that the block comes from). */
  async readChecked(hashes: BlockHashes, index: number): Promise<Buffer> {
    const block = Buffer.allocUnsafe(hashes.lengthOf(index));
    const offset = index * hashes.blockBytes;
    await this.read(offset, block);
    if (!hashes.is(index, hashOf(block))) {
      const files = await this.filesOf(offset, block.length);
      throw new OperationError(
        'DAMAGED',
        `${files.join(' or ')} is damaged: the ${block.length} bytes of the disk at ${offset} differ from what was backed up`,
      );
    }
    return block;
  }

  /**
   * Drop the files from the page cache, as far as the kernel does it, so that they are read from the disk. Each file is
   * dropped once; another call handles files that were added since.
   */
  async dropCached(): Promise<void> {
    const files = [this.#base, ...this.#links];
    for (; this.#dropped < files.length; this.#dropped++) await files[this.#dropped]?.dropCached();
  }

  /** The files that a range is read from, the uppermost first. */
  async filesOf(offset: number, length: number): Promise<string[]> {
    const files: string[] = [];
    for (const link of [...this.#links].reverse()) {
      const runs = await link.runs(offset, length);
      if (runs.some(({ kind }) => kind !== 'below')) files.push(link.file);
      if (runs.every(({ kind }) => kind !== 'below')) return files;
    }
    return [...files, this.#baseFile];
  }

  async close(): Promise<void> {
    for (const link of this.#links) await link.close();
    await this.#base.close();
  }

  async #read(level: number, offset: number, into: Buffer): Promise<void> {
    const link = this.#links[level - 1];
    if (!link) return readable(this.#baseFile, () => this.#base.readPadded(into, offset));
    let done = 0;
    for (const run of await link.runs(offset, into.length)) {
      const part = into.subarray(run.offset - offset, run.offset - offset + run.length);
      if (run.kind === 'data') await link.read(run, part);
      else if (run.kind === 'zeros') part.fill(0);
      else await this.#read(level - 1, run.offset, part);
      done += run.length;
    }
    into.fill(0, done);
  }
}

async function present<T>(file: string, open: () => Promise<T>): Promise<T> {
  try {
    return await readable(file, open);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
    throw new OperationError('DAMAGED', `${file} is missing`, { cause: error });
  }
}
