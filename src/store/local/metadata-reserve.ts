/**
 * Disk space that is kept allocated past the end of meta.mdb, so that operations that free space can still be recorded on a
 * full disk. Owns the size of the reserve and the rule which operations may use it. Does not change the content of the file.
 */
import { O_CREAT, O_EXCL, O_WRONLY, type HostDisk } from '../../system/disk.js';
import { StoreError } from '../store-error.js';
import { MAP_SIZE } from './lmdb-environment.js';

/**
 * Kept allocated past the end of the file, so that operations that free space (a delete, a flush after trims) can still be
 * recorded on a full disk.
 */
const RESERVE_BYTES = 4 * 2 ** 20;
/** The reserve is filled up again when less than this is left. */
const REFILL_BYTES = RESERVE_BYTES / 2;
/** Operations that make the metadata grow for good (a new VDI, a snapshot) must leave this much of it. */
const FLOOR_BYTES = 2 ** 20;
/** The reserve shrinks by this step where the disk has no room for all of it. */
const RESERVE_STEP = 256 * 1024;
/** What a transaction may need in addition to the pages that it stores: copies of inner pages, the list of free pages. */
const TRANSACTION_BYTES = 64 * 1024;
/** What LMDB writes into a new file. */
const FIRST_BYTES = 64 * 1024;
/** A new store must have this much: then a delete can be recorded even if the disk becomes full. */
const LEAST_BYTES = 2 * 2 ** 20;

export class MetadataReserve {
  readonly #disk: HostDisk;
  /** meta.mdb, open for writing. */
  readonly #fd: number;
  #reservedTo = 0;

  constructor(disk: HostDisk, fd: number) {
    this.#disk = disk;
    this.#fd = fd;
  }

  /** Allocate the reserve, or as much as the disk has. `size`, here and below: of the file, now. Errors: those of the disk. */
  keep(size: number): void {
    if (this.#reservedTo - size >= REFILL_BYTES) return;
    for (let length = RESERVE_BYTES; length > 0 && size + length > this.#reservedTo; length -= RESERVE_STEP) {
      const reserved = this.#disk.reserveSync(this.#fd, size, length);
      if (reserved === 'done') this.#reservedTo = size + length;
      if (reserved !== 'no space') return;
    }
  }

  /** Whether the disk has no space even for one step of the reserve. Errors: those of the disk. */
  isDiskFull(size: number): boolean {
    return this.#disk.reserveSync(this.#fd, size, RESERVE_STEP) === 'no space';
  }

  /**
   * To be called before an operation that makes the metadata grow by `bytes` for good: the space for deleting must be left.
   * `file`: its name, for messages. Errors: NO_SPACE, with nothing changed.
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
      `no space left for metadata in ${file}: its disk is full, and the reserve is for deleting; ` +
        'delete snapshots or VDIs, or make room on that disk',
    );
  }
}

/**
 * Create an empty file with allocated space, before LMDB writes to it: LMDB ends the process if a write fails. Without the
 * space nothing could be deleted on a full disk. Errors: NO_SPACE, and those of the disk.
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
