/**
 * Check of an LMDB file before LMDB maps it. LMDB trusts the file: one that is not LMDB's, or is truncated, would end the
 * process instead of being an error. Reads the two meta pages, changes nothing.
 * Layout: mdb.c of the LMDB that the package `lmdb` carries (struct MDB_page, struct MDB_meta; data version 2).
 */
import { O_RDONLY, type HostDisk } from '../../system/disk.js';

const PAGE_HEADER = 24;
const MAGIC = 0xbeefc0de;
const MAGIC_AT = PAGE_HEADER;
/** md_pad of the free-list database holds the page size. */
const PAGE_SIZE_AT = PAGE_HEADER + 24;
const LAST_PAGE_AT = PAGE_HEADER + 24 + 2 * 48;
const TRANSACTION_AT = LAST_PAGE_AT + 8;
const META_BYTES = TRANSACTION_AT + 8;
const MIN_PAGE_SIZE = 512;
const MAX_PAGE_SIZE = 65_536;

/** Why `file` is not a whole LMDB file; undefined if it is one, or if it is missing or empty, which means new to LMDB. */
export function lmdbFileProblem(disk: HostDisk, file: string): string | undefined {
  const status = disk.statSync(file);
  if (!status || status.size === 0) return undefined;
  const fd = disk.openSync(file, O_RDONLY);
  try {
    const first = metaAt(disk, fd, 0);
    if (!first) return 'it is not an LMDB file';
    const second = metaAt(disk, fd, first.pageSize);
    if (!second || second.pageSize !== first.pageSize) return 'its second meta page is damaged';
    const { lastPage } = second.transaction > first.transaction ? second : first;
    const needed = (lastPage + 1) * first.pageSize;
    if (status.size < needed) return `it is truncated: ${status.size} bytes, but its data needs ${needed}`;
    return undefined;
  } finally {
    disk.closeSync(fd);
  }
}

/**
 * Make the file, open as `fd`, as long as LMDB's own count of pages says. LMDB does not write pages that a transaction takes and
 * gives back, so the file of a sound store can end before the last page, and would look truncated. Errors: those of the disk.
 */
export function extendToLastPage(disk: HostDisk, fd: number): void {
  const first = metaAt(disk, fd, 0);
  const second = first && metaAt(disk, fd, first.pageSize);
  if (!first || !second) return;
  const { lastPage } = second.transaction > first.transaction ? second : first;
  const needed = (lastPage + 1) * first.pageSize;
  if (disk.fstatSync(fd).size < needed) disk.truncateSync(fd, needed);
}

interface Meta {
  readonly pageSize: number;
  readonly lastPage: number;
  readonly transaction: bigint;
}

function metaAt(disk: HostDisk, fd: number, offset: number): Meta | undefined {
  const page = Buffer.alloc(META_BYTES);
  if (disk.readSync(fd, page, offset) < META_BYTES) return undefined;
  if (page.readUInt32LE(MAGIC_AT) !== MAGIC) return undefined;
  const pageSize = page.readUInt32LE(PAGE_SIZE_AT);
  const isPowerOfTwo = (pageSize & (pageSize - 1)) === 0;
  if (!isPowerOfTwo || pageSize < MIN_PAGE_SIZE || pageSize > MAX_PAGE_SIZE) return undefined;
  return {
    pageSize,
    lastPage: Number(page.readBigUInt64LE(LAST_PAGE_AT)),
    transaction: page.readBigUInt64LE(TRANSACTION_AT),
  };
}
