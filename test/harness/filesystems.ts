/**
 * Small filesystems for tests of failing disks: full, read-only, gone. Owns its mounts, and unmounts them when the test file
 * ends. Needs root: without it functions return undefined, and the test is skipped.
 */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import koffi from 'koffi';
import { afterAll } from 'vitest';
import { temporaryDirectory } from './daemon.js';

/** ext4's and XFS's, fs/ext4/ext4.h EXT4_IOC_SHUTDOWN: _IOR('X', 125, __u32). */
const IOC_SHUTDOWN = 0x8004587d;
/** Changes that are not in the filesystem's journal yet are lost, as if the disk had been unplugged. */
const WITHOUT_FLUSHING = 2;

const libc = koffi.load('libc.so.6');
const ioctl = libc.func('int ioctl(int fd, ulong request, void *argument)');
/** Mount point -> image, if there is one. */
const mounted = new Map<string, string | undefined>();

afterAll(() => {
  for (const directory of [...mounted.keys()].reverse()) unmount(directory);
});

function mount(args: readonly string[], image?: string): string | undefined {
  const directory = path.join(temporaryDirectory(), 'fs');
  fs.mkdirSync(directory);
  try {
    execFileSync('mount', [...args, directory], { stdio: 'ignore' });
  } catch {
    return undefined;
  }
  mounted.set(directory, image);
  return directory;
}

export function mountTmpfs(size: string): string | undefined {
  return mount(['-t', 'tmpfs', '-o', `size=${size}`, 'sheepgate-test']);
}

/** On a loop device that the unmount detaches. */
export function mountImage(
  type: 'ext4' | 'xfs',
  bytes: number,
  image = path.join(temporaryDirectory(), 'image'),
): string | undefined {
  fs.closeSync(fs.openSync(image, 'w'));
  fs.truncateSync(image, bytes);
  try {
    execFileSync(`mkfs.${type}`, ['-q', image], { stdio: 'ignore' });
  } catch {
    return undefined;
  }
  return mount(['-o', 'loop', image], image);
}

/** A filesystem that is in `image` already, also one of which another copy is mounted. */
export function mountCopy(type: 'ext4' | 'xfs', image: string): string | undefined {
  return mount(['-o', type === 'xfs' ? 'loop,nouuid' : 'loop', image], image);
}

/** A disk of `bytes` that can store only as much as `within` has room for: a thin volume of a pool that is too small. */
export function mountThin(within: string, bytes: number): string | undefined {
  const image = path.join(within, 'thin');
  fs.closeSync(fs.openSync(image, 'w'));
  fs.truncateSync(image, bytes);
  try {
    // Without a journal: with one, the first error would shut the filesystem down.
    execFileSync('mkfs.ext4', ['-q', '-O', '^has_journal', image], { stdio: 'ignore' });
  } catch {
    return undefined;
  }
  return mount(['-o', 'loop', image], image);
}

export function mountReadOnly(directory: string): string | undefined {
  const made = mount(['--bind', directory]);
  if (made !== undefined) execFileSync('mount', ['-o', 'remount,ro,bind', made]);
  return made;
}

export function unmount(directory: string): void {
  mounted.delete(directory);
  execFileSync('umount', ['-l', directory]);
}

/** The disk of a filesystem from `mountImage` is back: mount it again at the same place. */
export function mountAgain(directory: string): void {
  const image = mounted.get(directory);
  if (image === undefined) throw new Error(`${directory} is not from mountImage`);
  execFileSync('umount', [directory]);
  execFileSync('mount', ['-o', 'loop', image, directory]);
}

/** From now on every access to the disk is EIO. Written data is on the disk, unless `unsynced`. */
export function shutDown(directory: string, { unsynced = false } = {}): void {
  if (!unsynced) execFileSync('sync', ['-f', directory]);
  const fd = fs.openSync(directory, 'r');
  const how = Buffer.alloc(4);
  how.writeUInt32LE(WITHOUT_FLUSHING);
  const result = ioctl(fd, IOC_SHUTDOWN, how) as number;
  fs.closeSync(fd);
  if (result !== 0) throw new Error(`the filesystem cannot be shut down: errno ${koffi.errno()}`);
}

/** Fill the filesystem to the last byte. Returns the file to remove to make room. */
export function fill(directory: string): string {
  const file = path.join(directory, 'filler');
  const fd = fs.openSync(file, 'a');
  for (let length = 2 ** 20; length >= 1; length = length === 1 ? 0 : Math.floor(length / 16)) {
    try {
      for (;;) if (fs.writeSync(fd, Buffer.alloc(length)) < length) break;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOSPC') throw error;
    }
  }
  fs.closeSync(fd);
  return file;
}
