/** lseek and fallocate of the system for devices in files: what a program with a foreign function interface provides. */

import koffi from 'koffi';
import type { FileCalls } from '../src/devices/file.js';

const libc = koffi.load('libc.so.6');
const lseek = libc.func('int64_t lseek(int fd, int64_t offset, int whence)') as (...args: number[]) => number | bigint;
const fallocate = libc.func('int fallocate(int fd, int mode, int64_t offset, int64_t length)') as (
  ...args: number[]
) => number;

const orErrno = (result: number | bigint): number => (Number(result) === -1 ? -koffi.errno() : Number(result));

export const fileCalls: FileCalls = {
  lseek: (fd, offset, whence) => orErrno(lseek(fd, offset, whence)),
  fallocate: (fd, mode, offset, length) => orErrno(fallocate(fd, mode, offset, length)),
};
