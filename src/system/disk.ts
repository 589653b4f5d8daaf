/**
 * The disk seam: every call by which the local store and the backup targets change, sync or inspect files of this machine,
 * one method each. The real disk (real-disk.ts) passes the calls to the kernel. A test may replace it by a disk that
 * records calls, or makes them fail or wait (test/harness/recording-disk.ts, failing-disk.ts).
 *
 * A method is one system call and decides nothing. Descriptors are the kernel's own numbers, so a recording disk knows
 * from `open` and `close` which file a call is about. Names follow node:fs: `...Sync` blocks the event loop until the
 * kernel has answered; all others run in the thread pool. Errors are the system's, as node:fs throws them (`code`, `errno`,
 * `syscall`).
 */
import fs from 'node:fs';

export type FileStatus = fs.Stats;

/** open(2). */
export const { O_RDONLY, O_WRONLY, O_RDWR, O_CREAT, O_EXCL, O_TRUNC, O_NOFOLLOW, O_NONBLOCK, O_DIRECTORY } =
  fs.constants;

/** `readCachedSync` returns this instead of a count if the page cache does not have the bytes. */
export const WOULD_WAIT = -1;
/** `readCachedSync` returns this instead of a count if the filesystem cannot read that way. */
export const NOT_SUPPORTED = -2;

export type Reserved = 'done' | 'no space' | 'not supported';

/** The calls that Node offers (node-files.ts). */
export interface FileCalls {
  // Open files

  /** `mode`: for a file that this call creates. */
  open(path: string, flags: number, mode?: number): Promise<number>;
  openSync(path: string, flags: number, mode?: number): number;
  close(fd: number): Promise<void>;
  closeSync(fd: number): void;

  // Data

  /** Read from `offset` of the file into `into`, from its byte `at` on. Returns how many bytes; 0 at the end of the file. */
  read(fd: number, into: Buffer, at: number, offset: number): Promise<number>;
  readSync(fd: number, into: Buffer, offset: number): number;
  /** Write `data` from its byte `from` on. Returns how many bytes were written. */
  write(fd: number, data: Buffer, from: number, offset: number): Promise<number>;
  writeSync(fd: number, data: Buffer, offset: number): number;
  truncate(fd: number, size: number): Promise<void>;
  truncateSync(fd: number, size: number): void;

  // Durability

  /** Make the file's data and size durable. */
  fdatasync(fd: number): Promise<void>;
  /** Make a file durable with all its metadata, or the names in a directory. */
  fsync(fd: number): Promise<void>;
  fsyncSync(fd: number): void;

  // Names

  unlink(path: string): Promise<void>;
  unlinkSync(path: string): void;
  rename(from: string, to: string): Promise<void>;
  renameSync(from: string, to: string): void;
  mkdirSync(path: string, mode?: number): void;
  /** Create a directory with a new name that begins with `prefix`. Returns its path. */
  mkdtempSync(prefix: string): string;
  rmdirSync(path: string): void;
  symlinkSync(target: string, path: string): void;

  // Inspection

  fstatSync(fd: number): FileStatus;
  /** Undefined if there is nothing with that name. */
  statSync(path: string): FileStatus | undefined;
  lstatSync(path: string): FileStatus | undefined;
  lstat(path: string): Promise<FileStatus>;
  existsSync(path: string): boolean;
  readdir(path: string): Promise<string[]>;
  readdirSync(path: string): string[];
  realpathSync(path: string): string;
  /** f_type of statfs(2). */
  filesystemTypeSync(path: string): number;
}

/** All calls: those of Node, those that Node lacks, and those that make LMDB write its file. */
export interface HostDisk extends FileCalls {
  /** Lock the file for this process, or `shared` among readers. False if another process holds the lock. flock(2). */
  tryLockSync(fd: number, options?: { readonly shared?: boolean }): boolean;
  /** A file of `length` zeros in memory, without a name; undefined where the system cannot provide it. memfd_create(2). */
  memoryFileSync(name: string, length: number): number | undefined;
  /** Read from the page cache, without waiting for the disk. Returns how many bytes, WOULD_WAIT or NOT_SUPPORTED. */
  readCachedSync(fd: number, into: Buffer, offset: number): number;
  /** Free the space of the range; it then reads as zeros. False where the filesystem has no holes. */
  punchHole(fd: number, offset: number, length: number): Promise<boolean>;
  /** Turn the range into allocated zeros. False where the filesystem cannot do that without writing them. */
  zeroRange(fd: number, offset: number, length: number): Promise<boolean>;
  /** Whether the filesystem can punch holes, and below make zero ranges: tried on the first `length` bytes of a scratch file. */
  canPunchHoleSync(fd: number, length: number): boolean;
  canZeroRangeSync(fd: number, length: number): boolean;
  /** Allocate space, also past the end of the file, without changing its size. */
  reserveSync(fd: number, offset: number, length: number): Reserved;
  /** The next byte at or after `offset` that holds data; -1 if only a hole follows. */
  nextData(fd: number, offset: number): Promise<number>;
  /** The next hole at or after `offset`; the end of the file counts as one. */
  nextHole(fd: number, offset: number): Promise<number>;
  /** Make `to` share all blocks of `from` (FICLONE). False where the filesystem cannot. */
  clone(from: number, to: number): Promise<boolean>;
  /** Copy a range to the same offset of another file, in the kernel. Returns how many bytes; -1 where the kernel cannot. */
  copyRange(from: number, to: number, offset: number, length: number): Promise<number>;
  /** Ask the kernel to read the range ahead. */
  willNeed(fd: number, offset: number, length: number): Promise<void>;
  /** Ask the kernel to drop the file's cached pages. */
  dropCached(fd: number): Promise<void>;
  /** Make the whole filesystem of the file durable. */
  syncfs(fd: number): Promise<void>;

  // LMDB writes its file by itself. These calls run the code that makes LMDB do so; `fd` is a descriptor of the same file.

  openDatabase<T>(fd: number, open: () => T): T;
  /** One transaction: resolves when it is durable. Errors: as LMDB rejects, with the errno as a positive number in `code`. */
  commit(fd: number, transaction: () => Promise<void>): Promise<void>;
  closeDatabase(fd: number, close: () => Promise<void>): Promise<void>;

  // Identities. A disk that replays a crash returns other identities than the kernel: the state is a copy, on another boot.

  inodeOfSync(fd: number): bigint;
  inodeAtSync(path: string): bigint;
  /** One line of text that changes when the filesystem is mounted again (mount-identity.ts). Errors: those of stat(2). */
  mountingSync(path: string): string;
  /** Of this boot of the machine; undefined without procfs. */
  bootId(): string | undefined;
}

/** Remove a file that may be missing. Errors: those of unlink(2), without ENOENT. */
export function removeIfThereSync(disk: FileCalls, file: string): void {
  try {
    disk.unlinkSync(file);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
  }
}
