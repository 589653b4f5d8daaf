/**
 * A filesystem of its own for a test, in a file behind a loop device, which can be shut down under its users like one
 * whose disk is unplugged, and be mounted again. Owns the mount and the file until `remove`.
 */
import { execFileSync, spawnSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';

const SIZE = '512M';
/** FS_IOC_SHUTDOWN with FS_SHUTDOWN_FLAGS_NOLOGFLUSH (fs/ext4/ext4.h, fs/xfs/xfs_fs.h): what is not on the disk is lost. */
const SHUT_DOWN = `
import fcntl, os, struct, sys
fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587d, struct.pack('I', 2))
`;

export class ShutDownFilesystem {
  /** Where it is mounted. */
  readonly directory: string;
  readonly #image: string;

  private constructor(directory: string, image: string) {
    this.directory = directory;
    this.#image = image;
  }

  /** In `parent`; or why it cannot be had here. */
  static make(type: 'ext4' | 'xfs', parent: string): ShutDownFilesystem | string {
    const image = path.join(parent, `${type}.img`);
    const directory = path.join(parent, type);
    fs.closeSync(fs.openSync(image, 'w'));
    execFileSync('truncate', ['-s', SIZE, image]);
    const made = spawnSync(`mkfs.${type}`, ['-q', image], { encoding: 'utf8' });
    if (made.status !== 0) return `mkfs.${type}: ${made.error?.message ?? made.stderr}`;
    fs.mkdirSync(directory);
    const filesystem = new ShutDownFilesystem(directory, image);
    const mounted = filesystem.#mount();
    return mounted ?? filesystem;
  }

  shutDown(): void {
    execFileSync('python3', ['-c', SHUT_DOWN, this.directory]);
  }

  mountAgain(): void {
    execFileSync('umount', [this.directory]);
    const problem = this.#mount();
    if (problem !== undefined) throw new Error(problem);
  }

  remove(): void {
    spawnSync('umount', ['-l', this.directory]);
    fs.rmSync(this.#image, { force: true });
  }

  #mount(): string | undefined {
    const { status, error, stderr } = spawnSync('mount', ['-o', 'loop', this.#image, this.directory], {
      encoding: 'utf8',
    });
    return status === 0 ? undefined : `mounting a loop device: ${error?.message ?? stderr}`;
  }
}
