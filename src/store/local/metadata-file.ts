/**
 * The LMDB file of a local store, made to fail like a file: a failed commit is an error only for the changes in it, and the
 * next commit works as soon as the disk does. Owns the LMDB environment, the order of transactions, and the decision when
 * LMDB is opened again. Knows no keys.
 */
import { ABORT } from 'lmdb';
import { O_CREAT, O_RDONLY, O_RDWR, type HostDisk } from '../../system/disk.js';
import { readToEnd } from '../../system/whole-io.js';
import { StoreError } from '../store-error.js';
import { openEnvironment, type Environment } from './lmdb-environment.js';
import { extendToLastPage } from './lmdb-file.js';
import { asMetadataError, commitErrorOf, endWithoutClosing, hasPanicked, watchBegin } from './lmdb-failures.js';
import { readMeta, type LmdbPages, type LmdbState } from './lmdb-pages.js';
import { MetadataReserve } from './metadata-reserve.js';

const PROBE_BYTES = 4096;
const PROBE_CHUNK = 2 ** 20;
/** Commits are rarer by far. */
const META_READS = 8;

/** A state of the file that stays readable by its pages while transactions go on. */
export interface FileSnapshot {
  readonly state: LmdbState;
  /** Read in the thread pool. A result is valid until the next call. */
  readonly pages: LmdbPages;
  /** LMDB was closed or opened again: the pages may have other content now. */
  readonly isOver: boolean;
  /** To be called soon: until then the file may grow, because LMDB does not use free pages again. */
  release(): void;
}

interface Pending {
  readonly body: () => void;
  readonly resolve: () => void;
  readonly reject: (error: Error) => void;
  failure: unknown;
}

export class MetadataFile {
  readonly #disk: HostDisk;
  file: string;
  readonly readOnly: boolean;
  #env: Environment;
  /** A descriptor of the same file: for its size, its reserve, and for reads that fail with an error instead of SIGBUS. */
  readonly #fd: number;
  readonly #opened: (env: Environment) => void;
  readonly #queue: Pending[] = [];
  /** The commits in progress; undefined if none. */
  #committing: Promise<void> | undefined;
  #reopening: Promise<void> | undefined;
  /** Another process may have the store: nothing is read, written or opened here any more. */
  #isClosed = false;
  /** A commit has failed, and LMDB may refuse all later ones (MDB_PANIC): it must be opened again. */
  #mustReopen = false;
  /** A commit has failed for another reason than a full disk: the file may be unreadable. */
  #isSuspect = false;
  /** The whole file has not been read since it was opened, or since its disk failed on another file. */
  #isUnread = true;
  /**
   * A transaction did not begin. lmdb-js then holds a lock for ever: nothing can be stored any more, and closing the
   * environment would never end, even at the end of the process. Stored data can be read.
   */
  #isStuck = false;
  /** The largest size seen: LMDB never makes the file shorter. */
  #size = 0;
  #isOpen = true;
  readonly #reserve: MetadataReserve;
  readonly #probe = Buffer.alloc(PROBE_BYTES);
  /** To be released before the environment is closed. */
  readonly #snapshots = new Set<FileSnapshot>();

  /** `opened` is called with the environment, now and each time it is opened again. Errors: those of files and of LMDB. */
  constructor(
    disk: HostDisk,
    file: string,
    options: { readonly readOnly: boolean },
    opened: (env: Environment) => void,
  ) {
    this.#disk = disk;
    this.file = file;
    this.readOnly = options.readOnly;
    this.#opened = opened;
    this.#fd = disk.openSync(file, options.readOnly ? O_RDONLY : O_RDWR | O_CREAT, 0o600);
    this.#reserve = new MetadataReserve(disk, this.#fd);
    try {
      this.#env = this.#open();
    } catch (error) {
      disk.closeSync(this.#fd);
      throw error;
    }
  }

  /** Opening reads records through a mapping: the file is probed first. */
  #open(): Environment {
    this.#isUnread = true;
    this.#probeFile();
    return this.#disk.openDatabase(this.#fd, () => {
      const env = openEnvironment(this.#disk, this.file, { readOnly: this.readOnly });
      try {
        this.#opened(env);
        // Opening has made what was missing, in a transaction.
        if (!this.readOnly) extendToLastPage(this.#disk, this.#fd);
        return env;
      } catch (error) {
        void env.close();
        throw error;
      }
    });
  }

  /**
   * Run `body`, which puts and removes, in a transaction; its changes are durable when this resolves. If this fails, none of
   * them is stored. `body` runs again if the transaction failed and another change in it may be the reason.
   * Errors: NO_SPACE, IO, CLOSED.
   */
  transaction(body: () => void): Promise<void> {
    if (this.#isClosed) return Promise.reject(this.#closed());
    const done = new Promise<void>((resolve, reject) => {
      this.#queue.push({ body, resolve, reject, failure: undefined });
    });
    this.#committing ??= this.#commitQueued();
    return done;
  }

  /** One commit at a time: all changes that arrive meanwhile share the next one. */
  async #commitQueued(): Promise<void> {
    await Promise.resolve(); // until #committing is set
    while (this.#queue.length > 0) {
      const batch: Pending[] = [];
      const error = await this.#commit(() => {
        batch.push(...this.#queue.splice(0));
        return batch;
      });
      // The commit may have failed before it took the queue.
      if (error !== undefined && batch.length === 0) batch.push(...this.#queue.splice(0));
      if (error !== undefined && batch.length > 1) {
        // A change that is too large for the space left must not fail the others.
        for (const pending of batch) settle(pending, await this.#commit(() => [pending]));
      } else {
        for (const pending of batch) settle(pending, error);
      }
    }
    this.#committing = undefined;
  }

  /** Returns what failed, or undefined. The failure of a single body is stored with it. */
  async #commit(take: () => readonly Pending[]): Promise<StoreError | undefined> {
    try {
      this.#probeFile(); // LMDB reads in a transaction, too
      if (this.#isStuck) throw this.#stuck();
      if (this.#mustReopen || hasPanicked(this.#env)) await this.#reopen();
      await this.#disk.commit(this.#fd, () => this.#run(this.#env, take));
      this.#isSuspect = false;
    } catch (error) {
      if (this.#isStuck) return asMetadataError(error, `storing metadata in ${this.file}`);
      const failure = this.#asCommitError(await commitErrorOf(error));
      this.#isSuspect ||= failure.code !== 'NO_SPACE';
      // Also on a full disk: if the page that makes a commit valid had no room, LMDB never begins a transaction again.
      this.#mustReopen = true;
      // At once, for readers; if the disk still fails, the next commit tries again.
      await this.#reopen().catch(() => undefined);
      return failure;
    }
    try {
      extendToLastPage(this.#disk, this.#fd);
      this.keepReserve();
    } catch {
      // The commit itself is durable; the next one tries again.
    }
    return undefined;
  }

  /** One transaction for all taken changes. Errors: LMDB's; IO if it does not begin, and then nothing of it is ever stored. */
  async #run(env: Environment, take: () => readonly Pending[]): Promise<void> {
    let hasBegun = false;
    const done = env.transaction(() => {
      hasBegun = true;
      if (this.#isStuck) return; // too late: it was reported as failed
      for (const pending of take()) runIn(env, pending);
    });
    let stopWatching!: () => void;
    const late = new Promise<never>((_, reject) => {
      stopWatching = watchBegin(
        () => hasBegun,
        () => {
          this.#isStuck = true;
          process.on('exit', endWithoutClosing);
          reject(this.#stuck());
        },
      );
    });
    const ended = (): void => {
      stopWatching();
      this.#isStuck = false;
      process.off('exit', endWithoutClosing);
    };
    done.then(ended, ended);
    await Promise.race([done, late]);
  }

  #stuck(): StoreError {
    return new StoreError(
      'IO',
      `storing metadata in ${this.file}: LMDB does not begin a transaction (no memory?); nothing can be changed until this ` +
        'process is started again; flushed data is safe',
    );
  }

  /** LMDB reports a write that a full disk cut short as EIO (mdb.c, mdb_page_flush). */
  #asCommitError(error: unknown): StoreError {
    const doing = `storing metadata in ${this.file}`;
    const failure = asMetadataError(error, doing);
    if (failure.code !== 'IO') return failure;
    try {
      if (!this.#reserve.isDiskFull(this.#sizeNow())) return failure;
    } catch {
      return failure;
    }
    return new StoreError('NO_SPACE', `${doing}: no space left on device`, { cause: error });
  }

  /** Go back to the state on disk: LMDB's memory may have parts of a failed commit. */
  #reopen(): Promise<void> {
    this.#reopening ??= this.#openAnew().finally(() => (this.#reopening = undefined));
    return this.#reopening;
  }

  /** Resolves when LMDB is not being opened again, whatever came of that: a failed commit is not a reader's error. */
  async settled(): Promise<void> {
    while (this.#reopening !== undefined) await this.#reopening.catch(() => undefined);
  }

  async #openAnew(): Promise<void> {
    if (this.#isOpen) {
      // Closed before opening: for a file that is open, lmdb-js returns the same environment, which has failed.
      this.#isOpen = false;
      this.#releaseSnapshots();
      await this.#disk.closeDatabase(this.#fd, () => this.#env.close()).catch(() => undefined);
    }
    this.#env = this.#open();
    this.#isOpen = true;
    this.#mustReopen = false;
  }

  /** See MetadataReserve. Errors: NO_SPACE, with nothing changed. */
  mustHaveRoom(bytes: number): void {
    this.#reserve.mustHaveRoom(this.#sizeNow(), bytes, this.file);
  }

  #closed(): StoreError {
    return new StoreError('CLOSED', `${this.file} is closed`);
  }

  #sizeNow(): number {
    if (this.#isClosed && this.#committing === undefined) throw this.#closed();
    try {
      return this.#disk.fstatSync(this.#fd).size;
    } catch (error) {
      throw asMetadataError(error, `reading metadata in ${this.file}`);
    }
  }

  /** See MetadataReserve. */
  keepReserve(): void {
    this.#reserve.keep(this.#sizeNow());
  }

  /**
   * To be called before reading: LMDB reads through a mapping, and a page that the disk cannot read would end the process
   * (SIGBUS) instead of being an error. Any read detects a filesystem that was shut down; after a failure the whole file is
   * read, so that the mapping's pages are in memory. Errors: IO, DAMAGED (the file became shorter), CLOSED.
   */
  mustBeReadable(): void {
    if (this.#isClosed) throw this.#closed();
    if (!this.#isOpen) {
      throw new StoreError(
        'IO',
        `${this.file} cannot be read: its disk has failed, and it could not be opened again yet`,
      );
    }
    this.#probeFile();
  }

  /** Its disk has failed on another file: pages of this file that are not in memory may be lost as well. */
  suspectDisk(): void {
    this.#isUnread = true;
  }

  #probeFile(): void {
    try {
      const { size } = this.#disk.fstatSync(this.#fd);
      if (size < this.#size) {
        throw new StoreError(
          'DAMAGED',
          `${this.file} was truncated while it was open: it has ${size} bytes and had ${this.#size}`,
        );
      }
      this.#size = size;
      if (!this.#isSuspect && !this.#isUnread) {
        this.#disk.readSync(this.#fd, this.#probe, 0);
        return;
      }
      const chunk = Buffer.allocUnsafe(PROBE_CHUNK);
      for (let at = 0; at < size; at += PROBE_CHUNK) this.#disk.readSync(this.#fd, chunk, at);
      this.#isUnread = false;
    } catch (error) {
      throw asMetadataError(error, `reading metadata in ${this.file}`);
    }
  }

  /** The last state, or one that is being committed. Errors: IO, DAMAGED, CLOSED. */
  snapshot(): FileSnapshot {
    this.mustBeReadable();
    // A reader of LMDB: no page of its state or of a later one is used again before it ends.
    const reader = this.#env.useReadTransaction();
    const state = this.#lastState();
    const { pageSize } = state;
    let buffer = Buffer.alloc(2 * pageSize);
    let isOver = false;
    const snapshot: FileSnapshot = {
      state,
      get isOver() {
        return isOver;
      },
      pages: {
        pageSize,
        get: async (page, count) => {
          if (buffer.length < count * pageSize) buffer = Buffer.alloc(count * pageSize);
          const into = buffer.subarray(0, count * pageSize);
          return into.subarray(0, await readToEnd(this.#disk, this.#fd, into, page * pageSize));
        },
      },
      release: () => {
        if (isOver) return;
        isOver = true;
        this.#snapshots.delete(snapshot);
        reader.done();
      },
    };
    this.#snapshots.add(snapshot);
    return snapshot;
  }

  /** LMDB's number of the last transaction. Errors: as `snapshot`. */
  get transactions(): number {
    return this.#lastState().transaction;
  }

  /** The length of the file, at most as it was when it was last read or written. */
  get bytes(): number {
    return this.#size;
  }

  /** A commit may be writing a meta page meanwhile: it is read until two results are the same. */
  #lastState(): LmdbState {
    let before = '';
    for (let tries = 0; tries < META_READS; tries++) {
      const { states } = readMeta(this.#disk, this.#fd);
      const now = JSON.stringify(states);
      const [state] = states;
      if (state !== undefined && now === before) return state;
      before = now;
    }
    throw new StoreError('DAMAGED', `the meta pages of ${this.file} are damaged`);
  }

  #releaseSnapshots(): void {
    for (const snapshot of [...this.#snapshots]) snapshot.release();
  }

  /** The file has a new name, under which it will be opened again if need be. */
  renamed(file: string): void {
    this.file = file;
  }

  /** Close after all queued changes and `last` are stored; closed in any case. Errors: those of `last`. */
  async close(last?: () => void): Promise<void> {
    if (this.#isClosed) return;
    const stored = last === undefined ? undefined : this.transaction(last);
    this.#isClosed = true;
    try {
      await stored;
    } finally {
      await this.#committing;
      this.#releaseSnapshots();
      try {
        if (this.#isOpen && !this.#isStuck) await this.#disk.closeDatabase(this.#fd, () => this.#env.close());
      } finally {
        this.#disk.closeSync(this.#fd);
      }
    }
  }
}

function settle(pending: Pending, error: StoreError | undefined): void {
  if (pending.failure !== undefined) pending.reject(asMetadataError(pending.failure, 'storing metadata'));
  else if (error !== undefined) pending.reject(error);
  else pending.resolve();
}

/** In a child transaction, so that a body that throws stores nothing. */
function runIn(env: Environment, pending: Pending): void {
  pending.failure = undefined;
  try {
    void env.childTransaction(() => {
      try {
        pending.body();
      } catch (error) {
        pending.failure = error;
        return ABORT;
      }
    });
  } catch (error) {
    pending.failure ??= error;
  }
}
