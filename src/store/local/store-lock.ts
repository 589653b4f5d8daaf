/**
 * The lock of a store's directory: one process has the store open. Owns the file `lock`. Its content names that process, for
 * the messages of others; it decides nothing. Another user may own the directory and have put anything there: only a plain
 * file with one name, of the right owner, is ever written.
 */
import path from 'node:path';
import { O_CREAT, O_NOFOLLOW, O_NONBLOCK, O_RDONLY, O_RDWR, type HostDisk } from '../../system/disk.js';
import { StoreError } from '../store-error.js';

/** The role of the process that has the store open. */
export type HolderRole = 'command' | 'daemon' | 'stopping daemon';

const ROLES: readonly HolderRole[] = ['command', 'daemon', 'stopping daemon'];
/** Bytes read from the lock file; a process number and the longest role need less. */
const MAX_HOLDER_BYTES = 64;

export interface Holder {
  readonly pid: number;
  readonly role: HolderRole;
}

/** Another process has the store. */
export class StoreLockedError extends StoreError {
  constructor(
    location: string,
    /** Undefined if the lock file does not name it. */
    readonly holder: Holder | undefined,
  ) {
    const who = holder === undefined ? 'another process' : `process ${holder.pid}, a ${holder.role}`;
    super('LOCKED', `store ${location} is in use by ${who}`);
    this.name = 'StoreLockedError';
  }
}

export class StoreLock {
  readonly #disk: HostDisk;
  /** Open for as long as the lock is held; on the filesystem of the store. */
  readonly fd: number;
  /** Whether the role may be written into the file. */
  #speaks: boolean;

  private constructor(disk: HostDisk, fd: number, location: string, options: { readonly isReadOnly: boolean }) {
    this.#disk = disk;
    this.fd = fd;
    this.#speaks = !options.isReadOnly && isOwnFile(disk, fd, location);
  }

  /**
   * Take the lock of the store in `location`, a directory. `isReadOnly`: the store is on a read-only filesystem, and the lock
   * is shared with other readers; if the lock file is missing, the directory is locked instead.
   * Errors: LOCKED (StoreLockedError), DAMAGED (the lock file is a symbolic link), and those of the disk.
   */
  static take(disk: HostDisk, location: string, role: HolderRole, { isReadOnly = false } = {}): StoreLock {
    const file = path.join(location, 'lock');
    let fd: number;
    try {
      if (!isReadOnly) fd = disk.openSync(file, O_RDWR | O_CREAT | O_NOFOLLOW, 0o600);
      else if (disk.existsSync(file)) fd = disk.openSync(file, O_RDONLY | O_NONBLOCK | O_NOFOLLOW);
      else fd = disk.openSync(location, O_RDONLY);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ELOOP') throw error;
      throw new StoreError(
        'DAMAGED',
        `${file} is a symbolic link; the lock of a store is a plain file: remove the link`,
        {
          cause: error,
        },
      );
    }
    let isTaken = false;
    try {
      isTaken = disk.tryLockSync(fd, { shared: isReadOnly });
      if (!isTaken) throw new StoreLockedError(location, readHolder(disk, fd));
    } finally {
      if (!isTaken) disk.closeSync(fd);
    }
    // A failed creation removes its lock file: the file that we have locked may have no name any more.
    if (!isReadOnly && disk.fstatSync(fd).ino !== disk.lstatSync(file)?.ino) {
      disk.closeSync(fd);
      return StoreLock.take(disk, location, role);
    }
    const lock = new StoreLock(disk, fd, location, { isReadOnly });
    lock.say(role);
    return lock;
  }

  /** Write this process and its role into the file, for processes that find the store locked. */
  say(role: HolderRole): void {
    this.#write(`${process.pid} ${role}\n`);
  }

  release(): void {
    // An older sheepgate writes nothing when it takes the lock: our role must not stay there for it.
    this.#write('');
    this.#speaks = false;
    try {
      this.#disk.closeSync(this.fd);
    } catch {
      // The disk is gone; the descriptor is closed all the same, and the lock released.
    }
  }

  #write(text: string): void {
    if (!this.#speaks) return;
    try {
      const bytes = Buffer.from(text);
      this.#disk.writeSync(this.fd, bytes, 0);
      this.#disk.truncateSync(this.fd, bytes.length);
    } catch {
      // The disk may be full. The lock holds; only the messages of others are less clear.
    }
  }
}

/** Whether this is a plain file without a second name that belongs to us or to the owner of the directory. */
function isOwnFile(disk: HostDisk, fd: number, location: string): boolean {
  const stat = disk.fstatSync(fd);
  const isOurs = stat.uid === process.geteuid?.() || stat.uid === disk.statSync(location)?.uid;
  return stat.isFile() && stat.nlink === 1 && isOurs;
}

/** The process that holds the lock, if the file names a process that is alive and a known role. */
function readHolder(disk: HostDisk, fd: number): Holder | undefined {
  const bytes = Buffer.alloc(MAX_HOLDER_BYTES);
  let length: number;
  try {
    length = disk.readSync(fd, bytes, 0);
  } catch {
    return undefined; // a fifo, a device
  }
  const [, pid, role] = /^([1-9]\d{0,9}) ([a-z ]+)\n$/.exec(bytes.toString('latin1', 0, length)) ?? [];
  const known = ROLES.find((each) => each === role);
  return pid === undefined || known === undefined || !isAlive(Number(pid))
    ? undefined
    : { pid: Number(pid), role: known };
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
}
