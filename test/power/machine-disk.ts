/**
 * The disk of one process on a machine (machine.ts): every call of the seam, on files in memory. Owns the descriptors and locks
 * of the process, which end with it. Paths outside of the machine, and LMDB's files, are those of this computer.
 */
import path from 'node:path';
import { systemError } from '../harness/failing-disk.js';
import {
  O_CREAT,
  O_DIRECTORY,
  O_EXCL,
  O_TRUNC,
  type FileStatus,
  type HostDisk,
  type Reserved,
} from '../../src/system/disk.js';
import { hostDisk } from '../../src/system/real-disk.js';
import { CHUNK } from './content.js';
import { isDatabase, type Inode, type Machine } from './machine.js';

/** Higher than those of this process. */
const FIRST_DESCRIPTOR = 1_000_000;
const STATUS_BLOCK = 512;
const BY_DESCRIPTOR = /^\/proc\/self\/fd\/(\d+)(?:\/(.*))?$/;
const UID = process.geteuid?.() ?? 0;
/** ext4: a filesystem that is no tmpfs. */
const FILESYSTEM = 0xef53;

export class ProcessEnded extends Error {
  constructor() {
    super('the process has ended');
  }
}

export class MachineDisk implements HostDisk {
  readonly #machine: Machine;
  readonly #open = new Map<number, Inode>();
  /** Where LMDB's files are open: real descriptor -> file. */
  readonly #databases = new Map<number, Inode>();
  readonly #locks = new Map<number, Inode>();
  #next = FIRST_DESCRIPTOR;
  #isDead = false;

  constructor(machine: Machine) {
    this.#machine = machine;
  }

  /** Ends the process: each call in flight has had its effect if `has` says so. */
  kill(has: () => boolean): void {
    this.#machine.turns.drop(this, has, new ProcessEnded());
    this.#isDead = true;
    LOCKED.get(this.#machine)?.clear();
  }

  #later<T>(call: () => T): Promise<T> {
    if (this.#isDead) return Promise.reject(new ProcessEnded());
    return this.#machine.turns.later(this, call);
  }

  #names(file: string): readonly string[] | undefined {
    return this.#machine.relative(this.#resolve(file));
  }

  #resolve(file: string): string {
    // As callers give nearly all names.
    if (file.startsWith(this.#machine.root) && !file.includes('/.') && !file.includes('//')) return file;
    const [, fd, rest] = BY_DESCRIPTOR.exec(file) ?? [];
    const inode = fd === undefined ? undefined : this.#open.get(Number(fd));
    if (!inode) return path.resolve(file);
    return path.resolve(this.#pathOf(inode), rest ?? '');
  }

  /** Of a directory. */
  #pathOf(inode: Inode): string {
    const search = (at: Inode, names: string): string | undefined => {
      if (at === inode) return names;
      for (const [name, ino] of at.entries) {
        const child = this.#machine.inodes.get(ino);
        const found = child?.kind === 'directory' ? search(child, `${names}/${name}`) : undefined;
        if (found !== undefined) return found;
      }
      return undefined;
    };
    const top = this.#machine.find([]);
    return (top && search(top, this.#machine.root)) ?? '/gone';
  }

  #at(file: string): Inode | undefined {
    const names = this.#names(file);
    return names && this.#machine.find(names);
  }

  #of(fd: number): Inode {
    if (this.#isDead) throw new ProcessEnded();
    const inode = this.#open.get(fd) ?? this.#databases.get(fd);
    if (!inode) throw systemError('EBADF', 'read');
    return inode;
  }

  openSync(file: string, flags: number, mode?: number): number {
    if (this.#isDead) throw new ProcessEnded();
    const names = this.#names(file);
    if (!names) return hostDisk.openSync(file, flags, mode);
    let inode = this.#machine.find(names);
    if (inode && (flags & O_EXCL) !== 0) throw systemError('EEXIST', 'open');
    if (!inode && (flags & O_CREAT) === 0) throw systemError('ENOENT', 'open');
    if (inode?.kind === 'link') throw systemError('ELOOP', 'open');
    if (inode?.kind === 'file' && (flags & O_DIRECTORY) !== 0) throw systemError('ENOTDIR', 'open');
    inode ??= this.#machine.create(names, 'file');
    if ((flags & O_TRUNC) !== 0 && inode.content.size > 0) this.#machine.resize(inode, 0);
    if (isDatabase(names.at(-1))) {
      const fd = hostDisk.openSync(this.#machine.realFile(names), flags & ~(O_CREAT | O_EXCL | O_TRUNC), mode);
      this.#databases.set(fd, inode);
      return fd;
    }
    const fd = this.#next++;
    this.#open.set(fd, inode);
    return fd;
  }

  open(file: string, flags: number, mode?: number): Promise<number> {
    return this.#later(() => this.openSync(file, flags, mode));
  }

  closeSync(fd: number): void {
    if (this.#isDead && fd >= FIRST_DESCRIPTOR) return;
    const locked = this.#locks.get(fd);
    if (locked) LOCKED.get(this.#machine)?.delete(locked.ino);
    this.#locks.delete(fd);
    if (this.#open.delete(fd)) return;
    this.#databases.delete(fd);
    hostDisk.closeSync(fd);
  }

  close(fd: number): Promise<void> {
    return this.#later(() => this.closeSync(fd));
  }

  readSync(fd: number, into: Buffer, offset: number): number {
    const inode = this.#open.get(fd);
    return inode ? inode.content.read(into, offset) : hostDisk.readSync(fd, into, offset);
  }

  read(fd: number, into: Buffer, at: number, offset: number): Promise<number> {
    return this.#later(() => this.readSync(fd, into.subarray(at), offset));
  }

  readCachedSync(fd: number, into: Buffer, offset: number): number {
    return this.readSync(fd, into, offset);
  }

  writeSync(fd: number, data: Buffer, offset: number): number {
    const inode = this.#of(fd);
    const written = this.#machine.write(inode, data, offset);
    if (this.#databases.has(fd)) hostDisk.writeSync(fd, data, offset);
    return written;
  }

  write(fd: number, data: Buffer, from: number, offset: number): Promise<number> {
    return this.#later(() => this.writeSync(fd, data.subarray(from), offset));
  }

  truncateSync(fd: number, size: number): void {
    this.#machine.resize(this.#of(fd), size);
    if (this.#databases.has(fd)) hostDisk.truncateSync(fd, size);
  }

  truncate(fd: number, size: number): Promise<void> {
    return this.#later(() => this.truncateSync(fd, size));
  }

  fsyncSync(fd: number): void {
    this.#machine.sync(this.#of(fd), this.#machine.journal.mark());
  }

  fsync(fd: number): Promise<void> {
    const begun = this.#machine.journal.mark();
    return this.#later(() => this.#machine.sync(this.#of(fd), begun));
  }

  fdatasync(fd: number): Promise<void> {
    return this.fsync(fd);
  }

  syncfs(): Promise<void> {
    const begun = this.#machine.journal.mark();
    return this.#later(() => this.#machine.journal.sync(undefined, begun));
  }

  unlinkSync(file: string): void {
    this.#change(
      file,
      () => hostDisk.unlinkSync(file),
      (names) => this.#machine.unlink(names, 'unlinkSync'),
    );
  }

  unlink(file: string): Promise<void> {
    return this.#later(() => this.unlinkSync(file));
  }

  renameSync(from: string, to: string): void {
    this.#change(
      from,
      () => hostDisk.renameSync(from, to),
      (names) => {
        const now = this.#names(to);
        if (!now) throw systemError('EXDEV', 'rename');
        this.#machine.rename(names, now);
      },
    );
  }

  rename(from: string, to: string): Promise<void> {
    return this.#later(() => this.renameSync(from, to));
  }

  mkdirSync(file: string, mode?: number): void {
    this.#change(
      file,
      () => hostDisk.mkdirSync(file, mode),
      (names) => {
        if (this.#machine.find(names)) throw systemError('EEXIST', 'mkdirSync');
        this.#machine.create(names, 'directory');
      },
    );
  }

  mkdtempSync(prefix: string): string {
    return hostDisk.mkdtempSync(prefix);
  }

  rmdirSync(file: string): void {
    this.#change(
      file,
      () => hostDisk.rmdirSync(file),
      (names) => this.#machine.unlink(names, 'rmdirSync'),
    );
  }

  symlinkSync(target: string, file: string): void {
    this.#change(
      file,
      () => hostDisk.symlinkSync(target, file),
      (names) => {
        if (this.#machine.find(names)) throw systemError('EEXIST', 'symlinkSync');
        this.#machine.create(names, 'link', target);
      },
    );
  }

  #change(file: string, outside: () => void, inside: (names: readonly string[]) => void): void {
    if (this.#isDead) throw new ProcessEnded();
    const names = this.#names(file);
    if (names) inside(names);
    else outside();
  }

  fstatSync(fd: number): FileStatus {
    const inode = this.#open.get(fd);
    return inode ? statusOf(inode, this.#machine) : hostDisk.fstatSync(fd);
  }

  statSync(file: string): FileStatus | undefined {
    return this.lstatSync(file);
  }

  lstatSync(file: string): FileStatus | undefined {
    const names = this.#names(file);
    if (!names) return hostDisk.lstatSync(file);
    const inode = this.#machine.find(names);
    return inode && statusOf(inode, this.#machine);
  }

  lstat(file: string): Promise<FileStatus> {
    return this.#later(() => {
      const status = this.lstatSync(file);
      if (!status) throw systemError('ENOENT', 'lstat');
      return status;
    });
  }

  existsSync(file: string): boolean {
    const names = this.#names(file);
    return names ? this.#machine.find(names) !== undefined : hostDisk.existsSync(file);
  }

  readdirSync(file: string): string[] {
    const inode = this.#at(file);
    if (!inode) throw systemError('ENOENT', 'readdirSync');
    if (inode.kind !== 'directory') throw systemError('ENOTDIR', 'readdirSync');
    return [...inode.entries.keys()];
  }

  readdir(file: string): Promise<string[]> {
    return this.#later(() => this.readdirSync(file));
  }

  realpathSync(file: string): string {
    return this.#names(file) ? this.#resolve(file) : hostDisk.realpathSync(file);
  }

  filesystemTypeSync(): number {
    return FILESYSTEM;
  }

  tryLockSync(fd: number): boolean {
    const inode = this.#of(fd);
    const locked = LOCKED.get(this.#machine) ?? new Set<number>();
    LOCKED.set(this.#machine, locked);
    if (locked.has(inode.ino)) return false;
    locked.add(inode.ino);
    this.#locks.set(fd, inode);
    return true;
  }

  memoryFileSync(name: string, length: number): number | undefined {
    return hostDisk.memoryFileSync(name, length);
  }

  punchHole(fd: number, offset: number, length: number): Promise<boolean> {
    return this.#zero(fd, offset, length, this.#machine.options.canPunchHole ?? true, false);
  }

  zeroRange(fd: number, offset: number, length: number): Promise<boolean> {
    return this.#zero(fd, offset, length, this.#machine.options.canZeroRange ?? true, true);
  }

  #zero(fd: number, offset: number, length: number, isAble: boolean, allocated: boolean): Promise<boolean> {
    return this.#later(() => {
      if (isAble) this.#machine.zero(this.#of(fd), offset, length, allocated);
      return isAble;
    });
  }

  canPunchHoleSync(): boolean {
    return this.#machine.options.canPunchHole ?? true;
  }

  canZeroRangeSync(): boolean {
    return this.#machine.options.canZeroRange ?? true;
  }

  reserveSync(): Reserved {
    return 'done';
  }

  nextData(fd: number, offset: number): Promise<number> {
    return this.#later(() => this.#of(fd).content.next(offset, false));
  }

  nextHole(fd: number, offset: number): Promise<number> {
    return this.#later(() => this.#of(fd).content.next(offset, true));
  }

  clone(from: number, to: number): Promise<boolean> {
    return this.#later(() => {
      if (!(this.#machine.options.canClone ?? false)) return false;
      this.#copy(this.#of(from), this.#of(to), 0, this.#of(from).content.size);
      return true;
    });
  }

  copyRange(from: number, to: number, offset: number, length: number): Promise<number> {
    return this.#later(() => this.#copy(this.#of(from), this.#of(to), offset, length));
  }

  #copy(from: Inode, to: Inode, offset: number, length: number): number {
    const end = Math.min(offset + length, from.content.size);
    for (let at = offset; at < end;) {
      const found = from.content.next(at, false);
      const data = found < 0 ? end : Math.min(found, end);
      if (data > at) this.#machine.zero(to, at, data - at, false);
      if (data === end) break;
      const hole = Math.min(from.content.next(data, true), end);
      const bytes = Buffer.alloc(hole - data);
      from.content.read(bytes, data);
      this.#machine.write(to, bytes, data);
      at = hole;
    }
    if (to.content.size < end) this.#machine.resize(to, end);
    return Math.max(0, end - offset);
  }

  willNeed(): Promise<void> {
    return this.#later(() => undefined);
  }

  dropCached(): Promise<void> {
    return this.#later(() => undefined);
  }

  openDatabase<T>(fd: number, open: () => T): T {
    const inode = this.#of(fd);
    const begun = this.#machine.journal.mark();
    const opened = open();
    this.#machine.changesOfDatabase(inode, fd).apply(begun);
    return opened;
  }

  async commit(fd: number, transaction: () => Promise<void>): Promise<void> {
    const inode = this.#of(fd);
    const begun = this.#machine.journal.mark();
    await this.#machine.turns.alone(transaction);
    const changes = this.#machine.changesOfDatabase(inode, fd);
    await this.#later(() => changes.apply(begun));
  }

  async closeDatabase(_fd: number, close: () => Promise<void>): Promise<void> {
    await this.#machine.turns.alone(close);
  }

  inodeOfSync(fd: number): bigint {
    return BigInt(this.#of(fd).ino);
  }

  inodeAtSync(file: string): bigint {
    const inode = this.#at(file);
    if (!inode) throw systemError('ENOENT', 'statSync');
    return BigInt(inode.ino);
  }

  mountingSync(): string {
    return this.#machine.options.mounting;
  }

  bootId(): string {
    return this.#machine.options.bootId;
  }
}

/** flock(2) holds among all processes of a machine: the inodes that are locked. */
const LOCKED = new WeakMap<Machine, Set<number>>();

/** The parts of a status that are used. */
function statusOf(inode: Inode, machine: Machine): FileStatus {
  const isFile = inode.kind === 'file';
  const size = inode.content.size;
  const status: unknown = {
    ...{ dev: machine.device, ino: inode.ino, nlink: 1, uid: UID, size, mtimeMs: inode.mtimeMs },
    blocks: (inode.content.allocated / CHUNK) * (CHUNK / STATUS_BLOCK),
    isFile: () => isFile,
    isDirectory: () => inode.kind === 'directory',
    isSymbolicLink: () => inode.kind === 'link',
    isFIFO: () => false,
    isSocket: () => false,
  };
  return status as FileStatus;
}
