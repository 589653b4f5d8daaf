/**
 * The content of one backup: a raw image and the increments over it, read as one disk. Owns the open files. Checks what
 * it reads only where asked to; never writes.
 */
import { OperationError } from '../../operations/operations.js';
import type { HostDisk } from '../../system/disk.js';
import type { OpenFile } from '../../system/open-file.js';
import { hashOf, type BlockHashes } from '../block-hashes.js';
import { IncrementReader } from './qcow2-file.js';
import { openRegular, readable } from '../target-files.js';

/** One file over the image, and the size of the disk it is of. */
export interface Link {
  readonly file: string;
  readonly size: number;
}

export class Chain {
  readonly #disk: HostDisk;
  #size: number;
  readonly #base: OpenFile;
  readonly #baseFile: string;
  /** Of so many files, the image first, the cache was dropped. */
  #dropped = 0;
  /** From the bottom to the top. */
  readonly #links: IncrementReader[] = [];

  private constructor(disk: HostDisk, base: OpenFile, baseFile: string, size: number) {
    this.#disk = disk;
    this.#base = base;
    this.#baseFile = baseFile;
    this.#size = size;
  }

  /** Open an image of `size` bytes, without what is over it. Errors: DAMAGED, BAD_TARGET. */
  static async openImage(disk: HostDisk, file: string, size: number): Promise<Chain> {
    return new Chain(disk, await present(file, () => openRegular(disk, file, 'r')), file, size);
  }

  /** Open the image and the increments over it, the lowest first. Errors: DAMAGED, BAD_TARGET. */
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

  /** From now on it is the disk with this increment over what it was. Errors: DAMAGED, BAD_TARGET. */
  async add({ file, size }: Link): Promise<void> {
    const link = await present(file, () => IncrementReader.open(this.#disk, file));
    this.#links.push(link); // to be closed with the others
    if (link.size !== size) {
      throw new OperationError('DAMAGED', `${file} is damaged: it is of ${link.size} bytes, not ${size}`);
    }
    this.#size = size;
  }

  /** Of the disk. */
  get size(): number {
    return this.#size;
  }

  /** Fill `into`; behind the end are zeros. Errors: DAMAGED, naming the file that cannot be read. */
  read(offset: number, into: Buffer): Promise<void> {
    return this.#read(this.#links.length, offset, into);
  }

  /** What is in the uppermost increment itself. */
  get top(): IncrementReader | undefined {
    return this.#links.at(-1);
  }

  /**
   * The first place from `offset` on where a file holds something, or the size of the disk: before it all reads as zeros.
   * `only`: of this increment, before that place everything is as below.
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

  /** Read a block and compare it with its hash. Errors: DAMAGED, naming the files it came from. */
  async readChecked(hashes: BlockHashes, index: number): Promise<Buffer> {
    const block = Buffer.allocUnsafe(hashes.lengthOf(index));
    const offset = index * hashes.blockBytes;
    await this.read(offset, block);
    if (!hashes.is(index, hashOf(block))) {
      const files = await this.filesOf(offset, block.length);
      throw new OperationError(
        'DAMAGED',
        `${files.join(' or ')} is damaged: the ${block.length} bytes of the disk at ${offset} are not what was backed up`,
      );
    }
    return block;
  }

  /**
   * Read anew from the disk, not from the cache of the operating system, as far as it lets go of it: each file once, those
   * that are added later too if this is called again.
   */
  async dropCached(): Promise<void> {
    const files = [this.#base, ...this.#links];
    for (; this.#dropped < files.length; this.#dropped++) await files[this.#dropped]?.dropCached();
  }

  /** The files that a range is made of, uppermost first. */
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
