/**
 * The change record of a store (FORMAT.md, copies/): appended and synced when the catalog changes, and once for each map that
 * changes after a copy; never for a write. Owns the files changes-* and the numbers of changes. No operation fails because a
 * change cannot be recorded: the record then says that it is not complete, until the next copy.
 */
import path from 'node:path';
import { O_CREAT, O_EXCL, O_WRONLY, type HostDisk } from '../../system/disk.js';
import { syncDirectory } from '../../system/durable-names.js';
import { makeDirectory } from '../../system/make-directory.js';
import { writeFully } from '../../system/whole-io.js';
import {
  changeLine,
  changesHeader,
  MAX_CHANGES_BYTES,
  parseChanges,
  type ChangesHeader,
  type RecordedChange,
} from './change-format.js';
import { openPlainFile } from './plain-file.js';

/** A file of the record, by its name. */
export interface ChangesFile {
  readonly name: string;
  /** The number of its first change. */
  readonly first: number;
  /** Changes after those in it were not recorded. */
  readonly isIncomplete: boolean;
}

const INCOMPLETE = '.incomplete';

/** The files of the record among `names`, oldest first. */
export function changesFiles(names: readonly string[]): ChangesFile[] {
  return names
    .flatMap((name) => {
      const found = /^changes-(\d{1,15})(\.incomplete)?$/.exec(name);
      return found ? [{ name, first: Number(found[1]), isIncomplete: found[2] !== undefined }] : [];
    })
    .sort((a, b) => a.first - b.first);
}

/** All of a file, at most MAX_CHANGES_BYTES. Errors: those of the disk. */
export function readChanges(disk: HostDisk, file: string): ReturnType<typeof parseChanges> {
  const fd = openPlainFile(disk, file);
  try {
    const bytes = Buffer.alloc(Math.min(disk.fstatSync(fd).size, MAX_CHANGES_BYTES));
    let length = 0;
    for (let count = -1; count !== 0 && length < bytes.length; length += count)
      count = disk.readSync(fd, bytes.subarray(length), length);
    return parseChanges(bytes.subarray(0, length));
  } finally {
    disk.closeSync(fd);
  }
}

interface Waiting {
  readonly lines: readonly Buffer[];
  readonly done: () => void;
}

export class ChangeRecord {
  readonly #disk: HostDisk;
  readonly #directory: string;
  readonly #ids: () => ChangesHeader;
  readonly #failed: (error: unknown) => void;
  /** The number of the last change; undefined until the files were looked at. */
  #last: number | undefined;
  #file: { readonly fd: number; readonly name: string; length: number } | undefined;
  /** Changes since the last copy could not be recorded. */
  #isBroken = false;
  #queue: Waiting[] = [];
  #writing: Promise<void> | undefined;

  /** `directory`: the folder copies/, made when it is needed. `ids`: for the header of a file. `failed` is told each failure. */
  constructor(disk: HostDisk, directory: string, ids: () => ChangesHeader, failed: (error: unknown) => void) {
    this.#disk = disk;
    this.#directory = directory;
    this.#ids = ids;
    this.#failed = failed;
  }

  /** The number of the last change. */
  get last(): number {
    return (this.#last ??= this.#lookForLast());
  }

  get isBroken(): boolean {
    return this.#isBroken;
  }

  /** A copy has changes up to this number: the next one is higher. */
  mustBeAbove(number: number): void {
    this.#last = Math.max(this.last, number);
  }

  #lookForLast(): number {
    let newest: ChangesFile | undefined;
    try {
      const files = changesFiles(this.#names());
      newest = files.at(-1);
      if (newest === undefined) return 0;
      const { changes, problem } = readChanges(this.#disk, path.join(this.#directory, newest.name));
      const last = Math.max(newest.first - 1, changes.at(-1)?.number ?? 0);
      // One number is left out, so that a reader sees that something is missing.
      return problem !== undefined || files.some(({ isIncomplete }) => isIncomplete) ? last + 1 : last;
    } catch (error) {
      this.#isBroken = true;
      this.#failed(error);
      return newest?.first ?? 0;
    }
  }

  #names(): string[] {
    return this.#disk.existsSync(this.#directory) ? this.#disk.readdirSync(this.#directory) : [];
  }

  /**
   * Append changes. `last`: the number of the last of them. `durable` resolves when they are on stable storage, or could not be
   * recorded; it never rejects.
   */
  append(changes: readonly RecordedChange[]): { readonly last: number; readonly durable: Promise<void> } {
    const at = Date.now();
    const first = this.last + 1;
    const lines = changes.map((change, n) => changeLine({ number: first + n, at, change }));
    this.#last = first + changes.length - 1;
    const durable = new Promise<void>((done) => this.#queue.push({ lines, done }));
    this.#writing ??= this.#writeQueued(first).finally(() => (this.#writing = undefined));
    return { last: this.#last, durable };
  }

  /** Resolves when everything appended so far is written, or could not be; undefined if nothing is being written. */
  get writing(): Promise<void> | undefined {
    return this.#writing;
  }

  /** A copy begins: later changes go into a file of their own, so that older files can be removed with older copies. */
  async startAnew(): Promise<void> {
    while (this.#writing !== undefined) await this.#writing;
    this.#closeFile();
    this.#isBroken = false;
  }

  async close(): Promise<void> {
    await this.#writing;
    this.#closeFile();
  }

  /** All waiting changes are written and synced together. */
  async #writeQueued(first: number): Promise<void> {
    await Promise.resolve(); // changes of the same moment share a sync
    let next = first;
    while (this.#queue.length > 0) {
      const batch = this.#queue.splice(0);
      const lines = batch.flatMap((waiting) => waiting.lines);
      if (!this.#isBroken) {
        try {
          await this.#write(Buffer.concat(lines), next);
        } catch (error) {
          this.#break(error);
        }
      }
      next += lines.length;
      for (const { done } of batch) done();
    }
  }

  async #write(bytes: Buffer, first: number): Promise<void> {
    const isNew = this.#file === undefined;
    const file = (this.#file ??= await this.#create(first));
    await writeFully(this.#disk, file.fd, bytes, file.length);
    file.length += bytes.length;
    await this.#disk.fdatasync(file.fd);
    if (isNew) syncDirectory(this.#disk, this.#directory);
  }

  async #create(first: number): Promise<{ fd: number; name: string; length: number }> {
    if (makeDirectory(this.#disk, this.#directory, 0o700)) syncDirectory(this.#disk, path.dirname(this.#directory));
    const name = path.join(this.#directory, `changes-${first}`);
    const fd = await this.#disk.open(name, O_WRONLY | O_CREAT | O_EXCL, 0o600);
    try {
      const header = changesHeader(this.#ids());
      await writeFully(this.#disk, fd, header, 0);
      return { fd, name, length: header.length };
    } catch (error) {
      this.#disk.closeSync(fd);
      throw error;
    }
  }

  /** What is recorded must not be taken for complete: the file gets a name that says so, or goes. */
  #break(error: unknown): void {
    this.#isBroken = true;
    this.#closeFile();
    try {
      const newest = changesFiles(this.#names()).at(-1);
      if (newest && !newest.isIncomplete) this.#markIncomplete(path.join(this.#directory, newest.name));
    } catch {
      // The disk is gone.
    }
    this.#failed(error);
  }

  #markIncomplete(name: string): void {
    try {
      this.#disk.renameSync(name, `${name}${INCOMPLETE}`);
    } catch {
      this.#disk.unlinkSync(name);
    }
    syncDirectory(this.#disk, this.#directory);
  }

  #closeFile(): void {
    const file = this.#file;
    this.#file = undefined;
    if (file === undefined) return;
    try {
      this.#disk.closeSync(file.fd);
    } catch {
      // Its content was synced.
    }
  }
}
