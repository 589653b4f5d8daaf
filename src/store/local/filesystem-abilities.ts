/** What the filesystem under a store can do. Tested on a scratch file: it depends on versions and mount options. */
import path from 'node:path';
import { O_CREAT, O_TRUNC, O_WRONLY, type HostDisk } from '../../system/disk.js';
import { asStoreError } from './store-errors.js';

const PAGE = 4096;
/** statfs(2), f_type. */
const TMPFS_MAGIC = 0x01021994;

export interface Abilities {
  readonly punchHole: boolean;
  readonly zeroRange: boolean;
}

export function isTmpfs(disk: HostDisk, directory: string): boolean {
  return disk.filesystemTypeSync(directory) === TMPFS_MAGIC;
}

/** Errors: those of the system, except that the disk is full. */
export function abilitiesOf(disk: HostDisk, directory: string): Abilities {
  const scratch = path.join(directory, 'scratch');
  let fd: number;
  try {
    fd = disk.openSync(scratch, O_WRONLY | O_CREAT | O_TRUNC, 0o600);
  } catch (error) {
    if (asStoreError(error, '').code !== 'NO_SPACE') throw error;
    // The disk has no room for a name. The store must still open, so that something can be deleted.
    return { punchHole: true, zeroRange: false };
  }
  try {
    disk.truncateSync(fd, 2 * PAGE);
    return { punchHole: disk.canPunchHoleSync(fd, PAGE), zeroRange: disk.canZeroRangeSync(fd, PAGE) };
  } finally {
    disk.closeSync(fd);
    disk.unlinkSync(scratch);
  }
}
