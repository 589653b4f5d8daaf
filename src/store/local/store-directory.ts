/**
 * What a directory is before a store is opened or created in it: a store, empty, our own unfinished creation, or something
 * else. A store has all its parts before meta.mdb gets its name, so a directory with that name is a store. Changes nothing,
 * except that it removes an unfinished creation.
 */
import path from 'node:path';
import { removeIfThereSync, type FileStatus, type HostDisk } from '../../system/disk.js';
import { StoreError } from '../store-error.js';
import { OPENING_NAMES } from './lmdb-environment.js';
import { META_FILE, NEW_META_FILE } from './metadata.js';
import { changesFiles } from './change-record.js';
import { COPIES, copyFiles } from './metadata-copies.js';
import { rescueOf } from './rescue-advice.js';

/** mkfs creates it in the root of a filesystem. */
const LOST_AND_FOUND = 'lost+found';
const SCRATCH = 'scratch';
const LOCK = 'lock';
/** A lock file never has more. */
const MAX_LOCK_BYTES = 64;

/**
 * The parts that the creation of a store makes before meta.mdb has its name, and meta.mdb of older versions, which had its name
 * at once. Each is tested by more than its name: other people have folders called "objects" and files called "lock", too.
 */
const MADE_BY_CREATION: Readonly<Record<string, (disk: HostDisk, file: string, status: FileStatus) => boolean>> = {
  [LOCK]: (_disk, _file, status) => status.isFile() && status.size <= MAX_LOCK_BYTES,
  objects: (disk, file, status) =>
    status.isDirectory() && readNames(disk, file).every((name) => isOfObjects(disk, file, name)),
  recent: (disk, file, status) => status.isDirectory() && isEmptyFolder(disk, file),
  overlays: (disk, file, status) => status.isDirectory() && isEmptyFolder(disk, file),
  [NEW_META_FILE]: (_disk, _file, status) => status.isFile(),
  [META_FILE]: (_disk, _file, status) => status.isFile() && status.size === 0,
  [`${META_FILE}-lock`]: (_disk, _file, status) => status.isFile(),
  ...Object.fromEntries(
    OPENING_NAMES.map((name) => [
      name,
      (_disk: HostDisk, _file: string, status: FileStatus) => status.isSymbolicLink(),
    ]),
  ),
};
const FOLDERS = new Set(['objects', 'recent', 'overlays']);
/** ObjectFiles.open creates empty folders and, for a moment, a scratch file of two pages. */
const MAX_SCRATCH_BYTES = 8192;
/** All names in a store. A directory with objects and only these names is a damaged store: no new one is created over it. */
const OF_A_STORE = new Set([...Object.keys(MADE_BY_CREATION), COPIES, 'set-aside', 'control.sock']);

export type DirectoryState = 'missing' | 'empty' | 'unfinished' | 'store';

/**
 * Errors: NO_STORE (not a directory, or with other content), DAMAGED (a store that has lost its metadata), and those of the
 * disk.
 */
export function directoryState(disk: HostDisk, directory: string): DirectoryState {
  const status = disk.statSync(directory);
  if (!status) return 'missing';
  if (!status.isDirectory()) throw new StoreError('NO_STORE', `${directory} is not a directory, so it is not a store`);
  const names = disk.readdirSync(directory).filter((name) => name !== LOST_AND_FOUND);
  if (names.length === 0) return 'empty';
  const metadata = disk.statSync(path.join(directory, META_FILE));
  if (metadata?.isFile() && metadata.size > 0) return 'store';
  if (hasCopies(disk, directory) || (names.every((name) => OF_A_STORE.has(name)) && hasObjects(disk, directory))) {
    throw new StoreError(
      'DAMAGED',
      `${path.join(directory, META_FILE)} is ${metadata ? 'empty' : 'missing'}, and the rest of a store is there: ` +
        rescueOf(directory),
    );
  }
  const foreign = names.find((name) => !isOfCreation(disk, directory, name));
  if (foreign !== undefined) {
    throw new StoreError(
      'NO_STORE',
      `no store in ${directory}, and none can be made there: it is not empty (it has ${JSON.stringify(foreign)})`,
    );
  }
  return 'unfinished';
}

function isOfCreation(disk: HostDisk, directory: string, name: string): boolean {
  const file = path.join(directory, name);
  const status = disk.lstatSync(file);
  // Gone again: another process is creating a store.
  return status === undefined || (MADE_BY_CREATION[name]?.(disk, file, status) ?? false);
}

/** Whether there are object files or logs of a store. */
function hasObjects(disk: HostDisk, directory: string): boolean {
  const objects = path.join(directory, 'objects');
  const isObject = (name: string): boolean => /^[0-9a-f]{16}$/.test(name);
  const folders = readNames(disk, objects).filter((name) => /^[0-9a-f]{2}$/.test(name));
  if (folders.some((name) => readNames(disk, path.join(objects, name)).some(isObject))) return true;
  if (readNames(disk, path.join(directory, 'overlays')).some(isObject)) return true;
  return readNames(disk, path.join(directory, 'recent')).some((name) => /^\d+$/.test(name));
}

/** Whether there are copies of a store's metadata, or changes since one: nothing else has such names. */
function hasCopies(disk: HostDisk, directory: string): boolean {
  const names = readNames(disk, path.join(directory, COPIES));
  return copyFiles(names).length > 0 || changesFiles(names).length > 0;
}

function isOfObjects(disk: HostDisk, objects: string, name: string): boolean {
  const file = path.join(objects, name);
  const status = disk.lstatSync(file);
  if (status === undefined) return true; // gone again, as in isOfCreation
  if (/^[0-9a-f]{2}$/.test(name)) return status.isDirectory() && isEmptyFolder(disk, file);
  return name === SCRATCH && status.isFile() && status.size <= MAX_SCRATCH_BYTES;
}

function isEmptyFolder(disk: HostDisk, directory: string): boolean {
  return readNames(disk, directory).length === 0;
}

function readNames(disk: HostDisk, directory: string): string[] {
  try {
    return disk.readdirSync(directory);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT') return [];
    if (code === 'ENOTDIR') return [directory];
    throw error;
  }
}

/**
 * Remove the parts that the creation of a store has made in `directory`, and `directory` itself if `hasMade`. Removes only
 * parts that a creation makes, and only empty folders. To be called with the lock held: the lock file goes last, so that other
 * processes find the store locked meanwhile. Best effort.
 */
export function removeCreation(disk: HostDisk, directory: string, hasMade: boolean): void {
  try {
    // If meta.mdb has its name, the store is complete, but new and empty.
    removeIfThereSync(disk, path.join(directory, META_FILE));
    for (const name of [...Object.keys(MADE_BY_CREATION).filter((each) => each !== LOCK), LOCK]) {
      const file = path.join(directory, name);
      if (!disk.lstatSync(file) || !isOfCreation(disk, directory, name)) continue;
      if (name === 'objects') {
        removeIfThereSync(disk, path.join(file, SCRATCH));
        for (const each of readNames(disk, file)) disk.rmdirSync(path.join(file, each));
      }
      if (FOLDERS.has(name)) disk.rmdirSync(file);
      else disk.unlinkSync(file);
    }
    if (hasMade) disk.rmdirSync(directory);
  } catch {
    // The next creation finishes it.
  }
}
