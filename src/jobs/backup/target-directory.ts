/**
 * The directory of a backup target: made, locked, and told from directories that hold other things. Owns which names in it
 * are ours; nothing else there is touched.
 */
import path from 'node:path';
import { OperationError } from '../../operations/operations.js';
import type { HostDisk } from '../../system/disk.js';
import type { OpenFile } from '../../system/open-file.js';
import { inDirectory, openLock } from '../target-files.js';
import { MANIFEST } from './manifest.js';
import type { TargetPaths } from './target-paths.js';

const LOCK = 'lock';
export const PARTIAL = '.partial';
/** What we make, and nothing else, is removed when the manifest does not name it. */
const OUR_FILES = /^(\d{4,}-\d{8}T\d{6}Z\.(qcow2|hashes)|base-\d+\.img|manifest\.json)(\.partial)?$/;
/** Targets that a message names. */
const MAX_NAMED = 5;
/** May be in a directory that is otherwise empty. */
const EMPTY_ENOUGH = new Set([LOCK, 'lost+found', `${MANIFEST}${PARTIAL}`]);

/** Whether a backup may have made a file of this name. */
export function isOurFile(name: string): boolean {
  return OUR_FILES.test(name);
}

export function namesIn(disk: HostDisk, directory: string): Promise<string[]> {
  return inDirectory(disk, directory, (at) => disk.readdir(at('.')));
}

/** Make the directory, but not its parents: a backup disk that is not mounted must not look like an empty one. */
export async function makeHome(disk: HostDisk, { home, image }: TargetPaths, given: string): Promise<boolean> {
  if (disk.lstatSync(home)) {
    await namesIn(disk, home); // fails unless it is a directory, and not a link to one
    return false;
  }
  if (image !== undefined && disk.existsSync(image)) {
    throw new OperationError(
      'BAD_TARGET',
      `${given} exists and is not a backup target: ${home} is missing; give another name, or remove the file`,
    );
  }
  const parent = path.dirname(home);
  if (!disk.existsSync(parent)) {
    throw new OperationError('BAD_TARGET', `${parent} does not exist; create it, or mount the disk that belongs there`);
  }
  disk.mkdirSync(home, 0o700);
  return true;
}

export async function refuseForeign(
  disk: HostDisk,
  { home, image }: TargetPaths,
  given: string,
  isNew: boolean,
): Promise<void> {
  if (isNew) return;
  const names = await namesIn(disk, home);
  if (names.some((name) => isOurFile(name) && name.endsWith('.hashes'))) {
    throw new OperationError(
      'DAMAGED',
      `${path.join(home, MANIFEST)} is missing: restore it from a copy, or give another place; ` +
        `the backups in ${home} can be read with qemu-img`,
    );
  }
  const foreign = names.find((name) => !EMPTY_ENOUGH.has(name));
  if (foreign !== undefined || (image !== undefined && disk.existsSync(image))) {
    throw new OperationError(
      'BAD_TARGET',
      `${given} holds other files (${foreign ?? path.basename(image ?? '')}) and no backups; ` +
        `give a directory of its own, for example ${path.join(given, 'NAME')}`,
    );
  }
}

export function notATarget(disk: HostDisk, given: string, { home, image }: TargetPaths): OperationError {
  if (image !== undefined && disk.existsSync(image)) {
    return new OperationError(
      'BAD_TARGET',
      `${given} is not a backup target: ${home} is missing; 'sheepgate import ${given} NAME' imports a plain image`,
    );
  }
  const within = disk.existsSync(home)
    ? disk.readdirSync(home).filter((name) => disk.existsSync(path.join(home, name, MANIFEST)))
    : [];
  const named = within.slice(0, MAX_NAMED).map((name) => path.join(given, name));
  const hint =
    within.length === 0 ? '' : `; there are some in ${named.join(', ')}${within.length > MAX_NAMED ? ', …' : ''}`;
  return new OperationError('BAD_TARGET', `there are no backups in ${given}${hint}`);
}

/** Lock the target: one run at a time. undefined if a target that is only read has no lock file. Errors: BUSY. */
export async function lockTarget(disk: HostDisk, home: string, flags: 'r' | 'r+'): Promise<OpenFile | undefined> {
  const file = path.join(home, LOCK);
  let handle: OpenFile;
  try {
    handle = await openLock(disk, file, flags);
  } catch (error) {
    if (flags === 'r' && (error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
  let isOurs: boolean;
  try {
    isOurs = handle.tryLock();
  } catch (error) {
    // Network filesystems lock only files that are open for writing, which is impossible on a read-only one.
    if (flags === 'r') isOurs = true;
    else {
      await handle.close();
      throw error;
    }
  }
  if (isOurs) return handle;
  await handle.close();
  throw new OperationError('BUSY', `another sheepgate is at work on the backups in ${home}; wait until it has ended`);
}
