/**
 * Opening a file for reading that somebody else may have put there: only a plain file is opened, never what a symbolic link names,
 * and never something that would make the caller wait, like a pipe. Owns nothing.
 */
import { O_NOFOLLOW, O_NONBLOCK, O_RDONLY, type HostDisk } from '../../system/disk.js';

/** The descriptor belongs to the caller. Errors: those of the disk, also ELOOP; or that it is not a file. */
export function openPlainFile(disk: HostDisk, file: string): number {
  const fd = disk.openSync(file, O_RDONLY | O_NOFOLLOW | O_NONBLOCK);
  if (disk.fstatSync(fd).isFile()) return fd;
  disk.closeSync(fd);
  throw new Error(`${file} is not a file`);
}
