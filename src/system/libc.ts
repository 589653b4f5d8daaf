/**
 * System calls on files that Node lacks: reads that do not wait for the disk, holes, in-kernel copies, advisory locks.
 * Callers see numbers and Buffers, nothing of koffi. The local store and the backup targets reach these calls only through
 * the disk seam (disk.ts). System calls on sockets are in socket-calls.ts.
 */
import fs from 'node:fs';
import koffi from 'koffi';
import { NOT_SUPPORTED, WOULD_WAIT, type Reserved } from './disk.js';

const RWF_NOWAIT = 8; // linux/fs.h
const FALLOC_FL_KEEP_SIZE = 1; // linux/falloc.h
const FALLOC_FL_PUNCH_HOLE = 2;
const FALLOC_FL_ZERO_RANGE = 16;
const MFD_CLOEXEC = 1; // linux/memfd.h
const SEEK_END = 2;
const SEEK_DATA = 3;
const SEEK_HOLE = 4;
const LOCK_SH = 1;
const LOCK_EX = 2;
const LOCK_NB = 4;
const FICLONE = 0x40049409; // linux/fs.h, _IOW(0x94, 9, int)
const POSIX_FADV_WILLNEED = 3;
const POSIX_FADV_DONTNEED = 4;
const AT_FDCWD = -100; // linux/fcntl.h
const STATX_MNT_ID = 0x1000; // linux/stat.h, since Linux 5.8
const STATX_MNT_ID_UNIQUE = 0x4000; // since Linux 6.8
const STATX_BYTES = 256;
/** stx_mnt_id in struct statx. */
const MNT_ID_AT = 144;

const { EAGAIN, EOPNOTSUPP, ENXIO, EINTR, ENOSPC, EDQUOT, EXDEV, EINVAL, ENOSYS, ENOTTY } = koffi.os.errno;

const libc = koffi.load('libc.so.6');
const preadv2 = libc.func('long preadv2(int fd, void *iov, int count, int64_t offset, int flags)');
const fallocate = libc.func('int fallocate64(int fd, int mode, int64_t offset, int64_t length)');
const lseek = libc.func('int64_t lseek64(int fd, int64_t offset, int whence)');
const copyFileRange = libc.func(
  'long copy_file_range(int in, int64_t *offIn, int out, int64_t *offOut, size_t length, uint flags)',
);
const flock = libc.func('int flock(int fd, int operation)');
const ioctlInt = libc.func('int ioctl(int fd, ulong request, int argument)');
const syncfs = libc.func('int syncfs(int fd)');
const statx = libc.func('int statx(int fd, str path, int flags, uint mask, _Out_ uint8_t *into)');
const memfdCreate = libc.func('int memfd_create(const char *name, uint flags)');
const fadvise = libc.func('int posix_fadvise64(int fd, int64_t offset, int64_t length, int advice)');

/** A failed system call, with `code` as Node names it: callers treat it like an error of node:fs. */
function systemError(call: string, errno: number): NodeJS.ErrnoException {
  const names = koffi.os.errno;
  const code = Object.keys(names).find((name) => names[name] === errno) ?? `errno ${errno}`;
  const error: NodeJS.ErrnoException = new Error(`${code}: ${call}`);
  error.code = code;
  error.errno = -errno;
  error.syscall = call;
  return error;
}

type Native = ReturnType<typeof libc.func>;

/** Run `native` on a thread of the pool. Resolves to its result. Errors: systemError, for -1. */
function offLoop(call: string, native: Native, ...args: unknown[]): Promise<number> {
  return new Promise((resolve, reject) => {
    native.async(...args, (error: Error | null, result: number | bigint) => {
      if (error) return void reject(error);
      if (Number(result) === -1) return void reject(systemError(call, koffi.errno()));
      resolve(Number(result));
    });
  });
}

function codeOf(error: unknown): number {
  return -((error as NodeJS.ErrnoException).errno ?? 0);
}

// One iovec, filled again for each call: calls are synchronous, so no two calls share it.
const iovec = Buffer.alloc(16);
const iovec32 = new Uint32Array(iovec.buffer, iovec.byteOffset, 4);
let lastArrayBuffer: ArrayBufferLike | undefined;
let lastBase = 0;

/** The address of a buffer's first byte. Slabs are few and live long, so the last one is cached. */
function addressOf(buffer: Buffer): number {
  if (buffer.buffer !== lastArrayBuffer) {
    lastArrayBuffer = buffer.buffer;
    lastBase = Number(koffi.address(buffer)) - buffer.byteOffset;
  }
  return lastBase + buffer.byteOffset;
}

/**
 * Read from the page cache, without waiting for the disk. Returns how many bytes (perhaps fewer than asked for), WOULD_WAIT,
 * or NOT_SUPPORTED where the filesystem cannot do it. preadv2(2), RWF_NOWAIT.
 */
export function readNoWait(fd: number, into: Buffer, offset: number): number {
  const address = addressOf(into);
  iovec32[0] = address >>> 0;
  iovec32[1] = (address / 2 ** 32) >>> 0;
  iovec32[2] = into.length;
  iovec32[3] = 0;
  const count = preadv2(fd, iovec, 1, offset, RWF_NOWAIT) as number;
  if (count >= 0) return count;
  const errno = koffi.errno();
  if (errno === EAGAIN || errno === EINTR) return WOULD_WAIT;
  if (errno === EOPNOTSUPP || errno === ENOSYS || errno === EINVAL) return NOT_SUPPORTED;
  throw systemError('preadv2', errno);
}

/** Free the range's space; it then reads as zeros. False where the filesystem has no holes. */
export async function punchHole(fd: number, offset: number, length: number): Promise<boolean> {
  try {
    await offLoop('fallocate', fallocate, fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
    return true;
  } catch (error) {
    if (codeOf(error) === EOPNOTSUPP) return false;
    throw error;
  }
}

/** Turn the range into allocated zeros. False where the filesystem cannot: then zeros must be written. */
export async function zeroRange(fd: number, offset: number, length: number): Promise<boolean> {
  try {
    await offLoop('fallocate', fallocate, fd, FALLOC_FL_ZERO_RANGE, offset, length);
    return true;
  } catch (error) {
    if (codeOf(error) === EOPNOTSUPP) return false;
    throw error;
  }
}

/** Whether the filesystem has holes. `fd`: a scratch file of at least `length` bytes. */
export function canPunchHole(fd: number, length: number): boolean {
  return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, length) === 0;
}

/** Whether the filesystem can make allocated zeros without writing them. `fd`: a scratch file, as above. */
export function canZeroRange(fd: number, length: number): boolean {
  return fallocate(fd, FALLOC_FL_ZERO_RANGE, 0, length) === 0;
}

/** Allocate space, also beyond the end of the file, without changing its size. fallocate(2). */
export function reserve(fd: number, offset: number, length: number): Reserved {
  if (fallocate(fd, FALLOC_FL_KEEP_SIZE, offset, length) === 0) return 'done';
  const errno = koffi.errno();
  return errno === ENOSPC || errno === EDQUOT ? 'no space' : 'not supported';
}

/**
 * A file of `length` zeros without a name, in memory that is allocated when this returns; undefined if there is no memory or
 * no memfd_create(2).
 */
export function memoryFile(name: string, length: number): number | undefined {
  const fd = memfdCreate(name, MFD_CLOEXEC) as number;
  if (fd < 0) return undefined;
  if (fallocate(fd, 0, 0, length) === 0) return fd;
  fs.closeSync(fd);
  return undefined;
}

/** The next byte at or after `offset` that holds data, or -1 if only a hole follows. A block device is all data. */
export async function nextData(fd: number, offset: number): Promise<number> {
  try {
    return await offLoop('lseek', lseek, fd, offset, SEEK_DATA);
  } catch (error) {
    const errno = codeOf(error);
    if (errno === ENXIO) return -1;
    // A block device has no holes (linux block/fops.c, blkdev_llseek). Every filesystem has SEEK_DATA (lseek(2)).
    if (errno === EINVAL) return offset;
    throw error;
  }
}

/** The next hole at or after `offset` (the end of the file counts as one). */
export async function nextHole(fd: number, offset: number): Promise<number> {
  try {
    return await offLoop('lseek', lseek, fd, offset, SEEK_HOLE);
  } catch (error) {
    const errno = codeOf(error);
    if (errno === ENXIO) return offset;
    if (errno === EINVAL) return endOf(fd);
    throw error;
  }
}

/** The size of an open file or block device, whose size fstat does not report. Moves the position of the file. */
export function endOf(fd: number): Promise<number> {
  return offLoop('lseek', lseek, fd, 0, SEEK_END);
}

/** Make `to` share all blocks of `from` (FICLONE). False where the filesystem has no reflinks. */
export async function cloneFile(from: number, to: number): Promise<boolean> {
  try {
    await offLoop('ioctl(FICLONE)', ioctlInt, to, FICLONE, from);
    return true;
  } catch (error) {
    const errno = codeOf(error);
    if (errno === ENOSPC || errno === EDQUOT) throw error;
    return false;
  }
}

/** Copy [offset, offset + length) to the same offset of another file, in the kernel. Returns how many bytes; -1 where it cannot. */
export async function copyRange(from: number, to: number, offset: number, length: number): Promise<number> {
  try {
    const position = (): BigInt64Array => BigInt64Array.of(BigInt(offset));
    return await offLoop('copy_file_range', copyFileRange, from, position(), to, position(), length, 0);
  } catch (error) {
    const errno = codeOf(error);
    if (errno === EXDEV || errno === EINVAL || errno === EOPNOTSUPP || errno === ENOSYS || errno === ENOTTY) return -1;
    throw error;
  }
}

/** Ask the kernel to read the range ahead. */
export async function willNeed(fd: number, offset: number, length: number): Promise<void> {
  await offLoop('posix_fadvise', fadvise, fd, offset, length, POSIX_FADV_WILLNEED);
}

/** Make all data written to the filesystem of this file durable. */
export async function syncFilesystem(fd: number): Promise<void> {
  await offLoop('syncfs', syncfs, fd);
}

/** The number of the mount of `path`, as in /proc/self/mountinfo; reused after an unmount. Undefined before Linux 5.8. */
export function mountId(path: string): bigint | undefined {
  return mountIdOf(path, STATX_MNT_ID);
}

/** The number of the mount of `path`, never reused on this boot. Undefined before Linux 6.8. */
export function uniqueMountId(path: string): bigint | undefined {
  return mountIdOf(path, STATX_MNT_ID_UNIQUE);
}

function mountIdOf(path: string, field: number): bigint | undefined {
  const into = Buffer.alloc(STATX_BYTES);
  if (statx(AT_FDCWD, path, 0, field, into) !== 0) return undefined;
  return (into.readUInt32LE(0) & field) === 0 ? undefined : into.readBigUInt64LE(MNT_ID_AT);
}

/** Drop the cached pages of a file that is in sync with its disk, so that the next read reads the disk. A hint. */
export async function dropCached(fd: number): Promise<void> {
  await offLoop('posix_fadvise', fadvise, fd, 0, 0, POSIX_FADV_DONTNEED);
}

/**
 * Lock an open file for this process, or `shared` among readers. False if another process holds the lock. Closing the
 * descriptor releases it.
 */
export function tryLock(fd: number, { shared = false } = {}): boolean {
  if (flock(fd, (shared ? LOCK_SH : LOCK_EX) | LOCK_NB) === 0) return true;
  const errno = koffi.errno();
  if (errno === EAGAIN) return false;
  throw systemError('flock', errno);
}
