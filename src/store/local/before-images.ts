/**
 * What blocks of a disk held at one moment, kept for those that were overwritten since: sparse scratch files without a
 * name, so that whatever ends the process ends them too, and a bitmap of the 4 KiB blocks that are in them. Addressed by
 * disk offset. Decides nothing about when a block must be kept; whoever writes it here does so once, before it changes.
 */
import path from 'node:path';
import { O_CREAT, O_RDWR, O_TRUNC, removeIfThereSync, type HostDisk } from '../../system/disk.js';
import { readPadded, writeFully } from '../../system/whole-io.js';
import { StoreError, type Awaitable } from '../object-store.js';
import type { CachedReads } from './cached-reads.js';
import { CHANGES, READS, type ThreadShare } from './thread-shares.js';
import type { WriteThrottle } from './write-throttle.js';

export const KEPT_BLOCK = 4096;
/** Bits of one piece of the bitmap, 16 KiB: a disk pays for the parts that are written. */
const PIECE_BLOCKS = 2 ** 17;
/** A word of the bitmap. */
const ALL_KEPT = 0xffff_ffff;
/** Disk behind one scratch file: filesystems bound the size of a file (ext4: 16 TiB with 4 KiB blocks). */
const FILE_BYTES = 2 ** 40;
/** Its name for the moment between making and unlinking it. */
const SCRATCH_NAME = 'scratch';

/** Remove what a process that was killed in that moment has left in the store `directory`. */
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
  /** Reads and writes on the thread pool; while there are any the files stay open. */
  #busy = 0;
  #isClosed = false;

  /** `reads` and `throttle`: of the filesystem that the directory is on, and of its disk. */
  constructor(disk: HostDisk, directory: string, reads: CachedReads, throttle: WriteThrottle) {
    this.#disk = disk;
    this.#throttle = throttle;
    this.#directory = directory;
    this.#reads = reads;
  }

  /** The first block at or after `offset`, up to `end`, that is kept or not: its offset, or `end`. Both are multiples of 4 KiB. */
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

  /** From here on the blocks of the range are read from here. */
  mark(offset: number, end: number): void {
    for (let at = offset; at < end; at += KEPT_BLOCK) {
      const block = at / KEPT_BLOCK;
      const piece = Math.floor(block / PIECE_BLOCKS);
      const within = block % PIECE_BLOCKS;
      const bits = (this.#bitmap[piece] ??= new Uint32Array(PIECE_BLOCKS / 32));
      bits[within >>> 5] = (bits[within >>> 5] as number) | (1 << (within & 31));
    }
  }

  /** Write at once if that holds the loop for no longer than a copy; false if it must be done with `write`. */
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

  /** Fill `into` with what was written at `offset`; zeros where nothing was. */
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

  /** Give the space back, as soon as nobody reads or writes. */
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

  /** On the thread pool: the filesystem takes its time to free gigabytes. */
  #closeIfOver(): void {
    if (!this.#isClosed || this.#busy > 0) return;
    for (const fd of this.#files) if (fd !== undefined) this.#disk.close(fd).catch(() => undefined);
    this.#files.length = 0;
  }
}
