/**
 * Where an import reads its image from: a file or block device, at any offset, or a stream, once and in order. Owns the
 * descriptor, and the checks before anything is written: its length, and that it is a raw image.
 */
import fs from 'node:fs';
import type { Readable } from 'node:stream';
import { asFileError } from './file-errors.js';
import { OperationError } from '../operations/operations.js';
import { chunksOf } from './disk-copy.js';
import { foreignHead, foreignTail, HEAD_BYTES, TAIL_BYTES, type ForeignFormat } from './image-formats.js';
import { blockDeviceAttribute } from '../system/sysfs.js';

const STDIN = '-';
const STDIN_FD = 0;
const SECTOR_BYTES = 512;

export interface SourceOptions {
  /** Import it even if it looks like another format. */
  readonly isRaw: boolean;
  /** The VDI to be made, for messages. */
  readonly vdi: string;
  /** Read for "-". Undefined: descriptor 0 of this process. */
  readonly stdin?: Readable | undefined;
}

interface Common {
  /** For messages. */
  readonly name: string;
  /** Not a file or device that was named, but a pipe or a redirection of the shell. */
  readonly isFed: boolean;
  /** `tail`: the last TAIL_BYTES of the image, or fewer. Errors: BAD_FORMAT (the end is not that of a raw image). */
  inspectTail(tail: Buffer): void;
  close(): void;
}

/** Already checked: it is not empty, and is a raw image. */
export interface FileSource extends Common {
  readonly kind: 'file';
  readonly fd: number;
  readonly length: number;
}

export interface StreamSource extends Common {
  readonly kind: 'stream';
  /** Bytes to come, where that is known: of a file that the shell redirected. */
  readonly length: number | undefined;
  /**
   * Wait for the first bytes. Errors: BAD_FILE (empty), BAD_FORMAT (the beginning is not that of a raw image), and the
   * signal's reason.
   */
  begin(signal: AbortSignal): Promise<void>;
  /** The whole image, in chunks; after `begin`, once. Errors: the signal's reason. */
  chunks(signal: AbortSignal): AsyncIterable<Buffer>;
}

export type ImageSource = FileSource | StreamSource;

/** Errors: BAD_FILE (no image can be there), BAD_FORMAT (another format), and those of the system. */
export function openSource(file: string, options: SourceOptions): ImageSource {
  if (file === STDIN) return openStdin(options);
  const fd = fs.openSync(file, 'r');
  try {
    const status = fs.fstatSync(fd);
    if (status.isDirectory()) throw new OperationError('BAD_FILE', `${file} is a directory, not a disk image`);
    if (status.isFile() || status.isBlockDevice()) return fileSource(fd, file, file, options, () => fs.closeSync(fd));
    // Destroying the stream closes the descriptor.
    return streamSource(fs.createReadStream('', { fd }), file, file, undefined, options);
  } catch (error) {
    fs.closeSync(fd);
    throw asFileError(error, file);
  }
}

/** stdin may be a pipe, or a file of which another program has read a part. */
function openStdin(options: SourceOptions): ImageSource {
  if (options.stdin) return streamSource(options.stdin, 'stdin', undefined, undefined, options);
  const status = fs.fstatSync(STDIN_FD);
  if (status.isDirectory()) throw new OperationError('BAD_FILE', 'stdin is a directory, not a disk image');
  if (!status.isFile() && !status.isBlockDevice()) {
    return streamSource(process.stdin, 'stdin', undefined, undefined, options);
  }
  const position = positionOf(STDIN_FD);
  if (position === 0) return fileSource(STDIN_FD, 'stdin', undefined, options, () => undefined);
  const length = Math.max(0, lengthOf(STDIN_FD, 'stdin') - position);
  // From the current offset. Not process.stdin: Node makes an empty stream of a block device.
  const rest = fs.createReadStream('', { fd: STDIN_FD, autoClose: false });
  return streamSource(rest, 'stdin', undefined, length, options);
}

function fileSource(
  fd: number,
  name: string,
  path: string | undefined,
  options: SourceOptions,
  close: () => void,
): FileSource {
  const length = lengthOf(fd, name);
  if (length === 0) throw new OperationError('BAD_FILE', `${name} is empty`);
  const refuse = refusalOf(name, path, options);
  refuse(foreignHead(readAt(fd, 0, Math.min(HEAD_BYTES, length))));
  const tailBytes = Math.min(TAIL_BYTES, length);
  refuse(foreignTail(readAt(fd, length - tailBytes, tailBytes)));
  return { kind: 'file', name, isFed: path === undefined, fd, length, inspectTail: () => undefined, close };
}

function streamSource(
  stream: Readable,
  name: string,
  path: string | undefined,
  length: number | undefined,
  options: SourceOptions,
): StreamSource {
  const refuse = refusalOf(name, path, options);
  // Taking a chunk reports an error; before the first chunk and after the last nothing would listen.
  stream.on('error', () => undefined);
  const pieces = chunksOf(stream)[Symbol.asyncIterator]();
  let first: Buffer | undefined;
  return {
    kind: 'stream',
    name,
    isFed: true,
    length,
    begin: (signal) =>
      stoppable(stream, signal, async () => {
        const next = await pieces.next();
        if (next.done) throw new OperationError('BAD_FILE', `${name} is empty`);
        refuse(foreignHead(next.value));
        first = next.value;
      }),
    async *chunks(signal) {
      if (!first) throw new Error('invariant: a stream is read before begin()');
      yield first;
      for (;;) {
        const next = await stoppable(stream, signal, () => pieces.next());
        if (next.done) return;
        yield next.value;
      }
    },
    inspectTail: (tail) => refuse(foreignTail(tail)),
    close: () => void stream.destroy(),
  };
}

/** Run `work`, which waits for the stream; an abort ends the wait. */
async function stoppable<T>(stream: Readable, signal: AbortSignal, work: () => Promise<T>): Promise<T> {
  signal.throwIfAborted();
  const stop = (): void => void stream.destroy(signal.reason as Error);
  signal.addEventListener('abort', stop, { once: true });
  try {
    return await work();
  } finally {
    signal.removeEventListener('abort', stop);
  }
}

function refusalOf(
  name: string,
  path: string | undefined,
  { isRaw, vdi }: SourceOptions,
): (format: ForeignFormat | undefined) => void {
  return (format) => {
    if (!format || isRaw) return;
    throw new OperationError(
      'BAD_FORMAT',
      `${name} is ${format.name}, not a raw image: ${format.remedy(path, vdi)}; --raw imports its bytes as they are`,
    );
  };
}

/** Errors: CHANGED (the file became shorter). */
function readAt(fd: number, offset: number, length: number): Buffer {
  const bytes = Buffer.alloc(length);
  for (let done = 0; done < length;) {
    const count = fs.readSync(fd, bytes, done, length - done, offset + done);
    if (count === 0) throw new OperationError('CHANGED', 'the file became shorter while it was read');
    done += count;
  }
  return bytes;
}

function lengthOf(fd: number, name: string): number {
  const status = fs.fstatSync(fd);
  return status.isFile() ? status.size : blockDeviceSize(status.rdev, name);
}

/** The size of a block device comes from sysfs: fstat does not report it. */
function blockDeviceSize(rdev: number, name: string): number {
  const sectors = Number(blockDeviceAttribute(rdev, 'size'));
  if (!Number.isSafeInteger(sectors)) throw new OperationError('BAD_FILE', `cannot tell the size of ${name}`);
  return sectors * SECTOR_BYTES;
}

/** proc_pid_fdinfo(5): "pos:", the offset at which the next read begins. */
function positionOf(fd: number): number {
  const [, position] = /^pos:\s*(\d+)$/m.exec(fs.readFileSync(`/proc/self/fdinfo/${fd}`, 'utf8')) ?? [];
  return Number(position ?? 0);
}
