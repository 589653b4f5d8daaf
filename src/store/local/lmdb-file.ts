/**
 * Check of an LMDB file before LMDB maps it. LMDB trusts the file: one that is not LMDB's, is truncated, or has a damaged page
 * would end the process instead of being an error. Reads every page that LMDB's trees refer to (lmdb-pages.ts), changes nothing.
 * LMDB has no checksums: a value that is damaged is not found here.
 */
import { O_RDONLY, type HostDisk } from '../../system/disk.js';
import { pagesOfFile, readMeta, structureProblem } from './lmdb-pages.js';

/** Why `file` is not a whole LMDB file; undefined if it is one, or if it is missing or empty, which means new to LMDB. */
export async function lmdbFileProblem(disk: HostDisk, file: string): Promise<string | undefined> {
  const status = disk.statSync(file);
  if (!status || status.size === 0) return undefined;
  const fd = disk.openSync(file, O_RDONLY);
  try {
    const { states, problem } = readMeta(disk, fd);
    if (problem !== undefined) return problem;
    const [state] = states;
    if (state === undefined) return 'it is not an LMDB file';
    const needed = state.pages * state.pageSize;
    if (status.size < needed) return `it is truncated: ${status.size} bytes, but its data needs ${needed}`;
    return await structureProblem(pagesOfFile(disk, fd, state.pageSize), state);
  } finally {
    disk.closeSync(fd);
  }
}

/**
 * Make the file, open as `fd`, as long as LMDB's own count of pages says. LMDB does not write pages that a transaction takes and
 * gives back, so the file of a sound store can end before the last page, and would look truncated. Errors: those of the disk.
 */
export function extendToLastPage(disk: HostDisk, fd: number): void {
  const { states, problem } = readMeta(disk, fd);
  const [newest] = states;
  if (problem !== undefined || newest === undefined) return;
  const needed = newest.pages * newest.pageSize;
  if (disk.fstatSync(fd).size < needed) disk.truncateSync(fd, needed);
}
