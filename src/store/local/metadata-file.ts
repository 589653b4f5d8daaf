/**
 * The LMDB file of a local store as something that fails like a file: a failed commit is an error of those whose change it
 * held, and of nobody else; the next one works as soon as the disk does. Owns the LMDB environment, the order of
 * transactions, and when LMDB is opened anew. Knows no keys.
 */
import { ABORT } from 'lmdb';
import { O_CREAT, O_RDONLY, O_RDWR, type HostDisk } from '../../system/disk.js';
import { StoreError } from '../object-store.js';
import { openEnvironment, type Environment } from './lmdb-environment.js';
import { asMetadataError, commitErrorOf, endWithoutClosing, hasPanicked, watchBegin } from './lmdb-failures.js';
import { MetadataReserve } from './metadata-reserve.js';

const PROBE_BYTES = 4096;
const PROBE_CHUNK = 2 ** 20;

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
  /** Of the same file: for its size, its reserve, and for reads that fail with an error. */
  readonly #fd: number;
  readonly #opened: (env: Environment) => void;
  readonly #queue: Pending[] = [];
  /** Commits of what is queued; undefined if none runs. */
  #committing: Promise<void> | undefined;
  #reopening: Promise<void> | undefined;
  /** Somebody else may have the store: nothing is read, written or opened here any more. */
  #isClosed = false;
  /** A commit has failed, after which LMDB may refuse all further ones (MDB_PANIC): it has to be opened anew. */
  #mustReopen = false;
  /** A commit has failed with something else than a full disk: nothing says that the file can still be read. */
  #isSuspect = false;
  /** Not all of the file has been read since it was opened, or since its disk has failed somewhere else. */
  #isUnread = true;
  /**
   * A transaction did not begin. Then lmdb-js holds a lock for ever: nothing can be stored any more, and to close the
   * environment would never end, not at the end of the process either. What is stored can be read.
   */
  #isStuck = false;
  /** LMDB never makes the file shorter. */
  #size = 0;
  #isOpen = true;
  readonly #reserve: MetadataReserve;
  readonly #probe = Buffer.alloc(PROBE_BYTES);

  /** `opened` is told of the environment, now and whenever it is opened anew. Errors: as `asMetadataError` has them. */
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

  /** Opening reads records, through a mapping. */
  #open(): Environment {
    this.#isUnread = true;
    this.#probeFile();
    return this.#disk.openDatabase(this.#fd, () => {
      const env = openEnvironment(this.#disk, this.file, { readOnly: this.readOnly });
      try {
        this.#opened(env);
        return env;
      } catch (error) {
        void env.close();
        throw error;
      }
    });
  }

  /**
   * Run `body`, which puts and removes, in a transaction; what it did is on disk when this resolves. If this fails nothing
   * of it is stored. `body` runs again if the transaction failed for reasons that may be another's.
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

  /** One at a time: whoever comes meanwhile is in the next one, with all others that came. */
  async #commitQueued(): Promise<void> {
    await Promise.resolve(); // until it is known that it runs
    while (this.#queue.length > 0) {
      const batch: Pending[] = [];
      const error = await this.#commit(() => {
        batch.push(...this.#queue.splice(0));
        return batch;
      });
      // It may have failed before it asked who takes part.
      if (error !== undefined && batch.length === 0) batch.push(...this.#queue.splice(0));
      if (error !== undefined && batch.length > 1) {
        // One that is too large for what is left must not fail those that are not.
        for (const pending of batch) settle(pending, await this.#commit(() => [pending]));
      } else {
        for (const pending of batch) settle(pending, error);
      }
    }
    this.#committing = undefined;
  }

  /** Returns what failed, or undefined; a body's own failure is noted with it. */
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
      // On a full disk, too: if it was full for the page that makes a commit valid, LMDB never again begins a transaction.
      this.#mustReopen = true;
      // At once, for those who read; if the disk is still ill, the next commit tries again.
      await this.#reopen().catch(() => undefined);
      return failure;
    }
    try {
      this.keepReserve();
    } catch {
      // What was committed is; the next one will tell.
    }
    return undefined;
  }

  /** The transaction of all that take part. Errors: its own; IO if it does not begin, and then nothing of it is ever stored. */
  async #run(env: Environment, take: () => readonly Pending[]): Promise<void> {
    let hasBegun = false;
    const done = env.transaction(() => {
      hasBegun = true;
      if (this.#isStuck) return; // too late: they were told that it has failed
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
        'process is started again, what is flushed stays as it is',
    );
  }

  /** A write that was cut short by the end of the disk is EIO for LMDB (mdb.c, mdb_page_flush). */
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

  /** What is on disk is the truth again, whatever LMDB has in memory of a commit that failed. */
  #reopen(): Promise<void> {
    this.#reopening ??= this.#openAnew().finally(() => (this.#reopening = undefined));
    return this.#reopening;
  }

  /** Resolves when nobody is opening it anew, whatever has come of that: others' failed commits are not the reader's. */
  async settled(): Promise<void> {
    while (this.#reopening !== undefined) await this.#reopening.catch(() => undefined);
  }

  async #openAnew(): Promise<void> {
    if (this.#isOpen) {
      // Before opening: lmdb-js opens a file once, and whoever opens it again gets the environment that has failed.
      this.#isOpen = false;
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
   * To be called before reading: LMDB reads through a mapping, and a page that its disk does not give would end the process
   * (SIGBUS) instead of being an error. A filesystem that was shut down is found out by any read; after a failure all of the
   * file is read, so that what the mapping needs is in memory. Errors: IO, DAMAGED, CLOSED.
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

  /** Its disk has failed to give or take something else: what of this file is not in memory may be lost as well. */
  suspectDisk(): void {
    this.#isUnread = true;
  }

  #probeFile(): void {
    try {
      const { size } = this.#disk.fstatSync(this.#fd);
      if (size < this.#size) {
        throw new StoreError(
          'DAMAGED',
          `${this.file} was cut off while it was open: it has ${size} bytes and had ${this.#size}`,
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

  /** It has another name now, under which it is opened anew if need be. */
  renamed(file: string): void {
    this.file = file;
  }

  /** After what was asked for until now is stored, and `last`. Closed in any case. Errors: those of `last`. */
  async close(last?: () => void): Promise<void> {
    if (this.#isClosed) return;
    const stored = last === undefined ? undefined : this.transaction(last);
    this.#isClosed = true;
    try {
      await stored;
    } finally {
      await this.#committing;
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

/** In a transaction of its own within the one of all, so that one that throws stores nothing. */
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
