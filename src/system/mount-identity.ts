/**
 * Which mounting of which filesystem a directory is on, as text to compare. An unmount may lose data of the page cache, the
 * end of a process does not; and the kernel has no single number for "the same mounting":
 * - ext4, XFS, F2FS and btrfs have a folder in /sys/fs while they are mounted anywhere. Each such folder has a new inode
 *   number (fs/kernfs/dir.c, kernfs_new_node). Namespaces do not matter: a service that is started again in its own mount
 *   namespace is on the same mounting.
 * - The content of a tmpfs does not survive an unmount.
 * - On other filesystems it is the number of the mount, never reused since Linux 6.8 (statx(2), STATX_MNT_ID_UNIQUE). It
 *   differs between mount namespaces. Before 6.8 mountings cannot be told apart; only the device number is left.
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

/** One line without blanks at its ends. Unknown parts are left out. Errors: those of stat(2) and statfs(2). */
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

/** The device number of a btrfs is not that of a device: its folder is found by one of the devices that it consists of. */
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
