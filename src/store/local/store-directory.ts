/**
 * What a directory is before a store is opened or made in it: a store, empty, our own unfinished creation, or somebody
 * else's. A store has all of its parts before meta.mdb gets its name, so whatever has that name is a store. Looks only,
 * except for removing what an unfinished creation has left.
 */
import path from 'node:path';
import { removeIfThereSync, type FileStatus, type HostDisk } from '../../system/disk.js';
import { StoreError } from '../object-store.js';
import { OPENING_NAMES } from './lmdb-environment.js';
import { META_FILE, NEW_META_FILE } from './metadata.js';

/** Made by mkfs in the root of a filesystem. */
const LOST_AND_FOUND = 'lost+found';
const SCRATCH = 'scratch';
const LOCK = 'lock';
/** More than a lock file ever says. */
const MAX_LOCK_BYTES = 64;

/**
 * What making a store makes before meta.mdb has its name, and an older sheepgate's meta.mdb, which had it at once. Judged
 * by more than the name: folders called "objects" and files called "lock" are other people's, too.
 */
const MADE_BY_CREATION: Readonly<Record<string, (disk: HostDisk, file: string, status: FileStatus) => boolean>> = {
  [LOCK]: (_disk, _file, status) => status.isFile() && status.size <= MAX_LOCK_BYTES,
  objects: (disk, file, status) =>
    status.isDirectory() && readNames(disk, file).every((name) => isOfObjects(disk, file, name)),
  recent: (disk, file, status) => status.isDirectory() && isEmptyFolder(disk, file),
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
/** What ObjectFiles.open makes: empty folders, and for a moment a file of two pages. */
const MAX_SCRATCH_BYTES = 8192;
/** Of a store that is older than what is left of it; said so, and never made anew over it. */
const OF_A_STORE = new Set([...Object.keys(MADE_BY_CREATION), 'set-aside', 'control.sock']);

export type DirectoryState = 'missing' | 'empty' | 'unfinished' | 'store';

/**
 * Errors: NO_STORE if it is not a directory, or holds what is not of a store; DAMAGED if it is a store that has lost its
 * metadata; PERMISSION, IO.
 */
export function directoryState(disk: HostDisk, directory: string): DirectoryState {
  const status = disk.statSync(directory);
  if (!status) return 'missing';
  if (!status.isDirectory()) throw new StoreError('NO_STORE', `${directory} is not a directory, so it is no store`);
  const names = disk.readdirSync(directory).filter((name) => name !== LOST_AND_FOUND);
  if (names.length === 0) return 'empty';
  const metadata = disk.statSync(path.join(directory, META_FILE));
  if (metadata?.isFile() && metadata.size > 0) return 'store';
  if (names.every((name) => OF_A_STORE.has(name)) && hasObjects(disk, directory)) {
    throw new StoreError(
      'DAMAGED',
      `${directory} has objects of a store, but ${META_FILE} is ${metadata ? 'empty' : 'missing'}: restore it from a backup`,
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
  // Gone again: another process is making one.
  return status === undefined || (MADE_BY_CREATION[name]?.(disk, file, status) ?? false);
}

/** Files where a store has them. */
function hasObjects(disk: HostDisk, directory: string): boolean {
  const objects = path.join(directory, 'objects');
  const isObject = (name: string): boolean => /^[0-9a-f]{16}$/.test(name);
  const folders = readNames(disk, objects).filter((name) => /^[0-9a-f]{2}$/.test(name));
  if (folders.some((name) => readNames(disk, path.join(objects, name)).some(isObject))) return true;
  return readNames(disk, path.join(directory, 'recent')).some((name) => /^\d+$/.test(name));
}

function isOfObjects(disk: HostDisk, objects: string, name: string): boolean {
  const file = path.join(objects, name);
  if (/^[0-9a-f]{2}$/.test(name)) return isEmptyFolder(disk, file);
  const status = disk.lstatSync(file);
  return name === SCRATCH && status?.isFile() === true && status.size <= MAX_SCRATCH_BYTES;
}

function isEmptyFolder(disk: HostDisk, directory: string): boolean {
  return disk.lstatSync(directory)?.isDirectory() === true && readNames(disk, directory).length === 0;
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
 * Remove what making a store has made in `directory`, and that itself if `hasMade`. Only what it could have made, and
 * folders only if they are empty. To be called with the lock held: that goes last, so that whoever comes meanwhile finds it
 * taken. Best effort.
 */
export function removeCreation(disk: HostDisk, directory: string, hasMade: boolean): void {
  try {
    // It has its name only when it is complete; then the store was new, and nothing is in it.
    removeIfThereSync(disk, path.join(directory, META_FILE));
    for (const name of [...Object.keys(MADE_BY_CREATION).filter((each) => each !== LOCK), LOCK]) {
      const file = path.join(directory, name);
      if (!disk.lstatSync(file) || !isOfCreation(disk, directory, name)) continue;
      if (name === 'objects') {
        removeIfThereSync(disk, path.join(file, SCRATCH));
        for (const each of readNames(disk, file)) disk.rmdirSync(path.join(file, each));
      }
      if (name === 'objects' || name === 'recent') disk.rmdirSync(file);
      else disk.unlinkSync(file);
    }
    if (hasMade) disk.rmdirSync(directory);
  } catch {
    // The next creation finishes it.
  }
}
