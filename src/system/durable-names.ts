/**
 * Making the name of a directory durable. POSIX promises of an fsync of a file nothing about its name, nor about that of
 * the directory that it is in: each directory above has to be synced itself.
 */
import path from 'node:path';
import { O_RDONLY, type FileCalls, type HostDisk } from './disk.js';

/** A directory above may not be ours to open; and not every filesystem syncs directories. */
const CANNOT_SYNC = new Set(['EACCES', 'EPERM', 'EINVAL']);

/**
 * What is in `directory`, its own name and those of the directories above it, up to the root of their filesystem, are on
 * stable storage when this resolves. `fd`: some file of that filesystem. Errors: those of the system.
 */
export async function makeNamesDurable(disk: HostDisk, directory: string, fd: number): Promise<void> {
  let at = disk.realpathSync(directory);
  const dev = disk.statSync(at)?.dev;
  let needsMore = false;
  for (let above = path.dirname(at); ; above = path.dirname(at)) {
    if (!couldSync(disk, at)) needsMore = true;
    if (above === at || disk.statSync(above)?.dev !== dev) break;
    at = above;
  }
  if (needsMore) await disk.syncfs(fd);
}

/** The names in it are on stable storage when this returns. Errors: those of the system. */
export function syncDirectory(disk: FileCalls, directory: string): void {
  const fd = disk.openSync(directory, O_RDONLY);
  try {
    disk.fsyncSync(fd);
  } finally {
    disk.closeSync(fd);
  }
}

/** False if it cannot be done. */
function couldSync(disk: FileCalls, directory: string): boolean {
  try {
    syncDirectory(disk, directory);
    return true;
  } catch (error) {
    if (CANNOT_SYNC.has((error as NodeJS.ErrnoException).code ?? '')) return false;
    throw error;
  }
}
