/**
 * A machine whose filesystem is in memory: files, directories, links, locks, and a journal of everything that changed. Several
 * processes, one after the other, may use it (machine-disk.ts). Owns the files. LMDB opens its file by itself, so files named
 * *.mdb, and links to them, also exist in a real directory; the machine reads what LMDB has written.
 */
import fs from 'node:fs';
import path from 'node:path';
import { systemError } from '../harness/failing-disk.js';
import type { HostDisk } from '../../src/system/disk.js';
import { CHUNK, Content, WHOLE_CHUNK, type ChunkChange } from './content.js';
import { Journal, type Ino } from './journal.js';
import type { Random } from './random.js';
import { Turns } from './turns.js';

export interface Inode {
  readonly ino: Ino;
  readonly kind: 'file' | 'directory' | 'link';
  readonly content: Content;
  readonly entries: Map<string, Ino>;
  readonly target: string;
  mtimeMs: number;
}

/** What the kernel and the filesystem say of themselves. */
export interface Identity {
  readonly bootId: string;
  readonly mounting: string;
}

export interface MachineOptions extends Identity {
  /** An empty directory, for LMDB's files; the machine's names begin with it. */
  readonly root: string;
  /** Decides the order of calls; without it they take effect at once. */
  readonly random?: Random | undefined;
  /** What the filesystem can do. */
  readonly canPunchHole?: boolean;
  readonly canZeroRange?: boolean;
  readonly canClone?: boolean;
  /** Syncs that this disk answers without doing anything. */
  readonly liesAbout?: (sync: 'data' | 'names') => boolean;
}

export const ROOT_INO = 2;
/** Any number that is not the device of a real directory. */
const DEVICE = 0x5afe;
/** 2026-01-01, so that times have a fixed length and order. */
const FIRST_TIME_MS = 1_767_225_600_000;
/** Paths that were taken apart before: a store looks at its 256 folders again and again. */
const NAMES = new Map<string, readonly string[]>();
const NO_NAMES: readonly string[] = [];
const MAX_NAMES = 20_000;
const SCRATCH = { bytes: Buffer.alloc(2 ** 20) };

export class Machine {
  readonly root: string;
  readonly options: MachineOptions;
  readonly journal: Journal;
  readonly turns: Turns;
  readonly inodes = new Map<Ino, Inode>();
  readonly device = DEVICE;
  readonly #prefix: string;
  #lastIno: Ino = ROOT_INO;

  /** `inodes`: what is on the disk, durably; without it only the root. `start`: the first moment. */
  constructor(options: MachineOptions, inodes?: ReadonlyMap<Ino, Inode>, start = 0) {
    this.options = options;
    this.journal = new Journal(start);
    this.root = path.resolve(options.root);
    this.#prefix = `${this.root}/`;
    this.turns = new Turns(options.random);
    if (inodes === undefined) this.inodes.set(ROOT_INO, this.#newInode(ROOT_INO, 'directory'));
    else {
      for (const [ino, inode] of copyOf(inodes)) {
        this.inodes.set(ino, inode);
        this.#lastIno = Math.max(this.#lastIno, ino);
      }
      this.#makeReal(ROOT_INO, this.root);
    }
  }

  /** The files as they are now; a crash state can be built on them. */
  snapshot(): Map<Ino, Inode> {
    return copyOf(this.inodes);
  }

  /** Undefined outside of the machine. */
  relative(file: string): readonly string[] | undefined {
    if (file === this.root) return NO_NAMES;
    if (!file.startsWith(this.#prefix)) return undefined;
    const rest = file.slice(this.#prefix.length);
    let names = NAMES.get(rest);
    if (!names) {
      names = rest.split('/').filter(Boolean);
      if (NAMES.size < MAX_NAMES) NAMES.set(rest, names);
    }
    return names;
  }

  find(names: readonly string[]): Inode | undefined {
    let at = this.inodes.get(ROOT_INO);
    for (const name of names) at = at && this.child(at, name);
    return at;
  }

  child(directory: Inode, name: string): Inode | undefined {
    const ino = directory.entries.get(name);
    return ino === undefined ? undefined : this.inodes.get(ino);
  }

  parent(names: readonly string[]): { directory: Inode; name: string } | undefined {
    const directory = this.find(names.slice(0, -1));
    const name = names.at(-1);
    return directory?.kind === 'directory' && name !== undefined ? { directory, name } : undefined;
  }

  create(names: readonly string[], kind: Inode['kind'], target = ''): Inode {
    const place = this.parent(names);
    if (!place) throw systemError('ENOENT', 'open');
    const inode = this.#newInode(++this.#lastIno, kind, target);
    this.inodes.set(inode.ino, inode);
    place.directory.entries.set(place.name, inode.ino);
    this.journal.names(place.directory.ino, [{ name: place.name, ino: inode.ino }]);
    if (isReal(inode, place.name)) this.#makeRealOne(inode, this.#realPath(names));
    return inode;
  }

  unlink(names: readonly string[], call: keyof HostDisk): void {
    const place = this.parent(names);
    const inode = place && this.child(place.directory, place.name);
    if (!place || !inode) throw systemError('ENOENT', call);
    if (call === 'rmdirSync' && inode.entries.size > 0) throw systemError('ENOTEMPTY', call);
    if ((inode.kind === 'directory') !== (call === 'rmdirSync')) throw systemError('EISDIR', call);
    place.directory.entries.delete(place.name);
    this.journal.names(place.directory.ino, [{ name: place.name, ino: undefined }]);
    if (isReal(inode, place.name)) fs.unlinkSync(this.#realPath(names));
  }

  rename(from: readonly string[], to: readonly string[]): void {
    const [old, now] = [this.parent(from), this.parent(to)];
    const inode = old && this.child(old.directory, old.name);
    if (!old || !now || !inode) throw systemError('ENOENT', 'rename');
    old.directory.entries.delete(old.name);
    now.directory.entries.set(now.name, inode.ino);
    const changes = [
      { name: now.name, ino: inode.ino },
      { name: old.name, ino: undefined },
    ];
    if (old.directory === now.directory) this.journal.names(now.directory.ino, changes);
    else {
      const named = this.journal.names(now.directory.ino, changes.slice(0, 1));
      named.removal = this.journal.names(old.directory.ino, changes.slice(1));
    }
    if (isReal(inode, old.name)) fs.renameSync(this.#realPath(from), this.#realPath(to));
  }

  write(inode: Inode, data: Buffer, offset: number): number {
    const before = inode.content.size;
    const chunks = inode.content.write(data, offset);
    this.#changed(inode, chunks, inode.content.size === before ? undefined : inode.content.size, false);
    return data.length;
  }

  resize(inode: Inode, size: number): void {
    const before = inode.content.size;
    const chunks = inode.content.resize(size);
    this.#changed(inode, chunks, size === before ? undefined : size, true);
  }

  zero(inode: Inode, offset: number, length: number, allocated: boolean): void {
    this.#changed(inode, inode.content.zero(offset, length, allocated), undefined, true);
  }

  #changed(inode: Inode, chunks: readonly ChunkChange[], sizeAfter: number | undefined, isMetadata: boolean): void {
    this.journal.data(inode.ino, chunks, sizeAfter, isMetadata);
    inode.mtimeMs = this.timeMs;
  }

  get timeMs(): number {
    return FIRST_TIME_MS + this.journal.now;
  }

  sync(inode: Inode, begun: number): void {
    const { liesAbout } = this.options;
    if (liesAbout?.(inode.kind === 'directory' ? 'names' : 'data')) return;
    this.journal.sync(inode.ino, begun);
  }

  /** What LMDB has changed in its file since the last call; takes effect when `apply` is called. */
  changesOfDatabase(inode: Inode, fd: number): { apply: (begun: number) => void } {
    const size = fs.fstatSync(fd).size;
    const chunks: ChunkChange[] = [];
    if (SCRATCH.bytes.length < size) SCRATCH.bytes = Buffer.alloc(2 * size);
    const all = SCRATCH.bytes.subarray(0, size);
    fs.readSync(fd, all, 0, size, 0);
    for (let index = 0; index * CHUNK < size; index++) {
      const page = all.subarray(index * CHUNK, (index + 1) * CHUNK);
      const before = inode.content.chunks[index];
      if (before?.equals(page)) continue;
      chunks.push({ index, after: Buffer.concat([page], CHUNK), sectors: WHOLE_CHUNK });
    }
    return {
      apply: (begun) => {
        for (const { index, after } of chunks) inode.content.chunks[index] = after;
        inode.content.size = size;
        this.journal.commit(inode.ino, begun, chunks, size);
      },
    };
  }

  /** The next process gets files of its own for LMDB: the killed one may still have them open. */
  replaceReal(): void {
    fs.rmSync(this.root, { recursive: true });
    this.#makeReal(ROOT_INO, this.root);
  }

  /** Where LMDB finds the file. */
  realFile(names: readonly string[]): string {
    return this.#realPath(names);
  }

  #realPath(names: readonly string[]): string {
    return path.join(this.root, ...names);
  }

  #makeReal(ino: Ino, at: string): void {
    for (const [name, child] of this.inodes.get(ino)?.entries ?? []) {
      const inode = this.inodes.get(child);
      if (!inode) continue;
      if (isReal(inode, name)) this.#makeRealOne(inode, path.join(at, name));
      else if (inode.kind === 'directory' && name !== 'objects') this.#makeReal(child, path.join(at, name));
    }
  }

  #makeRealOne(inode: Inode, file: string): void {
    fs.mkdirSync(path.dirname(file), { recursive: true });
    if (inode.kind === 'link') fs.symlinkSync(inode.target, file);
    else fs.writeFileSync(file, inode.content.bytes());
  }

  #newInode(ino: Ino, kind: Inode['kind'], target = ''): Inode {
    return { ino, kind, target, content: new Content(), entries: new Map(), mtimeMs: this.timeMs };
  }
}

function copyOf(inodes: ReadonlyMap<Ino, Inode>): Map<Ino, Inode> {
  const copy = new Map<Ino, Inode>();
  for (const [ino, inode] of inodes)
    copy.set(ino, { ...inode, content: inode.content.copy(), entries: new Map(inode.entries) });
  return copy;
}

/** LMDB's files, and links to them. */
export function isDatabase(name: string | undefined): boolean {
  return name?.endsWith('.mdb') ?? false;
}

function isReal(inode: Inode, name: string): boolean {
  return inode.kind === 'link' || (inode.kind === 'file' && isDatabase(name));
}
