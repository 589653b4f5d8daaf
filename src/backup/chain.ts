/**
 * The content of one backup: a raw image and the increments over it, read as one disk. Owns the open files. Checks what
 * it reads only where asked to; never writes.
 */
import fs from 'node:fs';
import path from 'node:path';
import { OperationError } from '../daemon/operations.js';
import { dropCached } from '../store/local/libc.js';
import { hashOf, type BlockHashes } from './block-hashes.js';
import { readWithin } from './file-io.js';
import { IncrementReader } from './qcow2-file.js';

export class Chain {
  readonly size: number;
  readonly #base: fs.promises.FileHandle;
  readonly #baseFile: string;
  /** From the bottom to the top. */
  readonly #links: readonly IncrementReader[];

  private constructor(base: fs.promises.FileHandle, baseFile: string, links: readonly IncrementReader[], size: number) {
    this.#base = base;
    this.#baseFile = baseFile;
    this.#links = links;
    this.size = size;
  }

  /** Open an image of `size` bytes made of these files, the lowest first. Errors: DAMAGED. */
  static async open(baseFile: string, increments: readonly string[], size: number): Promise<Chain> {
    const base = await openFile(baseFile);
    const links: IncrementReader[] = [];
    try {
      for (const file of increments) links.push(await present(file, () => IncrementReader.open(file)));
      const top = links.at(-1);
      if (top && top.size !== size) {
        throw new OperationError('DAMAGED', `${top.file} is damaged: it is of ${top.size} bytes, not ${size}`);
      }
      return new Chain(base, baseFile, links, size);
    } catch (error) {
      for (const link of links) await link.close();
      await base.close();
      throw error;
    }
  }

  /** Fill `into`; behind the end are zeros. */
  read(offset: number, into: Buffer): Promise<void> {
    return this.#read(this.#links.length, offset, into);
  }

  /** What is in the uppermost increment itself. */
  get top(): IncrementReader | undefined {
    return this.#links.at(-1);
  }

  /** Read a block and compare it with its hash. Errors: DAMAGED, naming the files it came from. */
  async readChecked(hashes: BlockHashes, index: number): Promise<Buffer> {
    const block = Buffer.allocUnsafe(hashes.lengthOf(index));
    const offset = index * hashes.blockBytes;
    await this.read(offset, block).catch((error: NodeJS.ErrnoException) => {
      if (error.code !== 'EIO') throw error;
      const what = `a file of ${path.dirname(this.#baseFile)} cannot be read at ${offset} of the disk`;
      throw new OperationError('DAMAGED', `${what}: ${error.message}`, { cause: error });
    });
    if (!hashes.is(index, hashOf(block))) {
      const files = await this.filesOf(offset, block.length);
      throw new OperationError(
        'DAMAGED',
        `${files.join(' or ')} is damaged: the ${block.length} bytes of the disk at ${offset} are not what was backed up`,
      );
    }
    return block;
  }

  /** Read anew from the disk, not from the cache of the operating system, as far as it lets go of it. */
  async dropCached(): Promise<void> {
    for (const link of this.#links) await dropCached(link.fd);
    await dropCached(this.#base.fd);
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
    if (!link) return readWithin(this.#base.fd, into, offset);
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

function openFile(file: string): Promise<fs.promises.FileHandle> {
  return present(file, () => fs.promises.open(file, 'r'));
}

async function present<T>(file: string, open: () => Promise<T>): Promise<T> {
  try {
    return await open();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
    throw new OperationError('DAMAGED', `${file} is missing`, { cause: error });
  }
}
