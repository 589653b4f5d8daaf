/**
 * Everything that happened to the files of one machine, in order, and what of it is durable since when. Owns the two sets of
 * rules:
 *
 * - strict: what POSIX promises and no more. Data and size of a file are durable by fsync or fdatasync of that file, a name by
 *   fsync of its directory. What was not synced may have reached the disk or not, each part for itself.
 * - ext4: metadata (names, sizes that truncate sets, holes) becomes durable in order, because it is in one journal; any sync
 *   of a file or directory that has metadata in it writes the journal up to there (fs/ext4/fsync.c, ext4_fsync_journal). Data
 *   is as before, except that a file grows by a write only together with its data (data=ordered, delayed allocation).
 *
 * Never decides what of the rest is kept: crash-state.ts does.
 */
import type { ChunkChange } from './content.js';

/** The number of an inode. */
export type Ino = number;

interface Common {
  /** When it took effect. */
  readonly at: number;
  /** When it became durable, by the strict rules and by those of ext4. */
  durable: number;
  ext4: number;
}

/** `sizeAfter` is undefined if the size stays as it is. */
export interface DataEvent extends Common {
  readonly type: 'data';
  readonly ino: Ino;
  readonly chunks: readonly ChunkChange[];
  readonly sizeAfter: number | undefined;
  /** Made by truncate or by punching a hole: metadata. */
  readonly isMetadata: boolean;
}

/** Names of one directory that change together; undefined removes a name. */
export interface NameEvent extends Common {
  readonly type: 'name';
  readonly directory: Ino;
  readonly changes: readonly { readonly name: string; readonly ino: Ino | undefined }[];
  /**
   * The removal of the old name by a rename into another directory, which is this event. Either may be durable first, but no
   * filesystem loses both names of a file that had one.
   */
  removal?: NameEvent;
}

/**
 * A transaction of LMDB, which took effect at `at` and was in progress since `begun`. LMDB (mdb.c of lmdb-js 3.5, without
 * MDB_WRITEMAP, MDB_NOSYNC, MDB_NOMETASYNC and MDB_OVERLAPPINGSYNC: lmdb-environment.ts sets overlappingSync to false) does:
 * mdb_txn_commit: mdb_page_flush (pwrite of the dirty pages, none of which the last two states use), mdb_env_sync0 (fdatasync),
 * mdb_env_write_meta (pwrite of one meta page, fewer bytes than a sector, through a descriptor with O_DSYNC). So until the meta
 * page is written, any part of the other pages may be on the disk, and the old meta page, which is intact, is the valid one.
 */
export interface CommitEvent extends Common {
  readonly type: 'commit';
  readonly ino: Ino;
  readonly begun: number;
  readonly chunks: readonly ChunkChange[];
  readonly sizeAfter: number;
}

export type Event = DataEvent | NameEvent | CommitEvent;

/** LMDB's meta pages. */
export const META_PAGES = 2;

export class Journal {
  readonly events: Event[] = [];
  /** Moments at which the files changed, or an operation began or was answered. */
  #now: number;
  /** Not durable yet by the strict rules: data by file, names by directory. */
  readonly #pending = new Map<Ino, (DataEvent | NameEvent)[]>();
  /** Metadata that is not durable yet by the rules of ext4. */
  #unjournaled: (DataEvent | NameEvent)[] = [];

  /** Moments are counted on from `start`. */
  constructor(start = 0) {
    this.#now = start;
  }

  get now(): number {
    return this.#now;
  }

  /** Something begins or is answered now. */
  mark(): number {
    return ++this.#now;
  }

  data(ino: Ino, chunks: readonly ChunkChange[], sizeAfter: number | undefined, isMetadata: boolean): void {
    if (chunks.length === 0 && sizeAfter === undefined) return;
    this.#add(ino, { type: 'data', ino, chunks, sizeAfter, isMetadata, ...this.#common() });
  }

  names(directory: Ino, changes: NameEvent['changes']): NameEvent {
    const event: NameEvent = { type: 'name', directory, changes, ...this.#common() };
    this.#add(directory, event);
    return event;
  }

  commit(ino: Ino, begun: number, chunks: readonly ChunkChange[], sizeAfter: number): void {
    if (chunks.length === 0) return;
    const at = this.mark();
    this.events.push({ type: 'commit', ino, begun, chunks, sizeAfter, at, durable: at, ext4: at });
  }

  /** A sync that began at `begun` has ended now; of everything if `ino` is undefined. */
  sync(ino: Ino | undefined, begun: number): void {
    const now = this.mark();
    const files = ino === undefined ? [...this.#pending.keys()] : [ino];
    const isCovered = ({ at }: Event): boolean => at <= begun;
    let writesJournal = ino === undefined;
    for (const file of files) {
      const pending = this.#pending.get(file) ?? [];
      for (const event of pending.filter(isCovered)) {
        event.durable = now;
        if (!isInJournal(event)) event.ext4 = now;
        else if (event.ext4 === Infinity) writesJournal = true;
      }
      this.#pending.set(
        file,
        pending.filter((event) => !isCovered(event)),
      );
    }
    if (!writesJournal) return;
    for (const event of this.#unjournaled.filter(isCovered)) event.ext4 = now;
    this.#unjournaled = this.#unjournaled.filter((event) => !isCovered(event));
  }

  #common(): Common {
    return { at: this.mark(), durable: Infinity, ext4: Infinity };
  }

  #add(of: Ino, event: DataEvent | NameEvent): void {
    this.events.push(event);
    const pending = this.#pending.get(of);
    if (pending) pending.push(event);
    else this.#pending.set(of, [event]);
    if (isInJournal(event)) this.#unjournaled.push(event);
  }
}

export function isInJournal(event: Event): boolean {
  return event.type === 'name' || (event.type === 'data' && event.isMetadata);
}
