/**
 * Making a directory with its parents. Not fs.mkdirSync's `recursive`: in Node 20 that never returns where mkdir(2) answers
 * ENOENT although the parent exists, as in /proc (MKDirpSync tries the parent and then the same again, for ever).
 */
import path from 'node:path';
import type { FileCalls } from './disk.js';

/** Returns whether it had to be made. Errors: those of mkdir(2); EEXIST or ENOTDIR if something else is in the way. */
export function makeDirectory(disk: FileCalls, directory: string, mode?: number): boolean {
  if (disk.statSync(directory)?.isDirectory()) return false;
  const parent = path.dirname(directory);
  if (parent !== directory && !disk.existsSync(parent)) makeDirectory(disk, parent, mode);
  try {
    disk.mkdirSync(directory, mode);
    return true;
  } catch (error) {
    // Made by somebody else meanwhile.
    if (disk.statSync(directory)?.isDirectory()) return false;
    throw error;
  }
}
