/** Pages of a map, as meta.mdb stores them (FORMAT.md, `pages`). Owns their size and their layout. Stores nothing. */
import os from 'node:os';

/** Map entries of one stored page, 4 KiB: a new object rewrites little, and a full map has few pages. */
export const PAGE_ENTRIES = 1024;
/** Bytes in meta.mdb: a stored page needs two pages of LMDB, because it has a header. */
const STORED_PAGE_BYTES = 2 * 4096;

/** A page of a map, to be stored; a page of zeros is removed. */
export interface PageWrite {
  readonly vid: number;
  readonly page: number;
  readonly entries: Buffer;
}

const ZERO_PAGE = Buffer.alloc(PAGE_ENTRIES * 4);

// Map pages are stored as they are in memory (FORMAT.md: little-endian): a map of 1 TiB is copied, not converted.
if (os.endianness() !== 'LE') throw new Error('the local store needs a little-endian machine');

/** A copy of the entries of one page of a map: the map may change while the copy is being stored. */
export function pageOf(map: Uint32Array, page: number): Buffer {
  const copy = new Uint32Array(PAGE_ENTRIES);
  copy.set(map.subarray(page * PAGE_ENTRIES, (page + 1) * PAGE_ENTRIES));
  return Buffer.from(copy.buffer);
}

/** All pages of a map, including pages of zeros: storing those removes pages that a failed operation may have left. */
export function pagesOf(vid: number, map: Uint32Array): PageWrite[] {
  const pages: PageWrite[] = [];
  for (let page = 0; page * PAGE_ENTRIES < map.length; page++) pages.push({ vid, page, entries: pageOf(map, page) });
  return pages;
}

/** Whether a page is all zeros: such pages are not stored. */
export function isEmptyPage(entries: Buffer): boolean {
  return entries.equals(ZERO_PAGE);
}

/** What the stored pages of a map take of meta.mdb, in bytes. */
export function storedBytes(map: Uint32Array): number {
  return storedPages(map) * STORED_PAGE_BYTES;
}

/** How many pages of a map are stored: those that are not all zeros. */
function storedPages(map: Uint32Array): number {
  let pages = 0;
  for (let idx = 0; idx < map.length; idx++) {
    if (map[idx] === 0) continue;
    pages++;
    idx |= PAGE_ENTRIES - 1; // on to the next page
  }
  return pages;
}
