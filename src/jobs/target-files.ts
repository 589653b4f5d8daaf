/**
 * Files in directories that other users may be able to write to: a backup target on a shared disk, the directory an image is
 * exported to. Only regular files of that directory are opened: symbolic links are not followed, fifos and devices not opened,
 * files with a second hard link not written; a new file is created with O_EXCL. Owns how files are created, replaced, renamed
 * and removed there, and the order of syncs that makes this safe in a crash.
 *
 * Names are relative to an open directory (openat(2), through /proc/self/fd), so replacing the directory by a link has no
 * effect. The caller resolves the directory's own path; its last component must not be a link.
 */
import os from 'node:os';
import path from 'node:path';
import { OperationError } from '../operations/operations.js';
import { reasonOf, type SystemError } from '../system/system-error.js';
import {
  O_CREAT,
  O_DIRECTORY,
  O_EXCL,
  O_NOFOLLOW,
  O_NONBLOCK,
  O_RDONLY,
  O_RDWR,
  O_WRONLY,
  type FileStatus,
  type HostDisk,
} from '../system/disk.js';
import { OpenFile } from '../system/open-file.js';

const DESCRIPTORS = '/proc/self/fd';
const PARTIAL = '.partial';

/**
 * Run `work` with a directory held open. `at` gives a path for a name in it that stays valid if the directory is moved or
 * replaced. Errors: BAD_TARGET (a symbolic link, or no directory).
 */
export async function inDirectory<T>(
  disk: HostDisk,
  directory: string,
  work: (at: (name: string) => string) => Promise<T>,
): Promise<T> {
  const handle = await openDirectory(disk, directory);
  // Without /proc there are only path names.
  const pinned = disk.existsSync(DESCRIPTORS) ? `${DESCRIPTORS}/${handle.fd}` : directory;
  try {
    return await work((name) => `${pinned}/${name}`);
  } catch (error) {
    throw withPath(error, pinned, directory);
  } finally {
    await handle.close();
  }
}

/** Open a file for reading, or for reading and writing. Errors: BAD_TARGET (not a regular file, or hard links), ENOENT. */
export function openRegular(disk: HostDisk, file: string, access: 'r' | 'r+'): Promise<OpenFile> {
  const mode = access === 'r' ? O_RDONLY : O_RDWR;
  return inDirectory(disk, path.dirname(file), async (at) => {
    const where = at(path.basename(file));
    // Before opening: opening a device can have side effects.
    checkRegular(await disk.lstat(where), file);
    const handle = await openChecked(disk, where, mode, file);
    if (access === 'r') return handle;
    const { nlink } = handle.status();
    if (nlink <= 1) return handle;
    await handle.close();
    throw new OperationError(
      'BAD_TARGET',
      `${file} has ${nlink} names (hard links), and writing to it would change the others too; ` +
        `make it a separate file: cp -p --sparse=always ${file} ${file}.own && mv ${file}.own ${file}`,
    );
  });
}

/** Open the file for locking; `access` 'r+' creates it. Errors: as openRegular. */
export function openLock(disk: HostDisk, file: string, access: 'r' | 'r+'): Promise<OpenFile> {
  return inDirectory(disk, path.dirname(file), async (at) => {
    const where = at(path.basename(file));
    const found = await disk.lstat(where).catch(ignoring('ENOENT'));
    if (found) checkRegular(found, file);
    return openChecked(disk, where, access === 'r' ? O_RDONLY : O_RDWR | O_CREAT, file);
  });
}

/**
 * Create an empty file for writing. A file of that name is removed first, never written to; with `mayReplace` false it is an
 * error (EEXIST).
 */
export function createFile(disk: HostDisk, file: string, { mayReplace = true } = {}): Promise<OpenFile> {
  return inDirectory(disk, path.dirname(file), async (at) => {
    const where = at(path.basename(file));
    if (mayReplace) await disk.unlink(where).catch(ignoring('ENOENT'));
    return new OpenFile(disk, await disk.open(where, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW, 0o600));
  });
}

/** Errors of the block layer and of filesystems that mean damaged data (linux block/blk-core.c, fs/xfs, fs/ext4). */
const { EIO, EBADMSG, ENODATA, EILSEQ } = os.constants.errno;
const EUCLEAN = 117;
const EREMOTEIO = 121;
const UNREADABLE = new Set([EIO, EBADMSG, ENODATA, EILSEQ, EUCLEAN, EREMOTEIO]);

/** Run `read`, which reads `file`. Errors: DAMAGED (the disk cannot read it), and others of `read`. */
export async function readable<T>(file: string, read: () => Promise<T>): Promise<T> {
  try {
    return await read();
  } catch (error) {
    const { errno } = error as NodeJS.ErrnoException;
    if (errno === undefined || !UNREADABLE.has(-errno)) throw error;
    throw new OperationError('DAMAGED', `${file} is damaged: it cannot be read: ${reasonOf(error as Error)}`, {
      cause: error,
    });
  }
}

/** Read a whole file of at most `maxBytes`. Errors: as openRegular; DAMAGED (larger, or unreadable). */
export function readWhole(disk: HostDisk, file: string, maxBytes: number): Promise<Buffer> {
  return readable(file, () => wholeOf(disk, file, maxBytes));
}

async function wholeOf(disk: HostDisk, file: string, maxBytes: number): Promise<Buffer> {
  const handle = await openRegular(disk, file, 'r');
  try {
    const { size } = handle.status();
    if (size > maxBytes) {
      throw new OperationError('DAMAGED', `${file} is damaged: it has ${size} bytes, and can have at most ${maxBytes}`);
    }
    const content = Buffer.alloc(size);
    return content.subarray(0, await handle.readToEnd(content, 0));
  } finally {
    await handle.close();
  }
}

/** The status of the file; undefined if there is none. Errors: BAD_TARGET (not a regular file). */
export async function statRegular(disk: HostDisk, file: string): Promise<FileStatus | undefined> {
  const found = await disk.lstat(file).catch(ignoring('ENOENT', 'ENOTDIR'));
  if (found) checkRegular(found, file);
  return found;
}

export function removeFile(disk: HostDisk, file: string): Promise<void> {
  return inDirectory(disk, path.dirname(file), (at) => disk.unlink(at(path.basename(file))));
}

/** Replace a file atomically: after a crash it is the old one or the new one. */
export async function replaceFile(disk: HostDisk, file: string, content: Buffer): Promise<void> {
  const partial = `${file}${PARTIAL}`;
  const handle = await createFile(disk, partial);
  try {
    await handle.write(content, 0);
    await handle.sync();
  } finally {
    await handle.close();
  }
  await moveFile(disk, partial, file);
}

/** Rename durably. A file or link that has the new name is replaced. */
export async function moveFile(disk: HostDisk, from: string, to: string): Promise<void> {
  await inDirectory(disk, path.dirname(from), (at) =>
    inDirectory(disk, path.dirname(to), (atNew) => disk.rename(at(path.basename(from)), atNew(path.basename(to)))),
  );
  await syncDirectory(disk, path.dirname(to));
  if (path.dirname(from) !== path.dirname(to)) await syncDirectory(disk, path.dirname(from));
}

/** Make everything that was created, renamed and removed in the directory durable. */
export async function syncDirectory(disk: HostDisk, directory: string): Promise<void> {
  const handle = await openDirectory(disk, directory);
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

async function openDirectory(disk: HostDisk, directory: string): Promise<OpenFile> {
  try {
    return new OpenFile(disk, await disk.open(directory, O_RDONLY | O_DIRECTORY | O_NOFOLLOW));
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code !== 'ELOOP' && code !== 'ENOTDIR') throw error;
    throw new OperationError(
      'BAD_TARGET',
      `${directory} is not a directory; find out who put it there, and remove it`,
      {
        cause: error,
      },
    );
  }
}

async function openChecked(disk: HostDisk, where: string, flags: number, file: string): Promise<OpenFile> {
  let handle: OpenFile;
  try {
    // O_NONBLOCK: opening a fifo would wait for its other end.
    handle = new OpenFile(disk, await disk.open(where, flags | O_NOFOLLOW | O_NONBLOCK, 0o600));
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ELOOP') throw notRegular(file, 'a symbolic link');
    if (code === 'ENXIO') throw notRegular(file, 'a fifo, socket or device');
    throw error;
  }
  try {
    checkRegular(handle.status(), file);
    return handle;
  } catch (error) {
    await handle.close();
    throw error;
  }
}

/** Errors: BAD_TARGET. */
function checkRegular(found: FileStatus, file: string): void {
  if (found.isFile()) return;
  const what = found.isSymbolicLink()
    ? 'a symbolic link'
    : found.isDirectory()
      ? 'a directory'
      : found.isFIFO()
        ? 'a fifo'
        : found.isSocket()
          ? 'a socket'
          : 'a device';
  throw notRegular(file, what);
}

function notRegular(file: string, what: string): OperationError {
  return new OperationError(
    'BAD_TARGET',
    `${file} is ${what}, not a regular file: sheepgate did not create it; find out who did, and remove it`,
  );
}

function ignoring(...codes: string[]): (error: NodeJS.ErrnoException) => undefined {
  return (error) => {
    if (!codes.includes(error.code ?? '')) throw error;
    return undefined;
  };
}

/** Replace the /proc path in an error by the directory's own path. */
function withPath(error: unknown, pinned: string, directory: string): unknown {
  if (!(error instanceof Error) || pinned === directory || !error.message.includes(pinned)) return error;
  const named = (text: string): string => text.replaceAll(`${pinned}/`, `${directory}/`);
  const { path: file, dest } = error as SystemError;
  error.message = named(error.message);
  if (file !== undefined) Object.assign(error, { path: named(file) });
  if (dest !== undefined) Object.assign(error, { dest: named(dest) });
  return error;
}
