/**
 * Making the names of files and directories durable. An fsync of a file makes neither its name durable nor the name of its
 * directory (POSIX): each directory above must be synced itself.
 */
import path from 'node:path';
import { O_RDONLY, type FileCalls, type HostDisk } from './disk.js';

/** This process may not be allowed to open a directory above; and not every filesystem syncs directories. */
const CANNOT_SYNC = new Set(['EACCES', 'EPERM', 'EINVAL']);

/**
 * The names in `directory`, its own name, and the names of the directories above it, up to the root of their filesystem, are
 * durable when this resolves. `fd`: any file of that filesystem. Errors: those of the system.
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

/** The names in `directory` are durable when this returns. Errors: those of the system. */
export function syncDirectory(disk: FileCalls, directory: string): void {
  const fd = disk.openSync(directory, O_RDONLY);
  try {
    disk.fsyncSync(fd);
  } finally {
    disk.closeSync(fd);
  }
}

/** False if the directory cannot be synced. Errors: those of the disk. */
function couldSync(disk: FileCalls, directory: string): boolean {
  try {
    syncDirectory(disk, directory);
    return true;
  } catch (error) {
    if (CANNOT_SYNC.has((error as NodeJS.ErrnoException).code ?? '')) return false;
    throw error;
  }
}
