/**
 * The space that is kept for meta.mdb past its end, so that what gives space back can still be recorded when the disk is
 * full. Owns how much that is, and who may use it. Writes nothing into the file.
 */
import { O_CREAT, O_EXCL, O_WRONLY, type HostDisk } from '../../system/disk.js';
import { StoreError } from '../object-store.js';
import { MAP_SIZE } from './lmdb-environment.js';

/**
 * Kept allocated past the end of the file while the disk has it, so that what gives space back (a delete, a flush of what
 * was trimmed) can still be recorded when the disk is full.
 */
const RESERVE_BYTES = 4 * 2 ** 20;
/** It is filled up again when less than this is left. */
const REFILL_BYTES = RESERVE_BYTES / 2;
/** What makes the metadata grow for good (a new VDI, a snapshot) leaves this much of it. */
const FLOOR_BYTES = 2 ** 20;
/** A disk that is nearly full may have part of the reserve. */
const RESERVE_STEP = 256 * 1024;
/** What any transaction may need beside the pages that it stores: copies of inner pages, the list of free pages. */
const TRANSACTION_BYTES = 64 * 1024;
/** What LMDB writes into a new file. */
const FIRST_BYTES = 64 * 1024;
/** What a new store must have: it can be told then that something is deleted, whatever happens to the disk. */
const LEAST_BYTES = 2 * 2 ** 20;

export class MetadataReserve {
  readonly #disk: HostDisk;
  /** Of meta.mdb, open to be written. */
  readonly #fd: number;
  #reservedTo = 0;

  constructor(disk: HostDisk, fd: number) {
    this.#disk = disk;
    this.#fd = fd;
  }

  /** Have the reserve, or as much of it as the disk has. `size`: of the file, now; so it is below. Errors: of the system. */
  keep(size: number): void {
    if (this.#reservedTo - size >= REFILL_BYTES) return;
    for (let length = RESERVE_BYTES; length > 0 && size + length > this.#reservedTo; length -= RESERVE_STEP) {
      const reserved = this.#disk.reserveSync(this.#fd, size, length);
      if (reserved === 'done') this.#reservedTo = size + length;
      if (reserved !== 'no space') return;
    }
  }

  /** Whether the disk has no space even for a step of the reserve. Errors: of the system. */
  isDiskFull(size: number): boolean {
    return this.#disk.reserveSync(this.#fd, size, RESERVE_STEP) === 'no space';
  }

  /**
   * Before anything that makes the metadata grow by `bytes` for good: it must leave the space that deleting needs. `file`: its
   * name, for messages. Errors: NO_SPACE, with nothing changed.
   */
  mustHaveRoom(size: number, bytes: number, file: string): void {
    const needed = bytes + TRANSACTION_BYTES + FLOOR_BYTES;
    if (size + needed > MAP_SIZE) {
      throw new StoreError('NO_SPACE', `${file} cannot grow beyond ${MAP_SIZE} bytes; delete snapshots or VDIs`);
    }
    if (this.#reservedTo - size >= needed) return;
    const reserved = this.#disk.reserveSync(this.#fd, size, needed);
    if (reserved === 'done') this.#reservedTo = Math.max(this.#reservedTo, size + needed);
    if (reserved !== 'no space') return;
    throw new StoreError(
      'NO_SPACE',
      `no space left for metadata in ${file}: its disk is full, and what is reserved there is for deleting; ` +
        'delete snapshots or VDIs, or make room on that disk',
    );
  }
}

/**
 * Make an empty file that has the space to grow, before LMDB writes to it: LMDB ends the process if that fails. Without the
 * space a full disk would be one on which nothing can be deleted. Errors: NO_SPACE, and those of files.
 */
export function makeRoomIn(disk: HostDisk, file: string): void {
  const fd = disk.openSync(file, O_WRONLY | O_CREAT | O_EXCL, 0o600);
  try {
    const first = Buffer.alloc(FIRST_BYTES);
    if (disk.writeSync(fd, first, 0) < first.length || disk.reserveSync(fd, 0, LEAST_BYTES) === 'no space') {
      throw new StoreError('NO_SPACE', `no space left: a store needs ${LEAST_BYTES} bytes for its metadata`);
    }
    disk.truncateSync(fd, 0);
    disk.reserveSync(fd, 0, LEAST_BYTES); // truncating may have given it back
  } finally {
    disk.closeSync(fd);
  }
}
