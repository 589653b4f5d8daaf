/**
 * The holes of a file: calls of the system that Node does not have and a program may provide. It owns their constants, which are
 * Linux's, and the meaning of their errors; it knows neither requests nor sizes of devices.
 */

import { getSystemErrorName } from 'node:util';
import { DeviceError, STATE_HOLE, STATE_ZERO, type Awaitable, type ExtentSink } from '../block-device.js';

const SEEK_END = 2;
const SEEK_DATA = 3;
const SEEK_HOLE = 4;
const KEEP_SIZE = 0x01;
const PUNCH_HOLE = 0x02;
const ZERO_RANGE = 0x10;
const ENXIO = 6;
const EINVAL = 22;
const ENOSYS = 38;
const EOPNOTSUPP = 95;

/**
 * Calls of Linux for sparse files, which Node does not have: from koffi, bun:ffi or Deno.dlopen, for example. Both return what
 * the system returns, or the negated errno.
 */
export interface FileCalls {
  /** lseek(2). With it, holes of a regular file are reported as such. */
  readonly lseek?: (fd: number, offset: number, whence: number) => Awaitable<number>;
  /** fallocate(2). With it, trims and zeros make holes, and fast zeros are possible. */
  readonly fallocate?: (fd: number, mode: number, offset: number, length: number) => Awaitable<number>;
}

/** Report data and holes of [offset, end) by lseek. Errors: DeviceError EIO if the file ends before `offset`. */
export async function reportHoles(
  lseek: NonNullable<FileCalls['lseek']>,
  fd: number,
  offset: number,
  end: number,
  sink: ExtentSink,
): Promise<void> {
  const seek = async (at: number, whence: number): Promise<number | undefined> => {
    const answer = await lseek(fd, at, whence);
    if (answer === -ENXIO) return undefined;
    if (answer < 0) throw systemError('lseek', answer);
    return answer;
  };
  const fileEnd = Math.min(end, (await seek(0, SEEK_END)) ?? 0);
  if (offset >= fileEnd) throw shorter(offset);
  for (let at = offset; at < fileEnd;) {
    const data = (await seek(at, SEEK_DATA)) ?? fileEnd;
    const isHole = data > at;
    const next = Math.min(fileEnd, isHole ? data : ((await seek(at, SEEK_HOLE)) ?? fileEnd));
    if (next <= at) throw new DeviceError('EIO', `lseek answered ${next} for ${at}`);
    if (!sink(at, next - at, isHole ? STATE_HOLE | STATE_ZERO : 0)) return;
    at = next;
  }
}

/**
 * Make [offset, offset+length) zeros by fallocate. False: the filesystem cannot, or not this range. `isKept`: it stays allocated.
 * Errors: those of fallocate, as Node's.
 */
export async function zeroRange(
  fallocate: NonNullable<FileCalls['fallocate']>,
  fd: number,
  offset: number,
  length: number,
  isKept: boolean,
): Promise<boolean> {
  const answer = await fallocate(fd, KEEP_SIZE | (isKept ? ZERO_RANGE : PUNCH_HOLE), offset, length);
  // A block device refuses parts of its blocks with EINVAL.
  if (answer === -EOPNOTSUPP || answer === -ENOSYS || answer === -EINVAL) return false;
  if (answer < 0) throw systemError('fallocate', answer);
  return true;
}

/** The file ends before a byte that it had when it was opened. */
export function shorter(offset: number): DeviceError {
  return new DeviceError('EIO', `the file has become shorter: byte ${offset} is not in it any more`, { offset });
}

function systemError(call: string, negatedErrno: number): Error {
  const code = getSystemErrorName(negatedErrno);
  return Object.assign(new Error(`${code}: ${call}`), { code, errno: negatedErrno, syscall: call });
}
