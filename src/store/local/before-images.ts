/**
 * Before-images of a disk: the content that 4 KiB blocks had at one moment, for blocks that were overwritten since. Owns
 * sparse scratch files, addressed by disk offset, and a bitmap of the blocks in them. The files have no name, so they end
 * with the process. Does not decide when a block must be kept: the caller writes each block once, before it changes.
 */
import path from 'node:path';
import { O_CREAT, O_RDWR, O_TRUNC, removeIfThereSync, type HostDisk } from '../../system/disk.js';
import { readPadded, writeFully } from '../../system/whole-io.js';
import { StoreError } from '../store-error.js';
import type { Awaitable } from '../vdi-record.js';
import type { CachedReads } from './cached-reads.js';
import { CHANGES, READS, type ThreadShare } from './thread-shares.js';
import type { WriteThrottle } from './write-throttle.js';

export const KEPT_BLOCK = 4096;
/** Blocks of one piece of the bitmap (16 KiB): memory is used only for parts of the disk that are written. */
const PIECE_BLOCKS = 2 ** 17;
/** A word of the bitmap with all bits set. */
const ALL_KEPT = 0xffff_ffff;
/** Bytes of disk per scratch file: filesystems limit the size of a file (ext4: 16 TiB with 4 KiB blocks). */
const FILE_BYTES = 2 ** 40;
/** The name of a scratch file between its creation and its unlink. */
const SCRATCH_NAME = 'scratch';

/** Remove a scratch file that a process left in the store `directory` because it was killed in between. */
export function removeLeftScratch(disk: HostDisk, directory: string): void {
  removeIfThereSync(disk, path.join(directory, SCRATCH_NAME));
}

export class BeforeImages {
  readonly #disk: HostDisk;
  readonly #directory: string;
  readonly #reads: CachedReads;
  readonly #bitmap: (Uint32Array | undefined)[] = [];
  readonly #files: (number | undefined)[] = [];
  readonly #throttle: WriteThrottle;
  /** Reads and writes in flight on the thread pool; meanwhile the files stay open. */
  #busy = 0;
  #isClosed = false;

  /** `reads`: of the directory's filesystem. `throttle`: of its disk. */
  constructor(disk: HostDisk, directory: string, reads: CachedReads, throttle: WriteThrottle) {
    this.#disk = disk;
    this.#throttle = throttle;
    this.#directory = directory;
    this.#reads = reads;
  }

  /** The offset of the first block in [offset, end) that is kept, or (`kept` false) is not; else `end`. Multiples of 4 KiB. */
  next(offset: number, end: number, kept: boolean): number {
    for (let at = offset; at < end;) {
      const block = at / KEPT_BLOCK;
      const bits = this.#bitmap[Math.floor(block / PIECE_BLOCKS)];
      const within = block % PIECE_BLOCKS;
      if (bits === undefined) {
        if (!kept) return at;
        at += (PIECE_BLOCKS - within) * KEPT_BLOCK;
        continue;
      }
      const word = bits[within >>> 5] as number;
      if ((within & 31) === 0 && word === (kept ? 0 : ALL_KEPT)) {
        at += 32 * KEPT_BLOCK;
        continue;
      }
      if (((word >>> (within & 31)) & 1) === (kept ? 1 : 0)) return at;
      at += KEPT_BLOCK;
    }
    return end;
  }

  /** The blocks of the range are kept from now on. */
  mark(offset: number, end: number): void {
    for (let at = offset; at < end; at += KEPT_BLOCK) {
      const block = at / KEPT_BLOCK;
      const piece = Math.floor(block / PIECE_BLOCKS);
      const within = block % PIECE_BLOCKS;
      const bits = (this.#bitmap[piece] ??= new Uint32Array(PIECE_BLOCKS / 32));
      bits[within >>> 5] = (bits[within >>> 5] as number) | (1 << (within & 31));
    }
  }

  /** Write on the event loop if the disk is quick enough; false if the caller must use `write`. */
  writeNow(offset: number, data: Buffer): boolean {
    if (!this.#throttle.mayWrite()) return false;
    const start = performance.now();
    const fd = this.#fileAt(offset);
    const written = this.#disk.writeSync(fd, data, offset % FILE_BYTES);
    this.#throttle.note(start);
    return written === data.length;
  }

  async write(offset: number, data: Buffer): Promise<void> {
    const fd = this.#fileAt(offset);
    await this.#whileOpen(CHANGES, async () => {
      const start = performance.now();
      await writeFully(this.#disk, fd, data, offset % FILE_BYTES);
      this.#throttle.noteOffLoop(start);
    });
  }

  /** Fill `into` with the data written at `offset`; zeros where nothing was written. */
  read(offset: number, into: Buffer): Awaitable<void> {
    const fd = this.#files[Math.floor(offset / FILE_BYTES)];
    if (fd === undefined) {
      into.fill(0);
      return;
    }
    const done = Math.max(this.#reads.read(fd, into, offset % FILE_BYTES), 0);
    if (done < into.length)
      return this.#whileOpen(READS, () => readPadded(this.#disk, fd, into, offset % FILE_BYTES, done));
  }

  /** Free the space, as soon as no read or write is in flight. */
  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.#closeIfOver();
  }

  async #whileOpen(share: ThreadShare, work: () => Promise<void>): Promise<void> {
    if (this.#isClosed) throw new StoreError('CLOSED', 'the temporary snapshot was dropped');
    this.#busy++;
    const turn = share.enter(this);
    if (turn) await turn;
    try {
      await work();
    } finally {
      share.leave(this);
      this.#busy--;
      this.#closeIfOver();
    }
  }

  #fileAt(offset: number): number {
    if (this.#isClosed) throw new StoreError('CLOSED', 'the temporary snapshot was dropped');
    const number = Math.floor(offset / FILE_BYTES);
    return (this.#files[number] ??= this.#makeFile());
  }

  #makeFile(): number {
    const name = path.join(this.#directory, SCRATCH_NAME);
    const fd = this.#disk.openSync(name, O_RDWR | O_CREAT | O_TRUNC, 0o600);
    this.#disk.unlinkSync(name);
    return fd;
  }

  /** On the thread pool: freeing gigabytes takes the filesystem a while. */
  #closeIfOver(): void {
    if (!this.#isClosed || this.#busy > 0) return;
    for (const fd of this.#files) if (fd !== undefined) this.#disk.close(fd).catch(() => undefined);
    this.#files.length = 0;
  }
}
