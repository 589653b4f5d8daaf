/** An open file together with its disk. Owns the descriptor, and closes it once. */
import type { FileStatus, HostDisk } from './disk.js';
import { readPadded, readToEnd, writeFully } from './whole-io.js';

export class OpenFile {
  readonly #disk: HostDisk;
  #fd: number;

  constructor(disk: HostDisk, fd: number) {
    this.#disk = disk;
    this.#fd = fd;
  }

  /** -1 after close. */
  get fd(): number {
    return this.#fd;
  }

  status(): FileStatus {
    return this.#disk.fstatSync(this.#fd);
  }

  /** Returns how much of `into` is filled: less than all of it if the file ends. */
  readToEnd(into: Buffer, offset: number): Promise<number> {
    return readToEnd(this.#disk, this.#fd, into, offset);
  }

  /** Bytes behind the end of the file are zeros. */
  readPadded(into: Buffer, offset: number): Promise<void> {
    return readPadded(this.#disk, this.#fd, into, offset);
  }

  /** All of `data`. */
  write(data: Buffer, offset: number): Promise<void> {
    return writeFully(this.#disk, this.#fd, data, offset);
  }

  truncate(size: number): Promise<void> {
    return this.#disk.truncate(this.#fd, size);
  }

  punchHole(offset: number, length: number): Promise<boolean> {
    return this.#disk.punchHole(this.#fd, offset, length);
  }

  /** The next byte at or after `offset` that holds data; -1 if only a hole follows. */
  nextData(offset: number): Promise<number> {
    return this.#disk.nextData(this.#fd, offset);
  }

  dropCached(): Promise<void> {
    return this.#disk.dropCached(this.#fd);
  }

  /** Data and metadata. fsync(2). */
  sync(): Promise<void> {
    return this.#disk.fsync(this.#fd);
  }

  /** False if another process holds the lock. */
  tryLock(): boolean {
    return this.#disk.tryLockSync(this.#fd);
  }

  async close(): Promise<void> {
    const fd = this.#fd;
    if (fd < 0) return;
    this.#fd = -1;
    await this.#disk.close(fd);
  }
}
