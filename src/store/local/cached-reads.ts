/**
 * Reads on the event loop, of files on the store's filesystem: only what the page cache has, so that the loop never waits for
 * the disk. Owns the knowledge of how that filesystem can be read so.
 */
import { NOT_SUPPORTED, type HostDisk } from '../../system/disk.js';

export class CachedReads {
  readonly #disk: HostDisk;
  readonly #isPlain: boolean;
  #canRefuseToWait = true;

  /** `isPlain`: nothing on this filesystem is ever cold, so a plain read does not wait (tmpfs, which refuses RWF_NOWAIT). */
  constructor(disk: HostDisk, isPlain: boolean) {
    this.#disk = disk;
    this.#isPlain = isPlain;
  }

  /** Bytes that are there at once; as a count from the start of `into`. */
  read(fd: number, into: Buffer, offset: number): number {
    if (this.#isPlain) return this.#disk.readSync(fd, into, offset);
    if (!this.#canRefuseToWait) return 0;
    const done = this.#disk.readCachedSync(fd, into, offset);
    if (done === NOT_SUPPORTED) this.#canRefuseToWait = false;
    return Math.max(done, 0);
  }

  /** Whether the byte can be read without a wait, or need not be. */
  has(fd: number, offset: number): boolean {
    if (this.#isPlain) return true;
    return this.#canRefuseToWait && this.#disk.readCachedSync(fd, PROBE, offset) === 1;
  }
}

const PROBE = Buffer.alloc(1);
