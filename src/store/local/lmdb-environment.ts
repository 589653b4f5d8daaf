/**
 * Opens LMDB with its lock file in memory. LMDB writes that file through a mapping, with every transaction and every
 * reader: where the filesystem of the store cannot fill a page of it (full, over quota, shut down) the process would be
 * ended by SIGBUS. Nobody else needs it, since the store has a lock of its own. Knows nothing of what is stored.
 */
import os from 'node:os';
import path from 'node:path';
import { open, type RootDatabase } from 'lmdb';
import { O_CREAT, O_EXCL, O_WRONLY, removeIfThereSync, type HostDisk } from '../../system/disk.js';

/** Address space, not disk: room for the maps of some ten thousand snapshots of 1 TiB. */
export const MAP_SIZE = 64 * 2 ** 30;
/** More than LMDB makes its lock file by default (126 readers). */
const LOCK_BYTES = 16 * 1024;
/** Named databases in the file at most. */
const MAX_DATABASES = 8;
/** LMDB finds its lock file beside the file that it is given, under the same name and this. */
const LOCK_SUFFIX = '-lock';
/** The names in the store's directory for the moment of opening. No older sheepgate uses them. */
const LINK = 'opening.mdb';

export type Environment = RootDatabase<Buffer, string>;

/** Open `file`, made if missing and not `readOnly`. Errors: those of LMDB, with the errno as number in `code`. */
export function openEnvironment(
  disk: HostDisk,
  file: string,
  { readOnly }: { readonly readOnly: boolean },
): Environment {
  // On a read-only filesystem LMDB does without its lock (mdb.c, mdb_env_setup_locks).
  if (readOnly) return openAs(file, true);
  const lock = disk.memoryFileSync('sheepgate-lmdb-lock', LOCK_BYTES);
  try {
    return withLinks(disk, file, lock, (link) => openAs(link, false));
  } finally {
    if (lock !== undefined) disk.closeSync(lock); // LMDB has opened it for itself
  }
}

/** Remove what a process that was killed while opening has left in the store `directory`. */
export function removeLeftLinks(disk: HostDisk, directory: string): void {
  for (const name of [LINK, `${LINK}${LOCK_SUFFIX}`]) removeIfThereSync(disk, path.join(directory, name));
}

/** The names that opening makes in the store's directory for a moment. */
export const OPENING_NAMES: readonly string[] = [LINK, `${LINK}${LOCK_SUFFIX}`];

function openAs(file: string, readOnly: boolean): Environment {
  return open<Buffer, string>({
    path: file,
    noSubdir: true,
    encoding: 'binary',
    // a commit is answered when it is on disk, not when it is only visible
    overlappingSync: false,
    // With it lmdb-js makes promises of its own that nobody can observe: a failed commit would end the process.
    eventTurnBatching: false,
    mapSize: MAP_SIZE,
    maxDbs: MAX_DATABASES,
    commitDelay: 0,
    readOnly,
  });
}

/** Have `use` open `file` under a name beside which the lock is that in memory. The names are gone afterwards. */
function withLinks<T>(disk: HostDisk, file: string, lock: number | undefined, use: (link: string) => T): T {
  const directory = path.dirname(file);
  removeLeftLinks(disk, directory);
  let made: { readonly link: string; readonly remove: () => void };
  try {
    made = linkIn(disk, directory, path.basename(file), lock);
  } catch (error) {
    // A full disk may have no room for a name. Somewhere else there is.
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
      // The disk may be gone by now; the next open removes them.
    }
  };
  try {
    const inMemory = lock === undefined ? undefined : `/proc/self/fd/${lock}`;
    if (inMemory !== undefined && disk.existsSync(inMemory)) disk.symlinkSync(inMemory, `${link}${LOCK_SUFFIX}`);
    // Without procfs: on disk, but allocated before it is mapped.
    else allocateLock(disk, `${link}${LOCK_SUFFIX}`);
    disk.symlinkSync(to, link);
    return { link, remove };
  } catch (error) {
    remove();
    throw error;
  }
}

/** A lock file on disk that has its space. Errors: those of the system; a lock that is cut short would end the process. */
function allocateLock(disk: HostDisk, file: string): void {
  const fd = disk.openSync(file, O_WRONLY | O_CREAT | O_EXCL, 0o600);
  try {
    const zeros = Buffer.alloc(LOCK_BYTES);
    for (let done = 0; done < LOCK_BYTES;) done += disk.writeSync(fd, zeros.subarray(done), done);
  } finally {
    disk.closeSync(fd);
  }
}

/** Best effort: it is one of ours, of which linkIn has removed what it made. */
function removeFolder(disk: HostDisk, directory: string): void {
  try {
    disk.rmdirSync(directory);
  } catch {
    // In memory, or where others clean up.
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
