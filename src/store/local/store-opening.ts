/**
 * Locking a directory to open or create a store in it: whether it is a store, whether it can be written, and the message if it
 * cannot be had. Opens nothing of the store except its lock.
 */
import type { HostDisk } from '../../system/disk.js';
import { StoreError } from '../store-error.js';
import { isSystemError, systemMessage, whatFailed } from '../../system/system-error.js';
import { makeDirectory } from '../../system/make-directory.js';
import { makeLogFolder } from './map-logs.js';
import { Owners } from './file-owners.js';
import { directoryState } from './store-directory.js';
import { asStoreError } from './store-errors.js';
import { StoreLock, type HolderRole } from './store-lock.js';

/** `error` as the StoreError of opening the store; says what to do if files belong to another user. */
export function openingError(disk: HostDisk, location: string, error: unknown): StoreError {
  const doing = `opening store ${location}`;
  const failure = asStoreError(error, doing);
  const { code } = failure;
  if (code === 'PERMISSION') {
    let problem: string | undefined;
    try {
      const owners = new Owners(disk, location);
      owners.noteParts();
      ({ problem } = owners);
    } catch {
      // The directory itself may be closed to us.
    }
    if (problem !== undefined) {
      const what = isSystemError(error) ? `${doing}: ${whatFailed(error)}` : failure.message;
      return new StoreError(code, `${what}; ${problem}`, { cause: error });
    }
  }
  if (!isSystemError(error)) return failure;
  return new StoreError(code, `${doing}: ${systemMessage(error)}`, { cause: error });
}

/** A directory that this process has locked, to open or create a store in it. */
export interface Found {
  readonly lock: StoreLock;
  readonly isNew: boolean;
  readonly hasMadeDirectory: boolean;
  readonly isReadOnly: boolean;
}

/** Errors: NO_STORE, LOCKED, DAMAGED, and those of the disk. */
export function lockDirectory(
  disk: HostDisk,
  location: string,
  { role = 'command', mayCreate = true }: { readonly role?: HolderRole; readonly mayCreate?: boolean },
): Found {
  if (directoryState(disk, location) !== 'store') {
    if (!mayCreate) {
      const error = noStore(disk, location, role);
      // Another process may have completed one while we looked.
      if (directoryState(disk, location) !== 'store') throw error;
      return lockDirectory(disk, location, { role, mayCreate });
    }
    const hasMadeDirectory = makeDirectory(disk, location, 0o700);
    const lock = StoreLock.take(disk, location, role);
    try {
      // Another process may have created one meanwhile.
      return { lock, isNew: directoryState(disk, location) !== 'store', hasMadeDirectory, isReadOnly: false };
    } catch (error) {
      lock.release();
      throw error;
    }
  }
  try {
    return { lock: StoreLock.take(disk, location, role), isNew: false, hasMadeDirectory: false, isReadOnly: false };
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EROFS') throw error;
    const lock = StoreLock.take(disk, location, role, { isReadOnly: true });
    return { lock, isNew: false, hasMadeDirectory: false, isReadOnly: true };
  }
}

/** NO_STORE, or LOCKED if another process is creating a store at this moment. */
function noStore(disk: HostDisk, location: string, role: HolderRole): StoreError {
  try {
    if (directoryState(disk, location) === 'unfinished')
      StoreLock.take(disk, location, role, { isReadOnly: true }).release();
  } catch (error) {
    if (error instanceof StoreError && error.code === 'LOCKED') return error;
  }
  return new StoreError(
    'NO_STORE',
    `no store in ${location}: 'sheepgate vdi create' or 'sheepgate serve' makes one, --store DIR names another`,
  );
}

/** On a full disk a store without the folder opens all the same, so that something can be deleted; then nothing is logged. */
export function openLogFolder(disk: HostDisk, location: string, isNew: boolean): void {
  try {
    makeLogFolder(disk, location);
  } catch (error) {
    if (isNew || asStoreError(error, '').code !== 'NO_SPACE') throw error;
  }
}
