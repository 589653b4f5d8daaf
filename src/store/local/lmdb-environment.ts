/**
 * Opens LMDB with its lock file in memory. LMDB writes that file through a mapping, in every transaction and for every
 * reader. If the filesystem could not store a page of it (full, over quota, shut down), SIGBUS would end the process. No
 * other process needs the lock file, since the store has its own lock. Knows nothing of what is stored.
 */
import os from 'node:os';
import path from 'node:path';
import { open, type RootDatabase } from 'lmdb';
import { O_CREAT, O_EXCL, O_WRONLY, removeIfThereSync, type HostDisk } from '../../system/disk.js';

/** Bytes of address space, not of disk: room for the maps of about ten thousand snapshots of 1 TiB. */
export const MAP_SIZE = 64 * 2 ** 30;
/** Larger than LMDB's lock file is by default (126 readers). */
const LOCK_BYTES = 16 * 1024;
/** Named databases in the file at most. */
const MAX_DATABASES = 8;
/** LMDB expects its lock file beside its data file, under the same name with this suffix. */
const LOCK_SUFFIX = '-lock';
/** A name that exists in the store's directory while LMDB opens. No older sheepgate uses it. */
const LINK = 'opening.mdb';

export type Environment = RootDatabase<Buffer, string>;

/** Open `file`; it is created if missing, unless `readOnly`. Errors: those of LMDB, with the errno as a number in `code`. */
export function openEnvironment(
  disk: HostDisk,
  file: string,
  { readOnly }: { readonly readOnly: boolean },
): Environment {
  // On a read-only filesystem LMDB uses no lock (mdb.c, mdb_env_setup_locks).
  if (readOnly) return openAs(file, true);
  const lock = disk.memoryFileSync('sheepgate-lmdb-lock', LOCK_BYTES);
  try {
    return withLinks(disk, file, lock, (link) => openAs(link, false));
  } finally {
    if (lock !== undefined) disk.closeSync(lock); // LMDB has its own descriptor
  }
}

/** Remove names that a process left in the store `directory` because it was killed while it opened LMDB. */
export function removeLeftLinks(disk: HostDisk, directory: string): void {
  for (const name of [LINK, `${LINK}${LOCK_SUFFIX}`]) removeIfThereSync(disk, path.join(directory, name));
}

/** The names that exist in the store's directory while LMDB opens. */
export const OPENING_NAMES: readonly string[] = [LINK, `${LINK}${LOCK_SUFFIX}`];

function openAs(file: string, readOnly: boolean): Environment {
  return open<Buffer, string>({
    path: file,
    noSubdir: true,
    encoding: 'binary',
    // A commit resolves when it is durable, not when it is only visible.
    overlappingSync: false,
    // With batching lmdb-js makes promises that callers cannot reach: their rejection, by a failed commit, would end the process.
    eventTurnBatching: false,
    mapSize: MAP_SIZE,
    maxDbs: MAX_DATABASES,
    commitDelay: 0,
    readOnly,
  });
}

/** Call `use` with a name for `file` whose lock file is the one in memory. The names are removed afterwards. */
function withLinks<T>(disk: HostDisk, file: string, lock: number | undefined, use: (link: string) => T): T {
  const directory = path.dirname(file);
  removeLeftLinks(disk, directory);
  let made: { readonly link: string; readonly remove: () => void };
  try {
    made = linkIn(disk, directory, path.basename(file), lock);
  } catch (error) {
    // A full disk may have no room for a name. Another filesystem may have.
    const elsewhere = linkElsewhere(disk, path.resolve(file), lock);
    if (elsewhere === undefined) throw error;
    made = elsewhere;
  }
  try {
    return use(made.link);
  } finally {
    made.remove();
  }
}

function linkIn(
  disk: HostDisk,
  directory: string,
  to: string,
  lock: number | undefined,
): { link: string; remove: () => void } {
  const link = path.join(directory, LINK);
  const remove = (): void => {
    try {
      removeLeftLinks(disk, directory);
    } catch {
      // The disk may be gone; the next open removes the names.
    }
  };
  try {
    const inMemory = lock === undefined ? undefined : `/proc/self/fd/${lock}`;
    if (inMemory !== undefined && disk.existsSync(inMemory)) disk.symlinkSync(inMemory, `${link}${LOCK_SUFFIX}`);
    // Without procfs the lock file is on disk, and allocated before it is mapped.
    else allocateLock(disk, `${link}${LOCK_SUFFIX}`);
    disk.symlinkSync(to, link);
    return { link, remove };
  } catch (error) {
    remove();
    throw error;
  }
}

/** A lock file on disk with allocated space: one that is too short would end the process. Errors: those of the system. */
function allocateLock(disk: HostDisk, file: string): void {
  const fd = disk.openSync(file, O_WRONLY | O_CREAT | O_EXCL, 0o600);
  try {
    const zeros = Buffer.alloc(LOCK_BYTES);
    for (let done = 0; done < LOCK_BYTES;) done += disk.writeSync(fd, zeros.subarray(done), done);
  } finally {
    disk.closeSync(fd);
  }
}

/** Best effort: the folder is ours, and linkIn has removed its content. */
function removeFolder(disk: HostDisk, directory: string): void {
  try {
    disk.rmdirSync(directory);
  } catch {
    // It is in /dev/shm or the folder for temporary files.
  }
}

function linkElsewhere(
  disk: HostDisk,
  file: string,
  lock: number | undefined,
): { link: string; remove: () => void } | undefined {
  for (const place of ['/dev/shm', os.tmpdir()]) {
    let directory: string | undefined;
    try {
      directory = disk.mkdtempSync(path.join(place, 'sheepgate-'));
      const { link, remove } = linkIn(disk, directory, file, lock);
      const made = directory;
      return {
        link,
        remove: () => {
          remove();
          disk.rmdirSync(made);
        },
      };
    } catch {
      if (directory !== undefined) removeFolder(disk, directory);
    }
  }
  return undefined;
}
