/**
 * Creating a directory with its parents. Not by fs.mkdirSync's `recursive`: in Node 20 it never returns if mkdir(2) answers
 * ENOENT although the parent exists, as in /proc (MKDirpSync tries the parent, then the same directory again, for ever).
 */
import path from 'node:path';
import type { FileCalls } from './disk.js';

/** Returns whether the directory is new. Errors: those of mkdir(2); EEXIST or ENOTDIR if something else has the name. */
export function makeDirectory(disk: FileCalls, directory: string, mode?: number): boolean {
  if (disk.statSync(directory)?.isDirectory()) return false;
  const parent = path.dirname(directory);
  if (parent !== directory && !disk.existsSync(parent)) makeDirectory(disk, parent, mode);
  try {
    disk.mkdirSync(directory, mode);
    return true;
  } catch (error) {
    // Another process has created it meanwhile.
    if (disk.statSync(directory)?.isDirectory()) return false;
    throw error;
  }
}
