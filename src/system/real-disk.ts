/**
 * The real disk: each method of HostDisk is its system call and nothing else, so that calls on the data path cost the same
 * as without the seam. src/store/local and the backup targets in src/jobs reach files only through a HostDisk
 * (test/system/disk-seam.test.ts).
 */
import fs from 'node:fs';
import { bootIdOfKernel } from './boot-id.js';
import * as libc from './libc.js';
import { mountIdentity } from './mount-identity.js';
import type { HostDisk, Reserved } from './disk.js';
import { NodeFiles } from './node-files.js';

class RealDisk extends NodeFiles implements HostDisk {
  tryLockSync(fd: number, options?: { readonly shared?: boolean }): boolean {
    return libc.tryLock(fd, options);
  }

  memoryFileSync(name: string, length: number): number | undefined {
    return libc.memoryFile(name, length);
  }

  readCachedSync(fd: number, into: Buffer, offset: number): number {
    return libc.readNoWait(fd, into, offset);
  }

  punchHole(fd: number, offset: number, length: number): Promise<boolean> {
    return libc.punchHole(fd, offset, length);
  }

  zeroRange(fd: number, offset: number, length: number): Promise<boolean> {
    return libc.zeroRange(fd, offset, length);
  }

  canPunchHoleSync(fd: number, length: number): boolean {
    return libc.canPunchHole(fd, length);
  }

  canZeroRangeSync(fd: number, length: number): boolean {
    return libc.canZeroRange(fd, length);
  }

  reserveSync(fd: number, offset: number, length: number): Reserved {
    return libc.reserve(fd, offset, length);
  }

  nextData(fd: number, offset: number): Promise<number> {
    return libc.nextData(fd, offset);
  }

  nextHole(fd: number, offset: number): Promise<number> {
    return libc.nextHole(fd, offset);
  }

  clone(from: number, to: number): Promise<boolean> {
    return libc.cloneFile(from, to);
  }

  copyRange(from: number, to: number, offset: number, length: number): Promise<number> {
    return libc.copyRange(from, to, offset, length);
  }

  willNeed(fd: number, offset: number, length: number): Promise<void> {
    return libc.willNeed(fd, offset, length);
  }

  dropCached(fd: number): Promise<void> {
    return libc.dropCached(fd);
  }

  syncfs(fd: number): Promise<void> {
    return libc.syncFilesystem(fd);
  }

  openDatabase<T>(_fd: number, open: () => T): T {
    return open();
  }

  commit(_fd: number, transaction: () => Promise<void>): Promise<void> {
    return transaction();
  }

  closeDatabase(_fd: number, close: () => Promise<void>): Promise<void> {
    return close();
  }

  inodeOfSync(fd: number): bigint {
    return fs.fstatSync(fd, { bigint: true }).ino;
  }

  inodeAtSync(path: string): bigint {
    return fs.statSync(path, { bigint: true }).ino;
  }

  mountingSync(path: string): string {
    return mountIdentity(path);
  }

  bootId(): string | undefined {
    return bootIdOfKernel();
  }
}

/**
 * For tests of a whole process. A module that is loaded first (node --import) may put a function under this symbol into
 * globalThis: it gets the real disk and returns the disk to use.
 */
const REPLACED = Symbol.for('sheepgate.hostDisk');

function diskOfThisProcess(): HostDisk {
  const real = new RealDisk();
  const replaced = (globalThis as { [REPLACED]?: (disk: HostDisk) => HostDisk })[REPLACED];
  return replaced === undefined ? real : replaced(real);
}

/** The disk of this machine. */
export const hostDisk: HostDisk = diskOfThisProcess();
