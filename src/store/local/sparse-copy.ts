/**
 * Emptying, zeroing and copying sparse files with their holes, each in the cheapest way that the filesystem has. Owns no
 * descriptors, and knows nothing of objects.
 */
import type { HostDisk } from '../../system/disk.js';
import { writeFully } from '../../system/whole-io.js';

const ZEROS = Buffer.alloc(1024 * 1024);

export async function writeZeros(disk: HostDisk, fd: number, offset: number, length: number): Promise<void> {
  for (let at = offset; at < offset + length; at += ZEROS.length) {
    await writeFully(disk, fd, ZEROS.subarray(0, Math.min(ZEROS.length, offset + length - at)), at);
  }
}

/** Make the file `size` zeros, without allocated space where the filesystem has holes. It is never shorter than that meanwhile. */
export async function makeEmpty(disk: HostDisk, fd: number, size: number): Promise<void> {
  const before = disk.fstatSync(fd).size;
  if (before !== size) await disk.truncate(fd, size);
  if (before > 0 && !(await disk.punchHole(fd, 0, size))) await writeZeros(disk, fd, 0, size);
}

export class SparseCopy {
  readonly #disk: HostDisk;
  #reflinks = true;

  constructor(disk: HostDisk) {
    this.#disk = disk;
  }

  /**
   * Copy the data of `source`, which has `size` bytes, into `to`, an empty file; holes stay holes. The bytes
   * [skip, skip + skipLength) may be left out. Returns the offset where `source` ended too early; undefined if it did not.
   */
  async copy(source: number, to: number, size: number, skip: number, skipLength: number): Promise<number | undefined> {
    if (this.#reflinks) {
      if (await this.#disk.clone(source, to)) return undefined;
      this.#reflinks = false;
    }
    if (skipLength === 0) return this.copyRange(source, to, 0, size);
    const before = await this.copyRange(source, to, 0, Math.min(skip, size));
    return before ?? (await this.copyRange(source, to, skip + skipLength, size));
  }

  /** The same for the range [from, end), to the same place of `to`, which has no data there. */
  async copyRange(source: number, to: number, from: number, end: number): Promise<number | undefined> {
    for (let at = from; at < end;) {
      const data = await this.#disk.nextData(source, at);
      if (data < 0 || data >= end) return undefined;
      const hole = Math.min(await this.#disk.nextHole(source, data), end);
      for (at = data; at < hole;) {
        let count = await this.#disk.copyRange(source, to, at, hole - at);
        if (count <= 0) count = await copyByHand(this.#disk, source, to, at, hole - at);
        if (count === 0) return at;
        at += count;
      }
    }
    return undefined;
  }
}

async function copyByHand(disk: HostDisk, from: number, to: number, offset: number, length: number): Promise<number> {
  const buffer = Buffer.allocUnsafe(Math.min(length, ZEROS.length));
  const count = await disk.read(from, buffer, 0, offset);
  await writeFully(disk, to, buffer.subarray(0, count), offset);
  return count;
}
