/**
 * A disk in a file or on a block device. It owns the descriptor, and when a write is durable; it takes no lock, and caches
 * nothing.
 */

import { constants } from 'node:fs';
import { open, unlink, type FileHandle } from 'node:fs/promises';
import { dirname } from 'node:path';
import { fileURLToPath } from 'node:url';
import {
  ALLOCATION_CONTEXT,
  DeviceError,
  type CompleteDevice,
  type ExtentSink,
  type Geometry,
  type ZeroMode,
} from '../block-device.js';
import { completeGeometry } from '../device.js';
import { reportHoles, shorter, zeroRange, type FileCalls } from './file-calls.js';
import { sizeOf } from './file-size.js';
import { Syncs } from './syncs.js';

export type { FileCalls } from './file-calls.js';

/** Zeros are written in pieces of this size, bytes. */
const ZERO_PIECE_BYTES = 1024 * 1024;

/** Options of `fileDevice`. */
export interface FileOptions {
  /** Open for reading only. */
  readonly readOnly?: boolean;
  /** Make the file if it is not there: `size` bytes, all a hole. An existing file is opened as it is. */
  readonly create?: boolean;
  /** Bytes. For `create`; a file that exists must have this size. */
  readonly size?: number;
  /** Permissions of a new file; by default 0o600. */
  readonly mode?: number;
  /** What Node cannot do with sparse files. */
  readonly calls?: FileCalls;
}

/**
 * A disk in the regular file or on the block device `path`, open until the device is closed. Its size is that of the file when it
 * is opened, and need not be a multiple of anything. A flush, and a write with FUA, is an fdatasync; once one has failed, all
 * further flushes and changes fail, because nobody knows what is on the disk. If somebody else truncates the file, reads behind
 * its end fail with EIO.
 *
 * Several devices, and several processes, may have one file open and see each other's writes (`multiConn`). There is no lock:
 * Node has none. Whether two writers know of each other is up to the caller.
 *
 * Node can neither find holes in a file nor make them: without `calls`, no extents are reported, zeros are written, and trim is
 * not offered. A new file is sparse nevertheless, where nothing was written.
 *
 * Errors: those of Node (ENOENT, EACCES, …); DeviceError EINVAL if it is something else, or has not the given size.
 */
export async function fileDevice(path: string | URL, options: FileOptions = {}): Promise<CompleteDevice> {
  const name = typeof path === 'string' ? path : fileURLToPath(path);
  const file = await openFile(name, options);
  try {
    const { isBlockDevice, size } = await sizeOf(file, name);
    if (options.size !== undefined && options.size !== size) {
      throw new DeviceError('EINVAL', `${name} has ${size} bytes, not ${options.size}`);
    }
    return new FileDevice(file, size, isBlockDevice, options);
  } catch (error) {
    await file.close();
    throw error;
  }
}

async function openFile(name: string, { readOnly, create, size, mode = 0o600 }: FileOptions): Promise<FileHandle> {
  // Not to wait for the other end of a fifo, which is refused then.
  const flags = (readOnly === true ? constants.O_RDONLY : constants.O_RDWR) | constants.O_NONBLOCK;
  if (create !== true) return open(name, flags);
  if (size === undefined || !Number.isSafeInteger(size) || size < 0) {
    throw new RangeError(`create needs a size, an integer from 0 to 2^53-1; it is ${size}`);
  }
  let file: FileHandle;
  try {
    // Linux lets the one who makes a file write to it whatever its mode is; a read-only device needs a size as well.
    file = await open(name, constants.O_RDWR | constants.O_CREAT | constants.O_EXCL, mode);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EEXIST') return open(name, flags);
    throw error;
  }
  try {
    await file.truncate(size);
    // The new size and the new name are metadata that no fdatasync of a later write covers.
    await file.sync();
    await syncDirectory(dirname(name));
    return file;
  } catch (error) {
    await file.close();
    await unlink(name);
    throw error;
  }
}

async function syncDirectory(name: string): Promise<void> {
  const directory = await open(name, constants.O_RDONLY);
  try {
    await directory.sync();
  } finally {
    await directory.close();
  }
}

class FileDevice implements CompleteDevice {
  readonly geometry: Geometry;
  readonly fillsBuffer = true;
  readonly #file: FileHandle;
  readonly #syncs: Syncs;
  readonly #lseek: FileCalls['lseek'];
  readonly #fallocate: FileCalls['fallocate'];

  constructor(file: FileHandle, size: number, isBlockDevice: boolean, { readOnly = false, calls }: FileOptions) {
    this.#file = file;
    this.#syncs = new Syncs(() => file.datasync());
    // lseek finds no holes on block devices.
    this.#lseek = isBlockDevice ? undefined : calls?.lseek;
    this.#fallocate = calls?.fallocate;
    const canPunch = this.#fallocate !== undefined && !readOnly;
    const isWritable = { canFlush: !readOnly, canFua: !readOnly, canZero: !readOnly };
    this.geometry = completeGeometry({
      ...{ size, readOnly, ...isWritable, canTrim: canPunch, canFastZero: canPunch, multiConn: true },
      contexts: this.#lseek === undefined ? [] : [ALLOCATION_CONTEXT],
    });
  }

  async read(offset: number, into: Buffer): Promise<void> {
    for (let done = 0; done < into.length;) {
      const { bytesRead } = await this.#file.read(into, done, into.length - done, offset + done);
      if (bytesRead === 0) throw shorter(offset + done);
      done += bytesRead;
    }
  }

  async write(offset: number, data: Buffer, fua: boolean): Promise<void> {
    this.#checkWritable();
    await this.#writeAll(offset, data);
    if (fua) await this.#syncs.request();
  }

  flush(): Promise<void> {
    return this.#syncs.request();
  }

  async zero(offset: number, length: number, mode: ZeroMode, signal?: AbortSignal): Promise<void> {
    this.#checkWritable();
    const fallocate = this.#fallocate;
    const isDone = fallocate && (await zeroRange(fallocate, this.#file.fd, offset, length, mode.noHole));
    if (isDone !== true) {
      if (mode.fastZero) throw new DeviceError('ENOTSUP', 'zeros are written to this file, which is not fast');
      await this.#writeZeros(offset, length, signal);
    }
    if (mode.fua) await this.#syncs.request();
  }

  async trim(offset: number, length: number, fua: boolean): Promise<void> {
    if (this.#fallocate === undefined) throw new DeviceError('ENOTSUP', 'Node cannot make holes in files');
    this.#checkWritable();
    // A filesystem without holes keeps the data, and so does a block device for parts of blocks: a trim allows it.
    await zeroRange(this.#fallocate, this.#file.fd, offset, length, false);
    if (fua) await this.#syncs.request();
  }

  cache(): void {
    throw new DeviceError('ENOTSUP', 'Node cannot read ahead in files');
  }

  async extents(_context: string, offset: number, length: number, sink: ExtentSink): Promise<void> {
    if (this.#lseek === undefined) throw new DeviceError('ENOTSUP', 'Node cannot find holes in files');
    await reportHoles(this.#lseek, this.#file.fd, offset, offset + length, sink);
  }

  close(): Promise<void> {
    return this.#file.close();
  }

  #checkWritable(): void {
    if (this.geometry.readOnly) throw new DeviceError('EPERM', 'the file is open for reading only');
    this.#syncs.check();
  }

  async #writeAll(offset: number, data: Buffer): Promise<void> {
    for (let done = 0; done < data.length;) {
      const { bytesWritten } = await this.#file.write(data, done, data.length - done, offset + done);
      if (bytesWritten === 0) throw new DeviceError('EIO', 'the file takes no data', { offset: offset + done });
      done += bytesWritten;
    }
  }

  async #writeZeros(offset: number, length: number, signal: AbortSignal | undefined): Promise<void> {
    const zeros = Buffer.alloc(Math.min(length, ZERO_PIECE_BYTES));
    const end = offset + length;
    for (let at = offset; at < end; at += zeros.length) {
      if (signal?.aborted === true) throw new DeviceError('ESHUTDOWN', 'the client has gone', { offset: at });
      await this.#writeAll(at, end - at < zeros.length ? zeros.subarray(0, end - at) : zeros);
    }
  }
}
