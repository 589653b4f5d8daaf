/**
 * Reads on the event loop, from files on the store's filesystem: only data in the page cache, so that the loop never waits
 * for the disk. Owns the knowledge whether that filesystem supports such reads.
 */
import { NOT_SUPPORTED, type HostDisk } from '../../system/disk.js';

export class CachedReads {
  readonly #disk: HostDisk;
  readonly #isPlain: boolean;
  #canRefuseToWait = true;

  /** `isPlain`: all data of this filesystem is in memory, so a plain read does not wait (tmpfs, which refuses RWF_NOWAIT). */
  constructor(disk: HostDisk, isPlain: boolean) {
    this.#disk = disk;
    this.#isPlain = isPlain;
  }

  /** Returns how many bytes were read without waiting, from the start of `into`. */
  read(fd: number, into: Buffer, offset: number): number {
    if (this.#isPlain) return this.#disk.readSync(fd, into, offset);
    if (!this.#canRefuseToWait) return 0;
    const done = this.#disk.readCachedSync(fd, into, offset);
    if (done === NOT_SUPPORTED) this.#canRefuseToWait = false;
    return Math.max(done, 0);
  }

  /** Whether the byte can be read without waiting. */
  has(fd: number, offset: number): boolean {
    if (this.#isPlain) return true;
    return this.#canRefuseToWait && this.#disk.readCachedSync(fd, PROBE, offset) === 1;
  }
}

const PROBE = Buffer.alloc(1);
