/**
 * Which mounting of which filesystem a directory is on, as text to be compared. What is in the page cache is lost when a
 * filesystem is unmounted and is not when a process ends, and the kernel has no one number for "the same mounting":
 * - ext4, XFS, F2FS and btrfs have a folder in /sys/fs for as long as they are mounted somewhere; its inode number is new
 *   with each (fs/kernfs/dir.c, kernfs_new_node). Namespaces do not matter: a service that is started again in a mount
 *   namespace of its own is on the same mounting.
 * - What a tmpfs holds cannot come back after it.
 * - Elsewhere it is the number of the mount, never given twice since Linux 6.8 (statx(2), STATX_MNT_ID_UNIQUE), which is
 *   another one in each mount namespace. Before 6.8 nothing tells: the device's number has to do.
 */
import fs from 'node:fs';
import path from 'node:path';
import * as libc from './libc.js';

/** statfs(2), f_type. */
const EXT4_MAGIC = 0xef53;
const XFS_MAGIC = 0x58465342;
const F2FS_MAGIC = 0xf2f52010;
const BTRFS_MAGIC = 0x9123683e;
const TMPFS_MAGIC = 0x01021994;
const FOLDER_OF: Readonly<Record<number, string>> = { [EXT4_MAGIC]: 'ext4', [XFS_MAGIC]: 'xfs', [F2FS_MAGIC]: 'f2fs' };

/** One line without blanks at its ends. Never fails: what cannot be found out is left out. */
export function mountIdentity(directory: string): string {
  const { dev } = fs.statSync(directory, { bigint: true });
  return `${dev} ${mounting(directory, dev)}`;
}

function mounting(directory: string, dev: bigint): string {
  const type = Number(fs.statfsSync(directory, { bigint: true }).type & 0xffffffffn);
  if (type === TMPFS_MAGIC) return 'tmpfs';
  const folder = FOLDER_OF[type];
  const device = folder === undefined ? undefined : blockDeviceName(dev);
  const inSys =
    folder !== undefined && device !== undefined
      ? numberOf(path.join('/sys/fs', folder, device))
      : type === BTRFS_MAGIC
        ? btrfsNumber(directory)
        : undefined;
  if (inSys !== undefined) return `sysfs ${inSys}`;
  const mount = libc.uniqueMountId(directory);
  return mount === undefined ? 'unknown' : `mount ${mount}`;
}

/** sda1, dm-0. */
function blockDeviceName(dev: bigint): string | undefined {
  const major = ((dev >> 8n) & 0xfffn) | ((dev >> 32n) & ~0xfffn);
  const minor = (dev & 0xffn) | ((dev >> 12n) & 0xffffff00n);
  try {
    return path.basename(fs.readlinkSync(`/sys/dev/block/${major}:${minor}`));
  } catch {
    return undefined;
  }
}

/** A btrfs has a device number of no device: the way to its folder is a device that it is made of. */
function btrfsNumber(directory: string): bigint | undefined {
  try {
    const mount = libc.mountId(directory);
    const line = fs
      .readFileSync('/proc/self/mountinfo', 'utf8')
      .split('\n')
      .find((each) => each.startsWith(`${mount} `));
    // proc_pid_mountinfo(5): after " - " type, source, options; blanks as \040
    const source = line
      ?.split(' - ')[1]
      ?.split(' ')[1]
      ?.replace(/\\(\d{3})/g, (_, octal: string) => String.fromCharCode(parseInt(octal, 8)));
    if (source === undefined) return undefined;
    const name = blockDeviceName(fs.statSync(source, { bigint: true }).rdev);
    if (name === undefined) return undefined;
    const uuid = fs.readdirSync('/sys/fs/btrfs').find((each) => fs.existsSync(`/sys/fs/btrfs/${each}/devices/${name}`));
    return uuid === undefined ? undefined : numberOf(`/sys/fs/btrfs/${uuid}`);
  } catch {
    return undefined;
  }
}

function numberOf(folder: string): bigint | undefined {
  return fs.statSync(folder, { bigint: true, throwIfNoEntry: false })?.ino;
}
