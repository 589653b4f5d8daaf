/**
 * The files of objects (FORMAT.md, objects/): their folders, names and expected lengths, and the search for all of them. Owns
 * the expected lengths, and makes names durable. Never opens, creates, changes or removes an object.
 */
import path from 'node:path';
import { O_RDONLY, type HostDisk } from '../../system/disk.js';
import { syncDirectory } from '../../system/durable-names.js';
import { makeDirectory } from '../../system/make-directory.js';
import { StoreError } from '../store-error.js';
import type { FoundObject } from './data-objects.js';
import { idxOf, localObjectKey, vidOf } from './reference-counts.js';
import { SYNCS } from './thread-shares.js';
import { TimeSlice } from './time-slice.js';

const OBJECT_DIRECTORIES = 256;
/** Unit of st_blocks, stat(2). */
const STATUS_BLOCK = 512;

/** `error` as a StoreError whose message begins with `doing`. */
export type AsFailure = (error: unknown, doing: string) => StoreError;

/** In which folders the files of a kind are. */
export interface FileLayout {
  /** Names below the root of the kind; '' is the root itself. */
  readonly folders: readonly string[];
  /** The index of the folder that has the file of the key. */
  folderOf(key: number): number;
}

/** 256 neighbouring objects share a folder, so that the flush of a sequential write syncs one folder and not 256. */
export const OBJECT_LAYOUT: FileLayout = {
  folders: Array.from({ length: OBJECT_DIRECTORIES }, (_, n) => n.toString(16).padStart(2, '0')),
  folderOf: (key) => ((idxOf(key) >>> 8) ^ vidOf(key)) & (OBJECT_DIRECTORIES - 1),
};

/** All files in one folder. */
export const FLAT_LAYOUT: FileLayout = { folders: [''], folderOf: () => 0 };

/** Create `root` and the folders of the layout, durably, where they are missing. Errors: those of the disk. */
export function makeFolders(disk: HostDisk, root: string, { folders }: FileLayout): void {
  const made = [root, ...folders.filter((name) => name !== '').map((name) => path.join(root, name))]
    .map((directory) => makeDirectory(disk, directory))
    .some((isNew) => isNew);
  if (made) for (const directory of [root, path.dirname(root)]) syncDirectory(disk, directory);
}

export class ObjectNames {
  readonly #disk: HostDisk;
  /** The folder objects/, or that of another kind. */
  readonly #root: string;
  readonly #layout: FileLayout;
  readonly #isReadOnly: boolean;
  readonly #failed: AsFailure;
  /** vid -> expected length of the files of its objects, in bytes. */
  readonly #lengths = new Map<number, number>();
  /** Folders from which a name was removed that would be back after a power loss. */
  readonly #removedFrom = new Set<number>();

  constructor(
    disk: HostDisk,
    root: string,
    options: { readonly isReadOnly: boolean; readonly layout: FileLayout },
    failed: AsFailure,
  ) {
    this.#disk = disk;
    this.#root = root;
    this.#layout = options.layout;
    this.#isReadOnly = options.isReadOnly;
    this.#failed = failed;
  }

  path(key: number): string {
    const oid = vidOf(key).toString(16).padStart(8, '0') + idxOf(key).toString(16).padStart(8, '0');
    return path.join(this.#root, this.#folder(this.#layout.folderOf(key)), oid);
  }

  #folder(n: number): string {
    return this.#layout.folders[n] ?? '';
  }

  /** Create the root and its folders durably, where they are missing. Errors: those of the disk. */
  makeFolders(): void {
    makeFolders(this.#disk, this.#root, this.#layout);
  }

  expectLength(vid: number, length: number): void {
    this.#lengths.set(vid, length);
  }

  /** The expected length of the files of this vid, bytes; 0 if it is not known. */
  lengthOf(vid: number): number {
    return this.#lengths.get(vid) ?? 0;
  }

  /** Errors: DAMAGED (the file open as `fd` has not the object's length: missing bytes must not be read as zeros). */
  mustBeWhole(key: number, fd: number): void {
    const expected = this.#lengths.get(vidOf(key));
    const { size } = this.#disk.fstatSync(fd);
    if (expected === undefined || size === expected) return;
    throw new StoreError(
      'DAMAGED',
      `object ${this.path(key)} is ${size} bytes long and has to be ${expected}; 'sheepgate check' lists what is damaged`,
    );
  }

  problemOf(key: number, length: number): string | undefined {
    const name = this.path(key);
    const status = this.#disk.lstatSync(name);
    if (!status) return `the object ${name} is missing`;
    if (status.size !== length) return `the object ${name} is ${status.size} bytes long`;
    return undefined;
  }

  async *scan(): AsyncGenerator<FoundObject> {
    for (const folder of this.#layout.folders) {
      const directory = path.join(this.#root, folder);
      for (const entry of await this.#namesIn(directory, folder === '')) {
        const name = path.join(directory, entry);
        const oid = /^([0-9a-f]{8})([0-9a-f]{8})$/.exec(entry);
        const named = oid ? localObjectKey(parseInt(oid[1] ?? '', 16), parseInt(oid[2] ?? '', 16)) : -1;
        const status = await this.#disk.lstat(name).catch(() => undefined);
        if (!status) continue;
        const key = named >= 0 && this.path(named) === name ? named : -1;
        const isWhole = key < 0 || status.size === this.#lengths.get(vidOf(key));
        const damage = isWhole ? undefined : `object file is ${status.size} bytes long`;
        yield { key, bytes: status.blocks * STATUS_BLOCK, name, uid: status.uid, damage };
      }
    }
  }

  async #namesIn(directory: string, mayBeMissing: boolean): Promise<string[]> {
    try {
      return await this.#disk.readdir(directory);
    } catch (error) {
      // Tools that copy files leave empty folders out, and on a read-only filesystem they cannot be created.
      if ((this.#isReadOnly || mayBeMissing) && (error as NodeJS.ErrnoException).code === 'ENOENT') return [];
      throw error;
    }
  }

  /** Make the names of these objects durable, by syncing their folders. */
  async sync(keys: Iterable<number>): Promise<void> {
    const folders = new Set<number>();
    const slice = new TimeSlice();
    let step = 0;
    for (const key of keys) {
      folders.add(this.#layout.folderOf(key));
      if (slice.isOver(++step)) await slice.next();
    }
    await this.#syncFolders(folders);
  }

  /** The name of the object is removed. */
  noteRemoved(key: number): void {
    this.#removedFrom.add(this.#layout.folderOf(key));
  }

  /** Make all removals durable, by syncing their folders. */
  syncRemovals(): Promise<void> {
    return this.#syncFolders(new Set(this.#removedFrom));
  }

  async #syncFolders(folders: ReadonlySet<number>): Promise<void> {
    await Promise.all(
      [...folders].map(async (folder) => {
        const turn = SYNCS.enter(folders);
        if (turn) await turn;
        try {
          await this.#syncFolder(folder);
        } finally {
          SYNCS.leave(folders);
        }
      }),
    );
  }

  async #syncFolder(folder: number): Promise<void> {
    const name = path.join(this.#root, this.#folder(folder));
    // Before the sync: it does not cover a removal that happens meanwhile.
    const hadRemovals = this.#removedFrom.delete(folder);
    try {
      const fd = await this.#disk.open(name, O_RDONLY);
      try {
        await this.#disk.fsync(fd);
      } finally {
        await this.#disk.close(fd);
      }
    } catch (error) {
      if (hadRemovals) this.#removedFrom.add(folder);
      throw this.#failed(error, `syncing ${name}`);
    }
  }

  /** See DataObjects.namesLostWith. The kernel reports a failed fsync of a folder once, so all new names in it are in doubt. */
  lostWith(keys: Iterable<number>): (key: number) => boolean {
    const folders = new Set(Array.from(keys, (key) => this.#layout.folderOf(key)));
    return (key) => folders.has(this.#layout.folderOf(key));
  }
}
