/**
 * Making a directory with its parents. Not fs.mkdirSync's `recursive`: in Node 20 that never returns where mkdir(2) answers
 * ENOENT although the parent exists, as in /proc (MKDirpSync tries the parent and then the same again, for ever).
 */
import fs from 'node:fs';
import path from 'node:path';

/** Returns whether it had to be made. Errors: those of mkdir(2); EEXIST or ENOTDIR if something else is in the way. */
export function makeDirectory(directory: string, mode?: number): boolean {
  if (fs.statSync(directory, { throwIfNoEntry: false })?.isDirectory()) return false;
  const parent = path.dirname(directory);
  if (parent !== directory && !fs.existsSync(parent)) makeDirectory(parent, mode);
  try {
    fs.mkdirSync(directory, { mode });
    return true;
  } catch (error) {
    // Made by somebody else meanwhile.
    if (fs.statSync(directory, { throwIfNoEntry: false })?.isDirectory()) return false;
    throw error;
  }
}
