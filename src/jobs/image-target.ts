/**
 * Where `export` writes an image to: a file, a block device, or a stream, which is a pipe, a fifo or a character device. Owns
 * what is looked at before anything is written, and what is left when the image does not become whole: no file of its name,
 * and a message that says which place it is and what to do.
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
/** The same by other names. */
const STDOUT_NAMES = new Set([STDOUT, '/dev/stdout', '/dev/fd/1', '/proc/self/fd/1']);
/** Where the kernel's own files are; but others may be mounted in there, as /dev/shm is. */
const KERNEL_PLACES = ['/dev', '/proc', '/sys'];
/** Between two looks for a reader of a fifo. */
const READER_POLL_MS = 50;
const SPACE_CODES = new Set(['ENOSPC', 'EDQUOT']);

type Copy = (disk: Disk, progress: Progress, signal: AbortSignal) => Promise<Copied>;
/** What opening and copying need of the job. */
type Context = Pick<JobContext, 'log' | 'signal'>;

/** Opened before the store is and finished after it: meanwhile root may be the store's owner. */
export interface ImageTarget {
  readonly copy: Copy;
  /** It is complete. */
  finish(): Promise<void>;
  /** It is not, and never will be. Does not fail. */
  abandon(): Promise<void>;
}

export function isStdout(file: string): boolean {
  return STDOUT_NAMES.has(file);
}

/**
 * Looked at before anything is copied, so that a mistake costs no time. Waits for the reader of a fifo, until the signal.
 * Errors: BAD_USAGE, BAD_FILE, EXISTS, BUSY, READ_ONLY, and those of the system.
 */
export async function openTarget(file: string, mayReplace: boolean, context: Context): Promise<ImageTarget> {
  if (isStdout(file)) return toStdout();
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

/** The path that the image is to have, without links. Errors: BAD_FILE if there can be no file. */
function resolve(file: string): string {
  const absolute = path.resolve(file);
  const found = fs.lstatSync(absolute, { throwIfNoEntry: false });
  const resolved = found ? realPath(absolute, file) : path.join(parentOf(absolute), path.basename(absolute));
  const place = KERNEL_PLACES.find((each) => resolved.startsWith(`${each}/`));
  if (place !== undefined && fs.statSync(path.dirname(resolved)).dev === fs.statSync(place).dev) {
    throw new OperationError(
      'BAD_FILE',
      `${file} is in ${place}, and no device: a file there would be in memory, or nowhere; look at the name again`,
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
      `${file} is a symbolic link that leads nowhere; remove it, or give the name of the file itself`,
      { cause: error },
    );
  }
}

function parentOf(absolute: string): string {
  const parent = path.dirname(absolute);
  const status = fs.statSync(parent, { throwIfNoEntry: false });
  if (!status) throw new OperationError('BAD_FILE', `${parent} does not exist; make it, or mount what belongs there`);
  if (!status.isDirectory()) throw new OperationError('BAD_FILE', `${parent} is not a directory; give another name`);
  return fs.realpathSync(parent);
}

function toStdout(): ImageTarget {
  if (process.stdout.isTTY) {
    throw new OperationError('BAD_USAGE', 'a disk image does not belong on a terminal; redirect stdout or name a file');
  }
  // What Node cannot write, a block device above all, it hands out as a stream that takes everything and writes nothing
  // (lib/internal/bootstrap/switches/is_main_thread.js, createWritableStdioStream).
  if (Object.getPrototypeOf(process.stdout) === Writable.prototype) {
    const what = fs.fstatSync(STDOUT_FD).isBlockDevice() ? 'a block device' : 'nothing that an image can be written to';
    throw new OperationError(
      'BAD_USAGE',
      `stdout is ${what}: name a file or device instead of redirecting to it (${stdoutName()}); nothing was written`,
    );
  }
  return toStream(process.stdout, 'stdout', { isOurs: false });
}

function stdoutName(): string {
  try {
    return fs.readlinkSync(`/proc/self/fd/${STDOUT_FD}`);
  } catch {
    return 'its name is not known';
  }
}

/** Not before it has a reader; not without one either, when that has left: then a write is an error (fifo(7)). */
async function toFifo(file: string, { log, signal }: Context): Promise<ImageTarget> {
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
    if (!isSaid) log(`waiting for somebody to read ${file}`);
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

/** `isOurs`: to be closed by us; of an image that has failed nobody waits for what a device still does. */
function toStream(stream: Writable, name: string, { isOurs }: { readonly isOurs: boolean }): ImageTarget {
  // The write that failed says it; without a listener the stream would end the process before anything is cleaned up.
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

/** What is there now is no image, and nothing else either. */
function notComplete(error: unknown, name: string): unknown {
  if (!isSystemError(error)) return error;
  const why = error.code === 'EPIPE' ? 'its reader is gone' : reasonOf(error);
  return new OperationError('INCOMPLETE', `the image on ${name} is not complete: ${why}`, { cause: error });
}

/** `given`: what the operator calls it. */
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

/** What went wrong with the file, and the way out. What the disk's errors say they say themselves. */
function notWritten(error: unknown, file: string, size: number): unknown {
  if (!isSystemError(error)) return error;
  const { code } = error;
  const cause = { cause: error };
  if (SPACE_CODES.has(code)) {
    const why = `no space left for ${file} (${code}), and nothing of it was kept`;
    return new OperationError('NO_SPACE', `${why}: make room in ${path.dirname(file)}, or give another place`, cause);
  }
  if (code === 'EFBIG') {
    const why = `the filesystem of ${file} has no files of ${size} bytes`;
    return new OperationError('BAD_SIZE', `${why}; give another place, or - and split what comes`, cause);
  }
  return new OperationError(
    'BAD_FILE',
    `${file} was not written, nothing of it was kept: ${systemMessage(error, file)}`,
    cause,
  );
}

function toBlockDevice(device: BlockDevice, { log }: Context): ImageTarget {
  const copy: Copy = async (disk, progress, signal) => {
    const { file, size } = device;
    if (size < disk.size) {
      throw new OperationError(
        'BAD_SIZE',
        `${file} has ${size} bytes, and the image ${disk.size}: it does not fit; nothing was written`,
      );
    }
    try {
      const zero = (offset: number, length: number): Promise<void> => device.zero(offset, length, signal);
      const copied = await copyDiskToFile(disk, device.fd, { progress, signal, zero });
      await device.sync();
      return copied;
    } catch (error) {
      const told = notComplete(error, file);
      // Interrupted, or it could not be read: that is the error, and this what it leaves behind.
      if (told === error) log(`the image on ${file} is not complete: export it again`);
      throw told;
    }
  };
  return { copy, finish: () => device.close(), abandon: () => device.close().catch(() => undefined) };
}
