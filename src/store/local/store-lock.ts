/**
 * The lock of a store's directory: one process has the store open. Owns the file `lock`; in it stands who that process
 * is, for whoever finds the store taken. The words are for people: nothing is decided by them.
 */
import fs from 'node:fs';
import path from 'node:path';
import { StoreError } from '../object-store.js';
import * as libc from './libc.js';

/** What a process that holds a store is doing with it. */
export type HolderRole = 'command' | 'daemon' | 'stopping daemon';

const ROLES: readonly HolderRole[] = ['command', 'daemon', 'stopping daemon'];
/** What is read of the lock file; a process number and the longest role are less. */
const MAX_HOLDER_BYTES = 64;

export interface Holder {
  readonly pid: number;
  readonly role: HolderRole;
}

/** Another process has the store. */
export class StoreLockedError extends StoreError {
  constructor(
    location: string,
    /** Undefined if it has not said. */
    readonly holder: Holder | undefined,
  ) {
    const who = holder === undefined ? 'another process' : `process ${holder.pid}, a ${holder.role}`;
    super('LOCKED', `store ${location} is in use by ${who}`);
    this.name = 'StoreLockedError';
  }
}

export class StoreLock {
  /** Open for as long as the lock is held; on the filesystem of the store. */
  readonly fd: number;

  private constructor(fd: number) {
    this.fd = fd;
  }

  /** Take the lock of the store in `location`, a directory. Errors: StoreLockedError, and those of the system. */
  static take(location: string, role: HolderRole): StoreLock {
    const file = path.join(location, 'lock');
    const fd = fs.openSync(file, fs.constants.O_RDWR | fs.constants.O_CREAT, 0o600);
    let isTaken = false;
    try {
      isTaken = libc.tryLock(fd);
      if (!isTaken) throw new StoreLockedError(location, readHolder(fd));
    } finally {
      if (!isTaken) fs.closeSync(fd);
    }
    const lock = new StoreLock(fd);
    lock.say(role);
    return lock;
  }

  /** Tell those who find the store taken what its holder is doing. */
  say(role: HolderRole): void {
    try {
      const text = Buffer.from(`${process.pid} ${role}\n`);
      fs.writeSync(this.fd, text, 0, text.length, 0);
      fs.ftruncateSync(this.fd, text.length);
    } catch {
      // The disk may be full. The lock holds; only its message stays less clear.
    }
  }

  release(): void {
    fs.closeSync(this.fd);
  }
}

function readHolder(fd: number): Holder | undefined {
  const bytes = Buffer.alloc(MAX_HOLDER_BYTES);
  const length = fs.readSync(fd, bytes, 0, bytes.length, 0);
  const [, pid, role] = /^(\d{1,10}) ([a-z ]+)\n$/.exec(bytes.toString('latin1', 0, length)) ?? [];
  const known = ROLES.find((each) => each === role);
  return pid === undefined || known === undefined ? undefined : { pid: Number(pid), role: known };
}
