/**
 * Where an export writes its image to: a file, a block device, or a stream (a pipe, a fifo or a character device). Owns the
 * checks before anything is written, and what is left after a failure: no file of the wanted name, and a message that names the
 * target and says what to do.
 */
import fs from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { Writable } from 'node:stream';
import { setTimeout as delay } from 'node:timers/promises';
import tty from 'node:tty';
import { OperationError, type Disk } from '../operations/operations.js';
import { isSystemError, reasonOf, systemMessage } from '../system/system-error.js';
import { BlockDevice } from './block-device.js';
import { copyDiskToFile, copyDiskToStream, type Copied } from './disk-copy.js';
import { PartialFile } from './partial-file.js';
import type { JobContext, Progress } from './reporting.js';

const { O_WRONLY, O_NONBLOCK, O_NOCTTY } = fs.constants;
const STDOUT = '-';
const STDOUT_FD = 1;
/** Other names of stdout, and "-". */
const STDOUT_NAMES = new Set([STDOUT, '/dev/stdout', '/dev/fd/1', '/proc/self/fd/1']);
/** Filesystems of the kernel. Others may be mounted below them, such as /dev/shm. */
const KERNEL_PLACES = ['/dev', '/proc', '/sys'];
/** Between two attempts to open a fifo that has no reader yet. */
const READER_POLL_MS = 50;
const SPACE_CODES = new Set(['ENOSPC', 'EDQUOT']);

type Copy = (disk: Disk, progress: Progress, signal: AbortSignal) => Promise<Copied>;
/** What opening and copying need of the job. */
export interface TargetContext extends Pick<JobContext, 'log' | 'signal'> {
  /** The stream for "-". Called only for an image that goes there: Node opens process.stdout at its first use. */
  readonly stdout: () => Writable;
}

/** Opened before the store and finished after it: while the store is open, root may have the identity of its owner. */
export interface ImageTarget {
  readonly copy: Copy;
  /** The image is complete: it gets its name. */
  finish(): Promise<void>;
  /** The image will not become complete: remove it. Does not fail. */
  abandon(): Promise<void>;
}

export function isStdout(file: string): boolean {
  return STDOUT_NAMES.has(file);
}

/**
 * Everything that can be checked is checked here, before hours of copying. Waits for the reader of a fifo until the signal.
 * Errors: BAD_USAGE, BAD_FILE, EXISTS, BUSY, READ_ONLY, and those of the system.
 */
export async function openTarget(file: string, mayReplace: boolean, context: TargetContext): Promise<ImageTarget> {
  if (isStdout(file)) return toStdout(context.stdout());
  const status = fs.statSync(file, { throwIfNoEntry: false });
  if (status?.isDirectory()) throw new OperationError('BAD_FILE', `${file} is a directory; give a file's name`);
  if (status?.isSocket()) throw new OperationError('BAD_FILE', `${file} is a socket; give a file's name`);
  if (status?.isFIFO()) return toFifo(file, context);
  if (status?.isCharacterDevice()) return toCharacterDevice(file);
  if (status?.isBlockDevice()) return toBlockDevice(await BlockDevice.open(file, mayReplace), context);
  const resolved = resolve(file);
  if (!mayReplace && status) throw new OperationError('EXISTS', `${file} exists; --force replaces it`);
  return toFile(file, resolved);
}

/** The path of the image with links resolved. Errors: BAD_FILE (no file can be there). */
function resolve(file: string): string {
  const absolute = path.resolve(file);
  const found = fs.lstatSync(absolute, { throwIfNoEntry: false });
  const resolved = found ? realPath(absolute, file) : path.join(parentOf(absolute), path.basename(absolute));
  const place = KERNEL_PLACES.find((each) => resolved.startsWith(`${each}/`));
  if (place !== undefined && fs.statSync(path.dirname(resolved)).dev === fs.statSync(place).dev) {
    throw new OperationError(
      'BAD_FILE',
      `${file} is in ${place} and is not a device: a file there would not be on a disk; check the name`,
    );
  }
  return resolved;
}

function realPath(absolute: string, file: string): string {
  try {
    return fs.realpathSync(absolute);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
    throw new OperationError(
      'BAD_FILE',
      `${file} is a symbolic link to a file that does not exist; remove it, or give the name of the file itself`,
      { cause: error },
    );
  }
}

function parentOf(absolute: string): string {
  const parent = path.dirname(absolute);
  const status = fs.statSync(parent, { throwIfNoEntry: false });
  if (!status)
    throw new OperationError(
      'BAD_FILE',
      `${parent} does not exist; create it, or mount the filesystem that belongs there`,
    );
  if (!status.isDirectory()) throw new OperationError('BAD_FILE', `${parent} is not a directory; give another name`);
  return fs.realpathSync(parent);
}

function toStdout(stdout: Writable & { readonly isTTY?: boolean }): ImageTarget {
  if (stdout.isTTY) {
    throw new OperationError('BAD_USAGE', 'a disk image does not belong on a terminal; redirect stdout or name a file');
  }
  // For a descriptor that it cannot write to, such as a block device, Node makes a stream that accepts everything and writes
  // nothing (lib/internal/bootstrap/switches/is_main_thread.js, createWritableStdioStream).
  if (Object.getPrototypeOf(stdout) === Writable.prototype) {
    const what = fs.fstatSync(STDOUT_FD).isBlockDevice()
      ? 'a block device'
      : 'not something that an image can be written to';
    throw new OperationError(
      'BAD_USAGE',
      `stdout is ${what}: name a file or device instead of redirecting to it (${stdoutName()}); nothing was written`,
    );
  }
  return toStream(stdout, 'stdout', { isOurs: false });
}

function stdoutName(): string {
  try {
    return fs.readlinkSync(`/proc/self/fd/${STDOUT_FD}`);
  } catch {
    return 'its name is unknown';
  }
}

/** Opened when it has a reader. If the reader goes away, a write is an error (fifo(7)). */
async function toFifo(file: string, { log, signal }: TargetContext): Promise<ImageTarget> {
  let isSaid = false;
  for (;;) {
    signal.throwIfAborted();
    try {
      const fd = fs.openSync(file, O_WRONLY | O_NONBLOCK);
      const socket = new net.Socket({ fd, readable: false, writable: true });
      return toStream(socket, file, { isOurs: true });
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENXIO') throw error;
    }
    if (!isSaid) log(`waiting for a reader of ${file}`);
    isSaid = true;
    await delay(READER_POLL_MS, undefined, { signal }).catch(() => undefined);
  }
}

function toCharacterDevice(file: string): ImageTarget {
  const fd = fs.openSync(file, O_WRONLY | O_NOCTTY);
  if (tty.isatty(fd)) {
    fs.closeSync(fd);
    throw new OperationError(
      'BAD_USAGE',
      `${file} is a terminal, and a disk image does not belong on one; name a file`,
    );
  }
  const stream = fs.createWriteStream('', { fd });
  return toStream(stream, file, { isOurs: true });
}

function destroyed(stream: Writable): Promise<void> {
  return new Promise((resolve) => {
    if (stream.closed) return resolve();
    stream.once('close', resolve);
    stream.destroy();
  });
}

/** `isOurs`: we close the stream. After a failure we do not wait for what a device still has to write. */
function toStream(stream: Writable, name: string, { isOurs }: { readonly isOurs: boolean }): ImageTarget {
  // The failed write reports the error. Without a listener the stream would end the process before anything is cleaned up.
  stream.on('error', () => undefined);
  const copy: Copy = async (disk, progress, signal) => {
    try {
      return await copyDiskToStream(disk, stream, { progress, signal });
    } catch (error) {
      throw notComplete(error, name);
    }
  };
  return {
    copy,
    finish: () => (isOurs ? destroyed(stream) : Promise.resolve()),
    abandon: () => {
      if (isOurs) stream.destroy();
      return Promise.resolve();
    },
  };
}

/** A failed write to a stream or device: what is there now is a part of an image. */
function notComplete(error: unknown, name: string): unknown {
  if (!isSystemError(error)) return error;
  const why = error.code === 'EPIPE' ? 'its reader is gone' : reasonOf(error);
  return new OperationError('INCOMPLETE', `the image on ${name} is not complete: ${why}`, { cause: error });
}

/** `given`: the path as the operator wrote it. */
async function toFile(given: string, resolved: string): Promise<ImageTarget> {
  let size = 0;
  const explained = <T>(work: Promise<T>): Promise<T> =>
    work.catch((error: unknown) => {
      throw notWritten(error, given, size);
    });
  const partial = await explained(PartialFile.open(resolved));
  const copyIn: Copy = async (disk, progress, signal) => {
    size = disk.size;
    await partial.setSize(size);
    const copied = await copyDiskToFile(disk, partial.fd, { progress, signal });
    await partial.sync();
    return copied;
  };
  return {
    copy: (disk, progress, signal) => explained(copyIn(disk, progress, signal)),
    finish: () => explained(partial.finish()),
    abandon: () => partial.abandon(),
  };
}

/** A system error about the file, with a way out. Errors of the disk stay as they are. */
function notWritten(error: unknown, file: string, size: number): unknown {
  if (!isSystemError(error)) return error;
  const { code } = error;
  const cause = { cause: error };
  if (SPACE_CODES.has(code)) {
    const why = `no space left for ${file} (${code}), and the partial image was removed`;
    return new OperationError('NO_SPACE', `${why}: free space in ${path.dirname(file)}, or give another place`, cause);
  }
  if (code === 'EFBIG') {
    const why = `the filesystem of ${file} does not support files of ${size} bytes`;
    return new OperationError('BAD_SIZE', `${why}; give another place, or export to - and split the output`, cause);
  }
  return new OperationError(
    'BAD_FILE',
    `${file} was not written, and the partial image was removed: ${systemMessage(error, file)}`,
    cause,
  );
}

function toBlockDevice(device: BlockDevice, { log }: TargetContext): ImageTarget {
  const copy: Copy = async (disk, progress, signal) => {
    const { file, size } = device;
    if (size < disk.size) {
      throw new OperationError(
        'BAD_SIZE',
        `${file} has ${size} bytes, too few for the image of ${disk.size} bytes; nothing was written`,
      );
    }
    try {
      const zero = (offset: number, length: number): Promise<void> => device.zero(offset, length, signal);
      const copied = await copyDiskToFile(disk, device.fd, { progress, signal, zero });
      await device.sync();
      return copied;
    } catch (error) {
      const told = notComplete(error, file);
      // The job was interrupted, or reading failed: that is the error, and the log says what is left behind.
      if (told === error) log(`the image on ${file} is not complete: export it again`);
      throw told;
    }
  };
  return { copy, finish: () => device.close(), abandon: () => device.close().catch(() => undefined) };
}
