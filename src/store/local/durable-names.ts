/**
 * Making the name of a directory durable. POSIX promises of an fsync of a file nothing about its name, nor about that of
 * the directory that it is in: each directory above has to be synced itself.
 */
import fs from 'node:fs';
import path from 'node:path';
import * as libc from './libc.js';

/** A directory above may not be ours to open; and not every filesystem syncs directories. */
const CANNOT_SYNC = new Set(['EACCES', 'EPERM', 'EINVAL']);

/**
 * What is in `directory`, its own name and those of the directories above it, up to the root of their filesystem, are on
 * stable storage when this resolves. `fd`: some file of that filesystem. Errors: those of the system.
 */
export async function makeNamesDurable(directory: string, fd: number): Promise<void> {
  let at = fs.realpathSync(directory);
  const { dev } = fs.statSync(at);
  let needsMore = false;
  for (let above = path.dirname(at); ; above = path.dirname(at)) {
    if (!couldSync(at)) needsMore = true;
    if (above === at || fs.statSync(above).dev !== dev) break;
    at = above;
  }
  if (needsMore) await libc.syncFilesystem(fd);
}

/** The names in it are on stable storage when this returns. Errors: those of the system. */
export function syncDirectory(directory: string): void {
  const fd = fs.openSync(directory, fs.constants.O_RDONLY);
  try {
    fs.fsyncSync(fd);
  } finally {
    fs.closeSync(fd);
  }
}

/** False if it cannot be done. */
function couldSync(directory: string): boolean {
  try {
    syncDirectory(directory);
    return true;
  } catch (error) {
    if (CANNOT_SYNC.has((error as NodeJS.ErrnoException).code ?? '')) return false;
    throw error;
  }
}
