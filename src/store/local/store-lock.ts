/**
 * The lock of a store's directory: one process has the store open. Owns the file `lock`; in it stands who that process
 * is, for whoever finds the store taken. The words are for people: nothing is decided by them. Another user may own the
 * directory, and have put there what they like: nothing but a plain file of the store's own is ever written to.
 */
import path from 'node:path';
import { O_CREAT, O_NOFOLLOW, O_NONBLOCK, O_RDONLY, O_RDWR, type HostDisk } from '../../system/disk.js';
import { StoreError } from '../object-store.js';

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
  readonly #disk: HostDisk;
  /** Open for as long as the lock is held; on the filesystem of the store. */
  readonly fd: number;
  /** Whether what is said goes into the file. */
  #speaks: boolean;

  private constructor(disk: HostDisk, fd: number, location: string, options: { readonly isReadOnly: boolean }) {
    this.#disk = disk;
    this.fd = fd;
    this.#speaks = !options.isReadOnly && isOwnFile(disk, fd, location);
  }

  /**
   * Take the lock of the store in `location`, a directory. `isReadOnly`: of a store that is on a read-only filesystem, and
   * may be shared with others that only read; then a lock file that is missing does not matter: the directory is locked.
   * Errors: StoreLockedError; DAMAGED if it is a symbolic link; and those of the system.
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
        `${file} is a symbolic link; the lock of a store is a file of its own: remove it`,
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
    // Whoever fails to make a store removes what it has made, the lock with it: what we have opened may be of nobody.
    if (!isReadOnly && disk.fstatSync(fd).ino !== disk.lstatSync(file)?.ino) {
      disk.closeSync(fd);
      return StoreLock.take(disk, location, role);
    }
    const lock = new StoreLock(disk, fd, location, { isReadOnly });
    lock.say(role);
    return lock;
  }

  /** Tell those who find the store taken what its holder is doing. */
  say(role: HolderRole): void {
    this.#write(`${process.pid} ${role}\n`);
  }

  release(): void {
    // An older sheepgate that takes the lock says nothing: ours must not stand there for it.
    this.#write('');
    this.#speaks = false;
    try {
      this.#disk.closeSync(this.fd);
    } catch {
      // Of a disk that is gone: the descriptor is closed, and the lock with it.
    }
  }

  #write(text: string): void {
    if (!this.#speaks) return;
    try {
      const bytes = Buffer.from(text);
      this.#disk.writeSync(this.fd, bytes, 0);
      this.#disk.truncateSync(this.fd, bytes.length);
    } catch {
      // The disk may be full. The lock holds; only its message stays less clear.
    }
  }
}

/** A plain file under no second name, of whoever has the directory or of us. */
function isOwnFile(disk: HostDisk, fd: number, location: string): boolean {
  const stat = disk.fstatSync(fd);
  const isOurs = stat.uid === process.geteuid?.() || stat.uid === disk.statSync(location)?.uid;
  return stat.isFile() && stat.nlink === 1 && isOurs;
}

/** Who has taken the lock, if it says so in words that we know and is alive. */
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
