/**
 * The log of one open VDI: changes of its map in memory that meta.mdb does not have yet (FORMAT.md, recent/), so that a killed
 * daemon loses no answered write. A client that connects again does not repeat those. Owns the files that it writes. It never
 * syncs them: they protect against the end of the process, not of the machine or the disk. map-log-reading.ts decides what is
 * applied at the next start.
 */
import type { HostDisk } from '../../system/disk.js';
import { writeFully } from '../../system/whole-io.js';
import type { Awaitable } from '../vdi-record.js';
import {
  BASED,
  BELOW,
  ENTRY_BYTES,
  fillEntry,
  HAS_BLOCKS,
  headOf,
  LACKS_BLOCKS,
  MADE_WHOLE,
  MOVED,
  OVERLAID,
  OWNER,
  packBlocks,
  unpackBlocks,
} from './map-log-format.js';
import { CHANGES } from './thread-shares.js';
import type { WriteThrottle } from './write-throttle.js';

/** A flush begins a new file when the present one is longer than this: files stay small, and new files stay rare. */
const ROTATE_BYTES = 64 * 1024;
/** A file that is longer than this asks for a flush: of a client that never flushes, the log would grow with every new block. */
export const LONG_BYTES = 2 ** 20;
/** Changes that are kept in memory while the log cannot be written, until the flush in progress is durable. */
const MAX_MISSED = 4096;

/** A file of a log, and its length in bytes. */
export interface LogFile {
  readonly name: string;
  readonly fd: number;
  length: number;
}

/** Creates the files of logs, each with a header and the entry `first`. Errors: those of the disk. */
export interface LogFolder {
  create(first: Buffer): LogFile;
  createLater(first: Buffer): Promise<LogFile>;
}

export function writeWhole(disk: HostDisk, name: string, fd: number, bytes: Buffer, offset: number): void {
  if (disk.writeSync(fd, bytes, offset) !== bytes.length) throw new Error(`${name}: written in part`);
}

/**
 * One file, or several while flushes fail. Entries are written on the event loop, or, while the disk is too slow for that, in
 * the thread pool: many together, in their order.
 */
export class MapLog {
  readonly #disk: HostDisk;
  #vid: number;
  #generation: number;
  readonly #throttle: WriteThrottle;
  readonly #folder: LogFolder;
  readonly #onError: (error: unknown) => void;
  readonly #entry = Buffer.alloc(ENTRY_BYTES);
  /** Files that the next successful flush makes unnecessary. */
  #old: string[] = [];
  #file: LogFile | undefined;
  #isBroken = false;
  /** Called once for each file that has become long. */
  onLong: (() => void) | undefined;
  #isLong = false;
  /** Changes since the flush in progress began, while the log is broken; undefined if they are not complete. */
  #missed: { readonly vid: number; readonly entries: [number, number, number, number][] } | undefined;
  /** Entries that wait for the thread pool, and the first entry of a file, in case they begin one. */
  #queue: Buffer[] = [];
  #queueHead: Buffer | undefined;
  /** Resolves when the queued entries are in the file. It never rejects. */
  #queued: Promise<void> | undefined;
  /** The same for the entries that are being written. */
  #writing: Promise<void> | undefined;
  /** To be done after the write in flight: end the file; remove all files. */
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

  /** Log that the map entry of idx is now `owner`. It is in the file when this returns, or when the promise resolves. */
  changed(idx: number, owner: number): Awaitable<void> {
    return this.#append(OWNER, idx, owner);
  }

  /** The same; the object is an overlay over the one that idx had, without any block. */
  overlaid(idx: number, owner: number): Awaitable<void> {
    return this.#append(OVERLAID, idx, owner);
  }

  /** The same as `changed`; the object is a whole file, and was an overlay before. */
  madeWhole(idx: number, owner: number): Awaitable<void> {
    return this.#append(MADE_WHOLE, idx, owner);
  }

  /** Log that the overlay of idx lies over the object of the vid `base` now; over nothing if that is its own vid. */
  based(idx: number, base: number): Awaitable<void> {
    return this.#append(BASED, idx, base);
  }

  /** The next entry is about the overlay (vid, idx), which is below the object that the map has at idx. */
  below(idx: number, vid: number): Awaitable<void> {
    return this.#append(BELOW, idx, vid);
  }

  /** Log that the overlay of idx has the blocks [first, end) now, or has them not. */
  blocks(idx: number, first: number, end: number, has: boolean): Awaitable<void> {
    let logged: Awaitable<void> = undefined;
    for (let at = first; at < end;) {
      const packed = packBlocks(at, end);
      // Entries are written in their order: when the last one is in the file, all are.
      logged = this.#append(has ? HAS_BLOCKS : LACKS_BLOCKS, idx, packed);
      at = unpackBlocks(packed).end;
    }
    return logged;
  }

  /**
   * Log that a snapshot has taken the VDI's vid, and the VDI continues under `vid`; flushes up to now belong to the snapshot. The
   * entry is in the file before all later entries.
   */
  moved(vid: number, generation: number): void {
    void this.#append(MOVED, vid, 0);
    this.#vid = vid;
    this.#generation = generation;
  }

  /**
   * A flush takes over the changes until now; later changes belong to the flush of `generation`. Returns a function to call
   * when the flush is durable; if the flush fails, it is not called. Not to be called while a snapshot is not durable: as long
   * as the snapshot may be undone, a file must contain its move.
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

  /** All changes are durable or given up: no later start reads this log, even if a write to it is in flight. */
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

  /** A flush has succeeded: if all changes since it began are known, the log is complete again from there. */
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
      this.#grow(this.#file, ENTRY_BYTES);
      this.#throttle.note(start);
    } catch (error) {
      this.#fail(error);
    }
  }

  #grow(file: LogFile, bytes: number): void {
    file.length += bytes;
    if (file.length <= LONG_BYTES || this.#isLong) return;
    this.#isLong = true;
    this.onLong?.();
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

  /** Write the entries that are queued when the write before is done. */
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
      // Entries that wait are older than the failure: they are lost with the log.
      this.#queue = [];
      this.#queueHead = undefined;
      this.#fail(error);
    }
    CHANGES.leave(this);
    this.#writing = undefined;
    if (this.#isBusy) return; // the next write does the rest
    if (this.#endsSoon) this.#endFile();
    if (this.#isRemoved) this.#removeFiles();
  }

  async #writeAll(entries: Buffer, head: Buffer): Promise<void> {
    if (this.#endsSoon) this.#endFile();
    const start = performance.now();
    this.#file ??= await this.#folder.createLater(head);
    if (this.#isRemoved) return;
    await writeFully(this.#disk, this.#file.fd, entries, this.#file.length);
    this.#grow(this.#file, entries.length);
    this.#throttle.noteOffLoop(start);
  }

  /** A full disk. The first part of a log must not be applied alone: objects that it names may be removed by then. */
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
    this.#isLong = false;
  }

  #unlink(count: number): void {
    for (const name of this.#old.splice(0, count)) this.#unlinkFile(name);
  }

  #unlinkFile(name: string): void {
    try {
      this.#disk.unlinkSync(name);
    } catch (error) {
      // Removed during a write, and again after it.
      if (!this.#isRemoved || (error as NodeJS.ErrnoException).code !== 'ENOENT') this.#onError(error);
    }
  }
}
