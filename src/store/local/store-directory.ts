/**
 * What a directory is before a store is opened or made in it: a store, empty, our own unfinished creation, or somebody
 * else's. A store has all of its parts before meta.mdb gets its name, so whatever has that name is a store. Looks only,
 * except for removing what an unfinished creation has left.
 */
import fs from 'node:fs';
import path from 'node:path';
import { StoreError } from '../object-store.js';
import { OPENING_NAMES } from './lmdb-environment.js';
import { META_FILE, NEW_META_FILE } from './metadata.js';

/** Made by mkfs in the root of a filesystem. */
const LOST_AND_FOUND = 'lost+found';
/** The names that making a store makes; nothing else may be there before. */
const MADE_BY_CREATION: ReadonlySet<string> = new Set([
  'lock',
  'objects',
  'recent',
  'scratch',
  ...OPENING_NAMES,
  NEW_META_FILE,
  // of a sheepgate that gave meta.mdb its name at once
  META_FILE,
  `${META_FILE}-lock`,
  // of a daemon that was killed
  'control.sock',
]);

export type DirectoryState = 'missing' | 'empty' | 'unfinished' | 'store';

/**
 * Errors: NO_STORE if it is not a directory, or holds what is not of a store; DAMAGED if it is a store that has lost its
 * metadata; PERMISSION, IO.
 */
export function directoryState(directory: string): DirectoryState {
  const status = fs.statSync(directory, { throwIfNoEntry: false });
  if (!status) return 'missing';
  if (!status.isDirectory()) throw new StoreError('NO_STORE', `${directory} is not a directory, so it is no store`);
  const names = fs.readdirSync(directory).filter((name) => name !== LOST_AND_FOUND);
  if (names.length === 0) return 'empty';
  const metadata = fs.statSync(path.join(directory, META_FILE), { throwIfNoEntry: false });
  if (metadata !== undefined && metadata.size > 0) return 'store';
  const foreign = names.find((name) => !MADE_BY_CREATION.has(name));
  if (foreign !== undefined) {
    throw new StoreError(
      'NO_STORE',
      `no store in ${directory}, and none can be made there: it is not empty (it has ${JSON.stringify(foreign)})`,
    );
  }
  if (hasObjects(directory)) {
    throw new StoreError(
      'DAMAGED',
      `${directory} has objects of a store, but ${META_FILE} is ${metadata ? 'empty' : 'missing'}: restore it from a backup`,
    );
  }
  return 'unfinished';
}

function hasObjects(directory: string): boolean {
  const objects = path.join(directory, 'objects');
  for (const name of readNames(objects)) {
    if (name === 'scratch') continue; // of finding out what the filesystem can do
    if (!/^[0-9a-f]{2}$/.test(name) || readNames(path.join(objects, name)).length > 0) return true;
  }
  return readNames(path.join(directory, 'recent')).length > 0;
}

function readNames(directory: string): string[] {
  try {
    return fs.readdirSync(directory);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT') return [];
    if (code === 'ENOTDIR') return [directory];
    throw error;
  }
}

/** Remove what a creation that failed has made in `directory`, and that itself if `hasMade`. Best effort. */
export function removeCreation(directory: string, hasMade: boolean): void {
  try {
    for (const name of MADE_BY_CREATION) fs.rmSync(path.join(directory, name), { recursive: true, force: true });
    if (hasMade) fs.rmdirSync(directory);
  } catch {
    // The next creation finishes it.
  }
}
