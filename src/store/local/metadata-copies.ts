/**
 * The folder copies/ of a store (FORMAT.md): verified copies of the metadata, and the record of what has changed since. Owns when
 * a copy is made: when the store is closed, and in the background after changes, at a bounded rate. No operation waits for a copy,
 * and none fails because a copy cannot be made: that is one warning. On a full disk copies give way.
 */
import path from 'node:path';
import timers from 'node:timers/promises';
import { O_CREAT, O_EXCL, O_RDWR, removeIfThereSync, type HostDisk } from '../../system/disk.js';
import { syncDirectory } from '../../system/durable-names.js';
import { makeDirectory } from '../../system/make-directory.js';
import { StoreError } from '../store-error.js';
import type { RecordedChange } from './change-format.js';
import { ChangeRecord, changesFiles } from './change-record.js';
import { databasesOf } from './lmdb-pages.js';
import type { ChangeNoter, Metadata, MetadataChange, Noted } from './metadata.js';
import { COPY_HEADER_BYTES, copyProblem, CopyWriter, parseHeader, type CopyHeader } from './metadata-copy-format.js';
import type { Overlays } from './overlays.js';
import { openPlainFile } from './plain-file.js';
import { vidOf } from './reference-counts.js';
import { rescueOf } from './rescue-advice.js';

/** The folder of copies in a store. */
export const COPIES = 'copies';
/** A copy that is being written. */
const NEW_COPY = 'new';
/** Older copies are removed when a newer one is verified. */
const GENERATIONS = 2;
/** Of a copy: entries that are no entries of meta.mdb, but say which working VDI made objects under a vid without a record. */
export const CREATION_VIDS = '+names';
/** The same, for vids whose overlays have given blocks to the objects below. */
export const MERGED_VIDS = '+merged';
/** Creation vids in a copy at most: each was given by a temporary snapshot of this session. */
const MAX_CREATION_VIDS = 4096;
/** A change is in a copy after this time, if the last copy is old enough. */
const DELAY_MS = 5_000;
/** Time between two copies in the background. */
const EVERY_MS = 60_000;
/** A copy that takes long is made less often: copies take this part of the time at most. */
const SHARE_OF_TIME = 1 / 20;
/** A copy that takes no longer is made at every close. */
const QUICK_MS = 100;
/** What a copy without a bound on its rate reads at least, of metadata in the page cache. */
const URGENT_BYTES_PER_SECOND = 64 * 2 ** 20;
/** After failures the time between two tries doubles up to this. */
const MAX_EVERY_MS = 3_600_000;
/** Bytes of metadata a second that a copy in the background reads. */
const BYTES_PER_SECOND = 32 * 2 ** 20;
const BLOCK_BYTES = 256 * 1024;
/** A copy is made only if the disk has room for it and for this much more. */
const FREE_BYTES = 16 * 2 ** 20;

export interface CopyTimes {
  readonly delayMs?: number;
  readonly everyMs?: number;
  /** Copies take this part of the time at most. */
  readonly share?: number;
}

/** What the copies need of their store. */
export interface CopiedStore {
  readonly disk: HostDisk;
  readonly location: string;
  readonly metadata: Metadata;
  readonly overlays: Pick<Overlays, 'uses'>;
  /** Nothing is copied or recorded then. */
  readonly readOnlyBecause: string | undefined;
  /** For the operator. */
  log(line: string, details?: object): void;
}

/** A copy, by its name. */
export interface CopyFile {
  readonly name: string;
  readonly number: number;
}

/** The copies among `names`, newest first. */
export function copyFiles(names: readonly string[]): CopyFile[] {
  return names
    .flatMap((name) => {
      const found = /^copy-(\d{1,15})$/.exec(name);
      return found ? [{ name, number: Number(found[1]) }] : [];
    })
    .sort((a, b) => b.number - a.number);
}

/** Undefined if it is damaged. Errors: those of the disk. */
export function headerOf(disk: HostDisk, file: string): CopyHeader | undefined {
  const fd = openPlainFile(disk, file);
  try {
    const bytes = Buffer.alloc(COPY_HEADER_BYTES);
    disk.readSync(fd, bytes, 0);
    return parseHeader(bytes);
  } finally {
    disk.closeSync(fd);
  }
}

/** Undefined also if it cannot be read: one bad file does not hide the others. */
function readableHeader(disk: HostDisk, file: string): CopyHeader | undefined {
  try {
    return headerOf(disk, file);
  } catch {
    return undefined; // `check` says why
  }
}

/** The highest number of a copy, 0 if there is none, and the header of the newest copy that has one. Errors: those of the disk. */
function newestCopy(disk: HostDisk, location: string): { number: number; header: CopyHeader | undefined } {
  const directory = path.join(location, COPIES);
  const copies = disk.existsSync(directory) ? copyFiles(disk.readdirSync(directory)) : [];
  for (const { name } of copies) {
    const header = readableHeader(disk, path.join(directory, name));
    if (header) return { number: copies[0]?.number ?? 0, header };
  }
  return { number: copies[0]?.number ?? 0, header: undefined };
}

/**
 * Compare meta.mdb with the newest copy, before anything is changed. Errors: DAMAGED (meta.mdb is another store's, or older than
 * its own copy).
 */
export function mustBeOfCopies(disk: HostDisk, location: string, metadata: Metadata): void {
  let header: CopyHeader | undefined;
  try {
    ({ header } = newestCopy(disk, location));
  } catch {
    return; // the store works without its copies; MetadataCopies warns
  }
  if (header === undefined) return;
  const { store, transaction } = header;
  const isForeign = store !== metadata.identity;
  // The last commit before a power loss may be in a copy although it is not in meta.mdb.
  if (!isForeign && metadata.transaction >= transaction - 1) return;
  throw new StoreError(
    'DAMAGED',
    `${path.join(location, 'meta.mdb')} is ${isForeign ? 'of another store than' : 'older than its own copy in'} ` +
      `${path.join(location, COPIES)}: ${rescueOf(location)}`,
  );
}

/** Lines of the record that are written once for each vid and copy. */
const SAID = ['map', 'overlays', 'merged'] as const;
type Said = (typeof SAID)[number];
/** Vids, by what the record says of them. */
type Touched = Readonly<Record<Said, Set<number>>>;

/** The disk has no room to spare for a copy, or the store is being closed. */
class GivesWay extends Error {}

/** The lines that say all this, without what was said. */
function linesOf(touched: Touched, said: Touched): RecordedChange[] {
  const unsaid = (kind: Said): number[] => [...touched[kind]].filter((vid) => !said[kind].has(vid));
  return [
    ...unsaid('map').map((vid) => ({ map: vid })),
    ...unsaid('overlays').map((vid) => ({ overlays: vid })),
    ...unsaid('merged').map((vid) => ({ merged: vid })),
  ];
}

export class MetadataCopies implements ChangeNoter {
  readonly #store: CopiedStore;
  readonly #directory: string;
  readonly #record: ChangeRecord;
  readonly #delayMs: number;
  readonly #everyMs: number;
  readonly #share: number;
  /** The newest copy that is whole, as far as is known. */
  #newest: CopyHeader | undefined;
  #lastNumber = 0;
  /** What the record has said since the newest copy, or since the one that is being made began; it need not say that again. */
  #said: Touched = { map: new Set(), overlays: new Set(), merged: new Set() };
  /** Commits that are not stored yet: a copy that begins now may not have them. */
  readonly #committing = new Set<Touched>();
  /** The newest copy, or the one that is being made, has changes up to this number. */
  #copiedTo = 0;
  /** Vids whose overlays have given blocks to the objects below in this session. */
  readonly #merging = new Set<number>();
  /** Vids of records that were recorded and could not be stored: a snapshot that failed is stored later, with another map. */
  readonly #corrected = new Set<number>();
  /** First numbers of changes that are not stored yet. */
  readonly #unstored = new Set<number>();
  /** Vids without a record that were given for new objects in this session -> the vid of their working VDI. */
  readonly #creationVids = new Map<number, number>();
  #timer: NodeJS.Timeout | undefined;
  #copying: Promise<void> | undefined;
  /** No copy in the background: the store is being closed. */
  #isClosing = false;
  #mustGiveWay = false;
  #failures = 0;
  #lastTookMs = 0;
  #lastEnd = -Infinity;
  #hasWarned = false;

  constructor(store: CopiedStore, { delayMs = DELAY_MS, everyMs = EVERY_MS, share = SHARE_OF_TIME }: CopyTimes = {}) {
    this.#store = store;
    this.#directory = path.join(store.location, COPIES);
    this.#delayMs = delayMs;
    this.#everyMs = everyMs;
    this.#share = share;
    this.#record = new ChangeRecord(
      store.disk,
      this.#directory,
      () => ({ store: store.metadata.identity ?? '', session: store.metadata.session ?? '' }),
      (error) => this.#warn('changes of the catalog are not recorded until the next copy of the metadata', error),
    );
  }

  /** Before the store is used and changed. `wasRecorded`: the last session kept the change record. */
  begin(wasRecorded: boolean): void {
    try {
      this.#look();
    } catch (error) {
      this.#warn('the copies of the metadata cannot be read', error);
      return;
    }
    if (this.#newest !== undefined && !wasRecorded)
      void this.#record.append([{ gap: 'another version of sheepgate had the store open' }]);
  }

  /** To be called when the store is in use: its first copy, if it has none, is made soon. */
  started(): void {
    if (this.#isNeeded()) this.#schedule();
  }

  #look(): void {
    const { disk, location } = this.#store;
    const { header, number } = newestCopy(disk, location);
    this.#lastNumber = number;
    this.#newest = header;
    this.#record.mustBeAbove(this.#newest?.change ?? 0);
  }

  note(change: MetadataChange): Noted | undefined {
    const { metadata } = this.#store;
    const puts = change.records ?? [];
    const added = new Set(puts.map(({ vid }) => vid));
    const removed = (change.removed ?? []).filter((vid) => !added.has(vid) && metadata.record(vid) !== undefined);
    const touched = this.#touchedBy(change);
    // Stored under this vid at last, with what it has become since.
    for (const vid of added) if (this.#corrected.delete(vid)) touched.map.add(vid);
    // A commit of the same moment may say it, and its line may not be durable yet: that is rare, and it is said again.
    const news = linesOf(touched, this.#said);
    // A new record begins with the map of its parent, as that is with this commit: what is said of known vids comes first.
    const isOfKnown = (line: RecordedChange): boolean =>
      metadata.record(Object.values(line)[0] as number) !== undefined;
    const changes: RecordedChange[] = [
      ...news.filter(isOfKnown),
      ...puts.map((record) => ({ put: record })),
      ...news.filter((line) => !isOfKnown(line)),
      ...(removed.length > 0 ? [{ removed }] : []),
    ];
    if (changes.length === 0 && SAID.every((kind) => touched[kind].size === 0)) return undefined;
    this.#committing.add(touched);
    // Without lines of its own it depends on those that are on their way: under which vid new objects are made, for one.
    const { last, durable } =
      changes.length > 0 ? this.#record.append(changes) : { last: 0, durable: this.#record.writing };
    const first = last - changes.length + 1;
    if (changes.length > 0) {
      this.#unstored.add(first);
      this.#schedule();
    }
    const isOver = (): void => {
      this.#committing.delete(touched);
      if (changes.length > 0) this.#unstored.delete(first);
    };
    return {
      stored: async () => {
        isOver();
        await durable;
        if (this.#record.isBroken || last <= this.#copiedTo) return;
        for (const kind of SAID) for (const vid of touched[kind]) this.#said[kind].add(vid);
      },
      failed: () => {
        isOver();
        this.#correct([...added, ...removed]);
      },
    };
  }

  #touchedBy({ pages = [], overlays }: MetadataChange): Touched {
    const touched = { map: new Set<number>(), overlays: new Set<number>(), merged: new Set<number>() };
    for (const { vid } of pages) touched.map.add(vid);
    for (const key of overlays?.keys() ?? []) {
      touched.overlays.add(vidOf(key));
      if (this.#merging.has(vidOf(key))) touched.merged.add(vidOf(key));
    }
    return touched;
  }

  /**
   * A copy begins, which has changes up to `change`: from here on the record says again what changes. What is being committed may
   * not be in the copy, and is said now. Returns what it had said before; `durable`: see ChangeRecord.append.
   */
  #sayAgain(change: number): { readonly before: Touched; readonly durable: Promise<void> | undefined } {
    const before = this.#said;
    this.#said = { map: new Set(), overlays: new Set(), merged: new Set() };
    this.#copiedTo = change;
    const lines = [...this.#committing].flatMap((touched) => linesOf(touched, this.#said));
    return { before, durable: lines.length > 0 ? this.#record.append(lines).durable : undefined };
  }

  merges(vid: number): void {
    this.#merging.add(vid);
  }

  /** What was recorded was not stored: the record gets what is. */
  #correct(vids: readonly number[]): void {
    const records = vids.flatMap((vid) => this.#store.metadata.record(vid) ?? []);
    const without = vids.filter((vid) => this.#store.metadata.record(vid) === undefined);
    void this.#record.append([
      ...records.flatMap((record) => [{ put: record }, { map: record.vid }]),
      ...(without.length > 0 ? [{ removed: without }] : []),
    ]);
    for (const vid of without) this.#corrected.add(vid);
  }

  /** New objects of the working VDI `of` get the vid `vid`, which has no record. */
  names(vid: number, of: number): void {
    if (this.#store.readOnlyBecause !== undefined) return;
    this.#creationVids.set(vid, of);
    void this.#record.append([{ names: vid, for: of }]);
    this.#schedule();
  }

  /** Whether something has changed since the newest copy. */
  #isNeeded(): boolean {
    if (this.#store.readOnlyBecause !== undefined) return false;
    if (this.#newest === undefined) return this.#store.metadata.records().length > 0;
    return this.#record.isBroken || this.#record.last > this.#newest.change;
  }

  #schedule(): void {
    if (this.#timer !== undefined || this.#copying !== undefined || this.#isClosing) return;
    const apart = Math.max(this.#everyMs, this.#lastTookMs / this.#share) * 2 ** Math.min(this.#failures, 16);
    const since = performance.now() - this.#lastEnd;
    const wait = Math.max(this.#delayMs, Math.min(apart, MAX_EVERY_MS) - since);
    this.#timer = setTimeout(() => {
      this.#timer = undefined;
      void this.#inBackground();
    }, wait).unref();
  }

  async #inBackground(): Promise<void> {
    if (this.#isClosing) return;
    await this.copy(false);
    if (this.#isNeeded()) this.#schedule();
  }

  /** Make a copy now, if none is being made. `isUrgent`: without a bound on its rate. Resolves when it has ended; never rejects. */
  copy(isUrgent: boolean): Promise<void> {
    this.#copying ??= this.#copy(isUrgent).finally(() => (this.#copying = undefined));
    return this.#copying;
  }

  async #copy(isUrgent: boolean): Promise<void> {
    const startedAt = performance.now();
    this.#mustGiveWay = false;
    try {
      this.#newest = await this.#writeCopy(isUrgent);
      this.#failures = 0;
      this.#hasWarned = false;
      this.#lastTookMs = performance.now() - startedAt;
      this.#prune();
    } catch (error) {
      this.#failures++;
      this.#removeNew();
      if (!(error instanceof GivesWay && this.#isClosing)) this.#warn('the metadata could not be copied', error);
    } finally {
      this.#lastEnd = performance.now();
    }
  }

  /** Returns the header of the new, verified copy. Errors: GivesWay, and those of the disk. */
  async #writeCopy(isUrgent: boolean): Promise<CopyHeader> {
    const { disk, metadata, location } = this.#store;
    if (makeDirectory(disk, this.#directory, 0o700)) syncDirectory(disk, location);
    const file = path.join(this.#directory, NEW_COPY);
    removeIfThereSync(disk, file);
    await this.#record.startAnew();
    // Before the state is read: what is stored by now is in it.
    const change = Math.min(this.#record.last, ...Array.from(this.#unstored, (first) => first - 1));
    const { before, durable } = this.#sayAgain(change);
    let isMade = false;
    const snapshot = metadata.snapshot();
    try {
      this.#mustHaveRoom(file, snapshot.state.pages * snapshot.state.pageSize);
      const header: CopyHeader = {
        store: metadata.identity ?? '',
        session: metadata.session ?? '',
        transaction: snapshot.state.transaction,
        takenAt: Date.now(),
        change,
      };
      const fd = await disk.open(file, O_RDWR | O_CREAT | O_EXCL, 0o600);
      try {
        const writer = new CopyWriter(disk, fd);
        await writer.begin(header);
        await this.#writeEntries(writer, snapshot, isUrgent);
        snapshot.release();
        await writer.end();
        await disk.fdatasync(fd);
        // What is verified is what is on the disk.
        await disk.dropCached(fd);
        const problem = await copyProblem(disk, fd);
        if (problem !== undefined) throw new Error(`the copy that was written is damaged: ${problem}`);
      } finally {
        await disk.close(fd);
      }
      // With the copy, and without these lines, too little would count as changed.
      await durable;
      await disk.rename(file, path.join(this.#directory, `copy-${this.#lastNumber + 1}`));
      this.#lastNumber++;
      isMade = true;
      syncDirectory(disk, this.#directory);
      return header;
    } finally {
      snapshot.release();
      // The older copy counts, and what was said since that one.
      if (!isMade) for (const kind of SAID) for (const vid of before[kind]) this.#said[kind].add(vid);
    }
  }

  async #writeEntries(
    writer: CopyWriter,
    snapshot: ReturnType<Metadata['snapshot']>,
    isUrgent: boolean,
  ): Promise<void> {
    const damaged = (problem: string): never => {
      if (snapshot.isOver) throw new Error('LMDB was opened again meanwhile');
      throw new StoreError('DAMAGED', `meta.mdb is damaged: ${problem}; ${rescueOf(this.#store.location)}`);
    };
    for (const { name, entries } of databasesOf(snapshot.pages, snapshot.state, damaged)) {
      writer.use(name);
      for await (const { key, value } of entries()) {
        if (snapshot.isOver) throw new Error('LMDB was opened again meanwhile');
        if (!(await writer.add(name, key, value))) continue;
        if (this.#mustGiveWay) throw new GivesWay('the disk is full');
        // The store is being closed: that copy would be older than the last flush.
        if (this.#isClosing && !isUrgent) throw new GivesWay('the store is being closed');
        if (!isUrgent) await timers.setTimeout((1000 * BLOCK_BYTES) / BYTES_PER_SECOND);
      }
    }
    writer.use(CREATION_VIDS);
    for (const [vid, of] of [...this.#creationVids].slice(-MAX_CREATION_VIDS))
      await writer.add(CREATION_VIDS, Buffer.from(String(vid)), Buffer.from(String(of)));
    // Of a vid without overlays, no merge has left anything.
    for (const vid of [...this.#merging]) if (!this.#store.overlays.uses(vid)) this.#merging.delete(vid);
    for (const vid of this.#merging) await writer.add(MERGED_VIDS, Buffer.from(String(vid)), Buffer.alloc(0));
  }

  /** Errors: GivesWay. */
  #mustHaveRoom(file: string, bytes: number): void {
    const { disk } = this.#store;
    const fd = disk.openSync(file, O_RDWR | O_CREAT | O_EXCL, 0o600);
    let reserved;
    try {
      reserved = disk.reserveSync(fd, 0, Math.min(bytes, FREE_BYTES) + FREE_BYTES);
    } finally {
      disk.closeSync(fd);
      disk.unlinkSync(file);
    }
    if (reserved === 'no space') throw new GivesWay('the disk is nearly full');
  }

  /** Remove copies that newer ones replace, and the changes that these have. Best effort: the next copy tries again. */
  #prune(): void {
    const { disk } = this.#store;
    try {
      const names = disk.readdirSync(this.#directory);
      const copies = copyFiles(names);
      for (const { name } of copies.slice(GENERATIONS)) disk.unlinkSync(path.join(this.#directory, name));
      const oldest = copies.slice(0, GENERATIONS).at(-1);
      const from = oldest && readableHeader(disk, path.join(this.#directory, oldest.name))?.change;
      if (from !== undefined) this.#removeChangesUpTo(from, names);
    } catch (error) {
      this.#warn('old copies of the metadata could not be removed', error);
    }
  }

  #removeChangesUpTo(number: number, names: readonly string[]): void {
    const files = changesFiles(names);
    for (const [n, { name }] of files.entries()) {
      const next = files[n + 1]?.first ?? this.#record.last + 1;
      if (next <= number + 1 && n + 1 < files.length) this.#store.disk.unlinkSync(path.join(this.#directory, name));
    }
  }

  /** The disk is full: the older copies go, and a copy that is being written ends. */
  makeRoom(): void {
    const { disk } = this.#store;
    this.#mustGiveWay = true;
    try {
      if (!disk.existsSync(this.#directory)) return;
      for (const { name } of copyFiles(disk.readdirSync(this.#directory)).slice(1))
        disk.unlinkSync(path.join(this.#directory, name));
    } catch (error) {
      this.#warn('old copies of the metadata could not be removed', error);
    }
  }

  #removeNew(): void {
    try {
      removeIfThereSync(this.#store.disk, path.join(this.#directory, NEW_COPY));
    } catch {
      // The next copy removes it.
    }
  }

  /** Once, until a copy succeeds. */
  #warn(line: string, error: unknown): void {
    if (this.#hasWarned) return;
    this.#hasWarned = true;
    this.#store.log(
      `${line}: ${(error as Error).message}; the store works, but is not protected against the loss of meta.mdb`,
      {
        err: error,
      },
    );
  }

  /** What is wrong with the copies, one line each; for `check`. Makes a copy first, if one is needed. */
  async problems(): Promise<string[]> {
    const { disk, metadata } = this.#store;
    if (this.#isNeeded()) await this.copy(true);
    const problems: string[] = [];
    const names = disk.existsSync(this.#directory) ? disk.readdirSync(this.#directory) : [];
    let whole = 0;
    for (const { name } of copyFiles(names)) {
      const file = path.join(this.#directory, name);
      const problem = await this.#problemOf(file);
      if (problem === undefined) whole++;
      else problems.push(`damaged: ${file}, a copy of the metadata: ${problem}; newer copies replace it`);
    }
    if (whole === 0 && metadata.records().length > 0)
      problems.push(
        `there is no whole copy of the metadata in ${this.#directory}: if meta.mdb is lost, so are the disks`,
      );
    return problems;
  }

  async #problemOf(file: string): Promise<string | undefined> {
    const { disk } = this.#store;
    try {
      const fd = openPlainFile(disk, file);
      try {
        return await copyProblem(disk, fd);
      } finally {
        await disk.close(fd);
      }
    } catch (error) {
      return (error as Error).message;
    }
  }

  /** The last copy, if something has changed and all is stored (`isClean`). To be called before meta.mdb is closed. */
  async close({ isClean }: { readonly isClean: boolean }): Promise<void> {
    this.#isClosing = true;
    clearTimeout(this.#timer);
    await this.#copying;
    if (isClean && this.#isNeeded() && this.#isDue()) {
      this.#creationVids.clear(); // all VDIs are closed: their maps have everything
      await this.copy(true);
    }
    await this.#record.close();
  }

  /** Whether a copy at the close of the store is quick, or copies have taken little time lately: short commands must stay short. */
  #isDue(): boolean {
    const estimateMs = (1000 * this.#store.metadata.bytes) / URGENT_BYTES_PER_SECOND;
    const takenAt = this.#newest?.takenAt ?? 0;
    const now = Date.now();
    // Another process may have made the last copy, so this goes by the clock, which may be set back.
    return estimateMs <= QUICK_MS || now < takenAt || now >= takenAt + estimateMs / this.#share;
  }

  /** The store is being removed. To be called after `close`, while the lock is held. Errors: those of the disk. */
  remove(): void {
    const { disk } = this.#store;
    if (!disk.existsSync(this.#directory)) return;
    for (const name of disk.readdirSync(this.#directory)) disk.unlinkSync(path.join(this.#directory, name));
    disk.rmdirSync(this.#directory);
  }
}
