/**
 * Words for errors of the operating system: what was asked, on which path, why it failed, and what to do. Owns those words;
 * decides nothing. Errors that are not the system's keep their message.
 */
import util from 'node:util';

/** What a system call was for. Calls that are missing here go by their name. */
const WANTED: Readonly<Record<string, string>> = {
  open: 'open',
  read: 'read',
  write: 'write',
  fsync: 'write',
  fdatasync: 'write',
  ftruncate: 'write',
  fallocate: 'write',
  close: 'write',
  stat: 'inspect',
  lstat: 'inspect',
  fstat: 'inspect',
  access: 'use',
  realpath: 'inspect',
  readlink: 'inspect',
  opendir: 'read the directory',
  scandir: 'read the directory',
  mkdir: 'make the directory',
  mkdtemp: 'make the directory',
  unlink: 'remove',
  rmdir: 'remove',
  rename: 'rename',
  flock: 'lock',
  lseek: 'read',
};

/** What to do, by error code. */
const ADVICE: Readonly<Record<string, string>> = {
  ENOENT: 'check the name, or mount the filesystem that belongs there',
  ENOTDIR: 'a part of this path is a file, not a directory; check the name',
  EISDIR: 'it is a directory; give the name of a file',
  EACCES: 'run this as a user with access, or change the permissions of it and of the directories above it',
  EPERM: 'run this as a user with that permission',
  EROFS: 'mount it writable, or give another place',
  ENOSPC: 'free some space on that filesystem, or give another place',
  EDQUOT: 'delete some files there, raise the quota, or give another place',
  EFBIG: 'the filesystem does not support files of this size; give another place',
  ENAMETOOLONG: 'give a shorter name',
  ELOOP: 'its symbolic links form a circle; give the real name',
  EIO: 'the disk has failed; dmesg may say why',
  ESTALE: 'the server of this filesystem no longer has it; mount the filesystem again',
  EMFILE: "this process has too many open files; raise 'ulimit -n'",
  ENFILE: 'the system has too many open files; raise fs.file-max',
  ENOMEM: 'free some memory',
  ETXTBSY: 'it is a running program; give another name',
  EBUSY: 'it is in use; lsof or findmnt show by what',
  ENXIO: 'there is no device or reader behind this name; check what it is',
  ENODEV: 'there is no such device; check the name',
};

export interface SystemError extends NodeJS.ErrnoException {
  readonly code: string;
  readonly syscall: string;
  /** The second path, of calls that have two. */
  readonly dest?: string;
}

/** Whether this is the error of a system call itself, and not an error of one of our layers about it. */
export function isSystemError(error: unknown): error is SystemError {
  const { code, syscall } = (error ?? {}) as Partial<NodeJS.ErrnoException>;
  return error instanceof Error && typeof code === 'string' && typeof syscall === 'string';
}

/** The reason: "no such file or directory (ENOENT)"; for any other error its message. */
export function reasonOf(error: Error): string {
  if (!isSystemError(error)) return error.message;
  const [, words] = (error.errno !== undefined && util.getSystemErrorMap().get(error.errno)) || [];
  return words === undefined ? error.message : `${words} (${error.code})`;
}

/** What failed, on which path, and why. `file`: the path, if the error lacks it, as for an open file. */
export function whatFailed(error: SystemError, file?: string): string {
  const { syscall, path = file, dest } = error;
  const wanted = WANTED[syscall] ?? syscall;
  return ['cannot', wanted, ...(path === undefined ? [] : [path]), ...(dest === undefined ? [] : ['to', dest])]
    .join(' ')
    .concat(`: ${reasonOf(error)}`);
}

/** The reason, for a message that begins with `doing`: with the path unless `doing` contains it. */
export function reasonBeside(doing: string, error: Error): string {
  const isNamed = !isSystemError(error) || error.path === undefined || doing.includes(error.path);
  return isNamed ? reasonOf(error) : whatFailed(error);
}

/** What failed, and what to do. `file`: as for whatFailed. */
export function systemMessage(error: SystemError, file?: string): string {
  const advice = ADVICE[error.code];
  return advice === undefined ? whatFailed(error, file) : `${whatFailed(error, file)}; ${advice}`;
}
