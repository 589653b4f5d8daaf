/**
 * What the maps in memory have over the maps in meta.mdb, written down as it happens, so that a killed daemon loses no
 * write that it has answered: a client that connects again does not repeat those. Owns the files in recent/ (FORMAT.md).
 * They are never synced: they are for the death of the process, and are worth nothing after one of the machine, or of
 * the disk. What they say is only believed where it is certain that all they speak of is still there: see LogReader.
 */
import type { HostDisk } from '../../system/disk.js';
import { writeFully } from '../../system/whole-io.js';
import type { Awaitable } from '../object-store.js';
import { ENTRY_BYTES, fillEntry, headOf, MOVED, OWNER } from './map-log-format.js';
import { CHANGES } from './thread-shares.js';
import type { WriteThrottle } from './write-throttle.js';

/** A flush starts a new file when the present one is longer: often enough to keep them small, too seldom to be felt. */
const ROTATE_BYTES = 64 * 1024;
/** Changes that are remembered while a log cannot be written, until the flush under way is durable. */
const MAX_MISSED = 4096;

/** A file of a log, and how long it is. */
export interface LogFile {
  readonly name: string;
  readonly fd: number;
  length: number;
}

/** Where logs get their files: a new one with a header and `first` in it. */
export interface LogFolder {
  create(first: Buffer): LogFile;
  createLater(first: Buffer): Promise<LogFile>;
}

export function writeWhole(disk: HostDisk, name: string, fd: number, bytes: Buffer, offset: number): void {
  if (disk.writeSync(fd, bytes, offset) !== bytes.length) throw new Error(`${name}: written in part`);
}

/**
 * The log of one open VDI: a file, or several while flushes fail. Entries are written at once, or where the disk is too slow
 * for that, in the thread pool: many together, in the order in which they were made.
 */
export class MapLog {
  readonly #disk: HostDisk;
  #vid: number;
  #generation: number;
  readonly #throttle: WriteThrottle;
  readonly #folder: LogFolder;
  readonly #onError: (error: unknown) => void;
  readonly #entry = Buffer.alloc(ENTRY_BYTES);
  /** Files that the next successful flush makes superfluous. */
  #old: string[] = [];
  #file: LogFile | undefined;
  #isBroken = false;
  /** What has changed since the flush under way began, while nothing could be logged; undefined if not all is known. */
  #missed: { readonly vid: number; readonly entries: [number, number, number, number][] } | undefined;
  /** Entries that wait for the thread pool, and the first entry of the file, should they begin one. */
  #queue: Buffer[] = [];
  #queueHead: Buffer | undefined;
  /** They are in the file when it resolves. It never rejects. */
  #queued: Promise<void> | undefined;
  /** The same of those that are being written. */
  #writing: Promise<void> | undefined;
  /** What cannot be done to a file that is being written comes after it. */
  #endsSoon = false;
  #isRemoved = false;

  constructor(
    disk: HostDisk,
    vid: number,
    generation: number,
    throttle: WriteThrottle,
    folder: LogFolder,
    onError: (error: unknown) => void,
  ) {
    this.#disk = disk;
    this.#vid = vid;
    this.#generation = generation;
    this.#throttle = throttle;
    this.#folder = folder;
    this.#onError = onError;
  }

  /** The map entry of idx is `owner` now. In the file when this returns, or when what it returns resolves. */
  changed(idx: number, owner: number): Awaitable<void> {
    return this.#append(OWNER, idx, owner);
  }

  /**
   * A snapshot takes the VDI's vid, and the VDI goes on under `vid`; the flushes up to now are the snapshot's. In the file
   * before anything that comes after it is.
   */
  moved(vid: number, generation: number): void {
    void this.#append(MOVED, vid, 0);
    this.#vid = vid;
    this.#generation = generation;
  }

  /**
   * A flush takes over what has changed until now; what comes is for the one of `generation`. Returns what to call when
   * that is durable; if it fails, nothing. Not while a snapshot is not durable: a file has to tell of the move as long as
   * it may be undone.
   */
  flushing(generation: number): () => void {
    this.#generation = generation;
    this.#missed = this.#isBroken ? { vid: this.#vid, entries: [] } : undefined;
    if (this.#file !== undefined && this.#file.length > ROTATE_BYTES) {
      if (this.#isBusy) this.#endsSoon = true;
      else this.#endFile();
    }
    const { length } = this.#old;
    return () => {
      this.#unlink(length);
      this.#mend();
    };
  }

  /** Everything is durable, or given up: from now on no start reads it, also if a write to it is under way. */
  remove(): void {
    if (!this.#isBusy) {
      this.#removeFiles();
      return;
    }
    this.#isRemoved = true;
    this.#unlink(this.#old.length);
    if (this.#file) this.#unlinkFile(this.#file.name);
  }

  #removeFiles(): void {
    this.#endFile();
    this.#unlink(this.#old.length);
  }

  /** A flush has succeeded: if all is known that has changed since it began, the log is whole again from there. */
  #mend(): void {
    const missed = this.#missed;
    if (!this.#isBroken || missed === undefined) return;
    this.#isBroken = false;
    this.#missed = undefined;
    for (const [kind, first, second, generation] of missed.entries)
      void this.#write(missed.vid, kind, first, second, generation);
  }

  #append(kind: number, first: number, second: number): Awaitable<void> {
    if (!this.#isBroken) return this.#write(this.#vid, kind, first, second, this.#generation);
    if (this.#missed !== undefined && this.#missed.entries.length < MAX_MISSED)
      this.#missed.entries.push([kind, first, second, this.#generation]);
    else this.#missed = undefined;
  }

  #write(vid: number, kind: number, first: number, second: number, generation: number): Awaitable<void> {
    if (this.#isBroken) return;
    if (this.#isBusy || !this.#throttle.mayWrite()) return this.#writeLater(vid, kind, first, second, generation);
    const start = performance.now();
    try {
      this.#file ??= this.#folder.create(headOf(vid, generation));
      const entry = fillEntry(this.#entry, kind, first, second, generation);
      writeWhole(this.#disk, this.#file.name, this.#file.fd, entry, this.#file.length);
      this.#file.length += ENTRY_BYTES;
      this.#throttle.note(start);
    } catch (error) {
      this.#fail(error);
    }
  }

  get #isBusy(): boolean {
    return this.#queued !== undefined || this.#writing !== undefined;
  }

  #writeLater(vid: number, kind: number, first: number, second: number, generation: number): Promise<void> {
    this.#queueHead ??= headOf(vid, generation);
    this.#queue.push(fillEntry(Buffer.alloc(ENTRY_BYTES), kind, first, second, generation));
    this.#queued ??= this.#writeQueued();
    return this.#queued;
  }

  /** What is queued when those before it are written. */
  async #writeQueued(): Promise<void> {
    await this.#writing;
    const turn = CHANGES.enter(this);
    if (turn) await turn;
    const entries = Buffer.concat(this.#queue);
    const head = this.#queueHead ?? headOf(this.#vid, this.#generation);
    this.#queue = [];
    this.#queueHead = undefined;
    this.#writing = this.#queued;
    this.#queued = undefined;
    try {
      if (!this.#isRemoved && entries.length > 0) await this.#writeAll(entries, head);
    } catch (error) {
      // What waits was made before it was broken.
      this.#queue = [];
      this.#queueHead = undefined;
      this.#fail(error);
    }
    CHANGES.leave(this);
    this.#writing = undefined;
    if (this.#isBusy) return; // the next one sees to it
    if (this.#endsSoon) this.#endFile();
    if (this.#isRemoved) this.#removeFiles();
  }

  async #writeAll(entries: Buffer, head: Buffer): Promise<void> {
    if (this.#endsSoon) this.#endFile();
    const start = performance.now();
    this.#file ??= await this.#folder.createLater(head);
    if (this.#isRemoved) return;
    await writeFully(this.#disk, this.#file.fd, entries, this.#file.length);
    this.#file.length += entries.length;
    this.#throttle.noteOffLoop(start);
  }

  /** A full disk. The beginning of a log must not be restored: what it points at may be removed by then. */
  #fail(error: unknown): void {
    this.#isBroken = true;
    this.#missed = undefined;
    this.#removeFiles();
    this.#onError(error);
  }

  #endFile(): void {
    this.#endsSoon = false;
    if (!this.#file) return;
    this.#disk.closeSync(this.#file.fd);
    this.#old.push(this.#file.name);
    this.#file = undefined;
  }

  #unlink(count: number): void {
    for (const name of this.#old.splice(0, count)) this.#unlinkFile(name);
  }

  #unlinkFile(name: string): void {
    try {
      this.#disk.unlinkSync(name);
    } catch (error) {
      // Removed while it was being written, and again when that was done.
      if (!this.#isRemoved || (error as NodeJS.ErrnoException).code !== 'ENOENT') this.#onError(error);
    }
  }
}
