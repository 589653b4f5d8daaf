/**
 * What the maps in memory have over the maps in meta.mdb, written down as it happens, so that a killed daemon loses no
 * write that it has answered: a client that connects again does not repeat those. Owns the files in recent/ (FORMAT.md).
 * They are never synced: they are for the death of the process, and are worth nothing after one of the machine, or of
 * the disk. What they say is only believed where it is certain that all they speak of is still there: see LogReader.
 */
import { randomUUID } from 'node:crypto';
import path from 'node:path';
import zlib from 'node:zlib';
import { O_CREAT, O_EXCL, O_RDONLY, O_WRONLY, removeIfThereSync, type HostDisk } from '../../system/disk.js';
import { writeFully } from '../../system/whole-io.js';
import type { Awaitable, VdiRecord } from '../object-store.js';
import { makeDirectory } from '../../system/make-directory.js';
import { CHANGES } from './thread-shares.js';
import { WriteThrottle } from './write-throttle.js';

/** A flush starts a new file when the present one is longer: often enough to keep them small, too seldom to be felt. */
const ROTATE_BYTES = 64 * 1024;
/** Kind, two numbers, the generation in two halves, and the CRC-32 of those; u32 little-endian each. */
const ENTRY_BYTES = 24;
const CHECK_AT = 20;
const HEADER_BYTES = 512;
/** Changes that are remembered while a log cannot be written, until the flush under way is durable. */
const MAX_MISSED = 4096;
const MAGIC = 'sheepgate map log 2\n';
/** [vid, 0]: what follows is of this VDI. First in every file. */
const VDI = 1;
/** [idx, owner]: the map entry of idx is this now. */
const OWNER = 2;
/** [vid, 0]: a snapshot was taken, the VDI goes on under this vid. */
const MOVED = 3;

/** One map entry that was set, of the VDI that is stored as `vid`, to be stored by the flush of that generation. */
export interface LoggedChange {
  readonly vid: number;
  readonly idx: number;
  readonly owner: number;
  readonly generation: number;
}

/** What meta.mdb says of VDIs. */
export interface StoredVdis {
  record(vid: number): VdiRecord | undefined;
  /** The last flush that its stored map has in it; 0 if none. */
  flushedGeneration(vid: number): number;
}

/** What was found in recent/ when a store was opened that had not been closed. */
export interface LoggedState {
  /** Answered, and in no stored map: oldest first. */
  readonly changes: readonly LoggedChange[];
  /** The files that say so. */
  readonly files: readonly string[];
  /** Files that say more than the stored maps and cannot be believed, with the reason. */
  readonly doubtful: readonly { readonly file: string; readonly why: string }[];
}

/** The folder recent/ of one store. */
export class MapLogs {
  readonly #disk: HostDisk;
  readonly #store: string;
  readonly #directory: string;
  readonly #onError: (error: unknown) => void;
  readonly #place: string;
  /** Tells the logs of this opening of the store from those of all others. */
  session: string = randomUUID();
  readonly #throttle: WriteThrottle;
  #next = 1;

  /** `onError` is told when a log cannot be written; nothing fails for that. `throttle`: of the disk that the store is on. */
  constructor(disk: HostDisk, store: string, onError: (error: unknown) => void, throttle = new WriteThrottle()) {
    this.#disk = disk;
    this.#store = store;
    this.#throttle = throttle;
    this.#directory = path.join(store, RECENT);
    this.#place = mapLogDirectory(disk, store);
    this.#onError = onError;
  }

  /** A log for a VDI that is opened, whose next flush is `generation`. It has no file until it has something to say. */
  logOf(vid: number, generation: number): MapLog {
    return new MapLog(this.#disk, vid, generation, this.#throttle, this.#folder, this.#onError);
  }

  /** What the logs of the opening `session`, the last one, have over what is stored. */
  read(session: string | undefined, stored: StoredVdis): LoggedState {
    const reader = new LogReader(this.#disk, this.#place, session, stored);
    for (const name of this.#names()) reader.add(path.join(this.#directory, name));
    return reader.result();
  }

  /**
   * Remove all of them: everything is durable. Those that are set aside are not among them. Returns what failed, if so: what
   * is left is older than the stored maps, and harmless.
   */
  clear(): unknown {
    let failure: unknown;
    for (const name of this.#names()) {
      try {
        this.#disk.unlinkSync(path.join(this.#directory, name));
      } catch (error) {
        failure ??= error;
      }
    }
    this.#goOnAfterAll();
    return failure;
  }

  /**
   * Move these files to the folder set-aside/, never to be read again. Returns where they are now. If one cannot be moved
   * (a full disk) it stays, and `clear` must not be called.
   */
  setAside(files: readonly string[]): { readonly moved: readonly string[]; readonly failure?: unknown } {
    const aside = path.join(this.#store, SET_ASIDE);
    const moved: string[] = [];
    try {
      makeDirectory(this.#disk, aside, 0o700);
      // Those that the others go with are first in the list, and go last: what is left after half of it is in doubt as before.
      for (const file of files.toReversed()) {
        const name = path.join(aside, `${new Date().toISOString()}-${randomUUID().slice(0, 8)}`);
        this.#disk.renameSync(file, name);
        moved.push(name);
      }
    } catch (error) {
      this.#goOnAfterAll();
      return { moved, failure: error };
    }
    return { moved };
  }

  #goOnAfterAll(): void {
    this.#next = Math.max(this.#next, Number(this.#names().at(-1) ?? 0) + 1);
  }

  #names(): string[] {
    // A store that lacks the folder may be on a disk that has no room to make it.
    if (!this.#disk.existsSync(this.#directory)) return [];
    return this.#disk
      .readdirSync(this.#directory)
      .filter((name) => /^\d{1,15}$/.test(name) && this.#disk.lstatSync(path.join(this.#directory, name))?.isFile())
      .sort((a, b) => Number(a) - Number(b));
  }

  readonly #folder: LogFolder = {
    create: (first) => {
      const name = path.join(this.#directory, String(this.#next++));
      const fd = this.#disk.openSync(name, O_WRONLY | O_CREAT | O_EXCL, 0o600);
      try {
        const head = Buffer.concat([logHeader(this.#disk, this.#place, this.session, fd), first]);
        writeWhole(this.#disk, name, fd, head, 0);
        return { name, fd, length: head.length };
      } catch (error) {
        this.#disk.closeSync(fd);
        removeIfThereSync(this.#disk, name);
        throw error;
      }
    },
    createLater: async (first) => {
      const name = path.join(this.#directory, String(this.#next++));
      const fd = await this.#disk.open(name, O_WRONLY | O_CREAT | O_EXCL, 0o600);
      try {
        const head = Buffer.concat([logHeader(this.#disk, this.#place, this.session, fd), first]);
        await writeFully(this.#disk, fd, head, 0);
        return { name, fd, length: head.length };
      } catch (error) {
        this.#disk.closeSync(fd);
        removeIfThereSync(this.#disk, name);
        throw error;
      }
    },
  };
}

/** A file of a log, and how long it is. */
interface LogFile {
  readonly name: string;
  readonly fd: number;
  length: number;
}

/** Where logs get their files: a new one with a header and `first` in it. */
interface LogFolder {
  create(first: Buffer): LogFile;
  createLater(first: Buffer): Promise<LogFile>;
}

function writeWhole(disk: HostDisk, name: string, fd: number, bytes: Buffer, offset: number): void {
  if (disk.writeSync(fd, bytes, offset) !== bytes.length) throw new Error(`${name}: written in part`);
}

const RECENT = 'recent';
const SET_ASIDE = 'set-aside';

/** Make the folder for the logs of the store `directory`. */
export function makeLogFolder(disk: HostDisk, directory: string): void {
  makeDirectory(disk, path.join(directory, RECENT), 0o700);
}

/** Logs that were set aside in the store `directory`. */
export function logsSetAside(disk: HostDisk, directory: string): string[] {
  const aside = path.join(directory, SET_ASIDE);
  return disk.statSync(aside)?.isDirectory() ? disk.readdirSync(aside).map((name) => path.join(aside, name)) : [];
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

/** The first entry of a file. */
function headOf(vid: number, generation: number): Buffer {
  return fillEntry(Buffer.alloc(ENTRY_BYTES), VDI, vid, 0, generation);
}

/**
 * Reads logs, oldest first. An entry counts if it is newer than the map in meta.mdb: of a later flush than the last one
 * that was committed. And it is believed if its file is where it was written: this file, in this directory, on this
 * mounting of the filesystem, on this boot, by the process that had the store open last. A copy of a store, a volume
 * snapshot, a backup that was restored, a disk that was away for a moment: there the log may have arrived, and the
 * object that it speaks of not.
 */
class LogReader {
  readonly #disk: HostDisk;
  readonly #place: string;
  readonly #session: string | undefined;
  readonly #stored: StoredVdis;
  readonly #logs: ReadLog[] = [];

  constructor(disk: HostDisk, place: string, session: string | undefined, stored: StoredVdis) {
    this.#disk = disk;
    this.#place = place;
    this.#session = session;
    this.#stored = stored;
  }

  add(file: string): void {
    const fd = this.#disk.openSync(file, O_RDONLY);
    try {
      const bytes = this.#bytesOf(file, fd);
      if (bytes === undefined || bytes.length < HEADER_BYTES + ENTRY_BYTES) return; // nothing was answered for it yet
      const boot = field(bytes, 'boot') ?? bytes.toString('latin1', 32, 64);
      if (boot !== bootOf(this.#disk)) return; // the objects that it speaks of may be lost
      const session = field(bytes, 'session');
      const log: ReadLog = { file, session, misfit: this.#misfit(bytes, fd), damage: undefined, entries: [] };
      if (isLog(bytes)) log.damage = parse(bytes, log.entries);
      this.#logs.push(log);
    } finally {
      this.#disk.closeSync(fd);
    }
  }

  /** Undefined if the disk does not give it: then anything may stand in it. */
  #bytesOf(file: string, fd: number): Buffer | undefined {
    try {
      const bytes = Buffer.alloc(this.#disk.fstatSync(fd).size);
      let length = 0;
      for (let count = -1; count !== 0 && length < bytes.length; length += count)
        count = this.#disk.readSync(fd, bytes.subarray(length), length);
      return bytes.subarray(0, length);
    } catch (error) {
      const { code, message } = error as NodeJS.ErrnoException;
      if (code !== 'EIO') throw error;
      this.#logs.push({ file, session: this.#session, misfit: undefined, damage: message, entries: [] });
      return undefined;
    }
  }

  result(): LoggedState {
    const openings = new Map<string | undefined, ReadLog[]>();
    for (const log of this.#logs) openings.set(log.session, [...(openings.get(log.session) ?? []), log]);
    const judged = Array.from(openings.values(), (logs) => new LogsOfOpening(logs, this.#stored).judge());
    return {
      changes: judged.flatMap(({ changes }) => changes),
      files: judged.flatMap(({ files }) => files),
      doubtful: judged.flatMap(({ doubtful }) => doubtful),
    };
  }

  /** Why what the file says is not to be believed; undefined if it is. */
  #misfit(bytes: Buffer, fd: number): string | undefined {
    if (!isLog(bytes)) return 'it is no log that this version knows';
    if (bytes.subarray(0, HEADER_BYTES).equals(logHeader(this.#disk, this.#place, this.#session ?? '', fd)))
      return undefined;
    if (field(bytes, 'session') !== this.#session) return 'it is of an earlier opening of the store';
    return 'it was written elsewhere, or before the filesystem was mounted the last time';
  }
}

/**
 * Logs that one process wrote. A VDI may have several, which tell one story: where it has been moved stands in an older
 * one. So they are read together, and if one of them cannot be believed none of that VDI is.
 */
class LogsOfOpening {
  readonly #logs: readonly ReadLog[];
  readonly #stored: StoredVdis;
  /** Logs that speak of a VDI that nobody knows: it may be one of the stored under another vid. */
  readonly #ofUnknown = new Set<ReadLog>();
  /** Vid after a snapshot -> vid before it. */
  readonly #formerly = new Map<number, number>();

  constructor(logs: readonly ReadLog[], stored: StoredVdis) {
    this.#logs = logs;
    this.#stored = stored;
    for (const log of logs)
      for (const { kind, vid, first } of placed(log)) if (kind === MOVED) this.#formerly.set(first, vid);
    for (const log of logs) {
      const unknown = this.#unknownOf(log);
      if (unknown === undefined) continue;
      log.misfit ??= `it speaks of a VDI that is not stored, with vid ${unknown.toString(16)}`;
      this.#ofUnknown.add(log);
    }
  }

  /** The vid of a VDI that is neither stored nor was removed, and of which it tells something; undefined if none. */
  #unknownOf(log: ReadLog): number | undefined {
    for (const { kind, vid, generation } of placed(log)) {
      if (kind !== OWNER) continue;
      const stored = this.#storedVid(vid);
      if (this.#stored.record(stored) === undefined && generation > this.#stored.flushedGeneration(stored)) return vid;
    }
    return undefined;
  }

  judge(): LoggedState {
    const bad = this.#logs.filter(
      (log) => isBad(log) && (!isLogWhole(log) || this.#ofUnknown.has(log) || this.#newer(log).length > 0),
    );
    const names = new Set(bad.flatMap((log) => this.#namesOf(log)));
    const cutOff = bad.filter((log) => !isLogWhole(log));
    const isOfAny = cutOff.some((log) => this.#namesOf(log).every((name) => name === undefined));
    // What was cut off may have told where a VDI was moved to: one that nobody else tells of is that.
    const mayBeTold = (name: string | undefined): boolean =>
      isOfAny || (name === undefined ? cutOff.length > 0 : names.has(name));
    const isDrawnIn = (log: ReadLog): boolean =>
      this.#namesOf(log).some((name) => mayBeTold(name) && (name === undefined || this.#newer(log).length > 0));
    const drawnIn = this.#logs.filter((log) => !isBad(log) && isDrawnIn(log));
    const believed = this.#logs.filter((log) => !isBad(log) && !drawnIn.includes(log));
    return {
      changes: believed.flatMap((log) => this.#newer(log)),
      files: believed.map(({ file }) => file),
      doubtful: [
        ...bad.map(({ file, misfit, damage }) => ({ file, why: misfit ?? damage ?? '' })),
        ...drawnIn.map(({ file }) => ({ file, why: `it goes with ${bad[0]?.file}` })),
      ],
    };
  }

  /** What the log has over the stored maps, under the vids that are stored. */
  #newer(log: ReadLog): LoggedChange[] {
    const changes: LoggedChange[] = [];
    for (const { kind, vid, first, second, generation } of placed(log)) {
      if (kind !== OWNER) continue;
      const stored = this.#storedVid(vid);
      const isWorking = this.#stored.record(stored)?.isSnapshot === false;
      if (!isWorking || generation <= this.#stored.flushedGeneration(stored)) continue;
      changes.push({ vid: stored, idx: first, owner: second, generation });
    }
    return changes;
  }

  /** A snapshot that was not made durable was not taken: what came after it is the VDI's as it was before. */
  #storedVid(vid: number): number {
    let at: number | undefined = vid;
    for (let steps = 0; at !== undefined && steps <= this.#formerly.size; steps++, at = this.#formerly.get(at))
      if (this.#stored.record(at)) return at;
    return vid;
  }

  /** The names of the VDIs of which it speaks; undefined for one that is not stored. */
  #namesOf({ entries }: ReadLog): (string | undefined)[] {
    const names = new Set<string | undefined>();
    for (const { kind, first } of entries) {
      if (kind !== OWNER) names.add(this.#stored.record(this.#storedVid(first))?.name);
    }
    return [...names];
  }
}

/** The entries of a log, each with the vid that the VDI had before it. */
function* placed({ entries }: ReadLog): Generator<Entry & { readonly vid: number }> {
  let vid = 0;
  for (const entry of entries) {
    yield { ...entry, vid };
    if (entry.kind === VDI || entry.kind === MOVED) vid = entry.first;
  }
}

function isBad({ misfit, damage }: ReadLog): boolean {
  return misfit !== undefined || damage !== undefined;
}

interface Entry {
  readonly kind: number;
  readonly first: number;
  readonly second: number;
  readonly generation: number;
}

interface ReadLog {
  readonly file: string;
  /** Of which opening of the store, as it says. */
  readonly session: string | undefined;
  /** Why it is not to be believed. */
  misfit: string | undefined;
  /** Why the rest of it could not be read. */
  damage: string | undefined;
  readonly entries: Entry[];
}

function isLog(bytes: Buffer): boolean {
  return bytes.toString('latin1', 0, MAGIC.length) === MAGIC;
}

/** All that it says is known. */
function isLogWhole({ entries, damage }: ReadLog): boolean {
  return damage === undefined && entries.length > 0;
}

/** Returns what is wrong with the rest, if so. The beginning of an entry at the end is of a write that was not answered. */
function parse(bytes: Buffer, entries: Entry[]): string | undefined {
  for (let at = HEADER_BYTES; at + ENTRY_BYTES <= bytes.length; at += ENTRY_BYTES) {
    const entry = bytes.subarray(at, at + ENTRY_BYTES);
    if (zlib.crc32(entry.subarray(0, CHECK_AT)) !== entry.readUInt32LE(CHECK_AT)) return 'an entry in it is damaged';
    entries.push({
      kind: entry.readUInt32LE(0),
      first: entry.readUInt32LE(4),
      second: entry.readUInt32LE(8),
      generation: entry.readUInt32LE(12) + entry.readUInt32LE(16) * 2 ** 32,
    });
  }
  return undefined;
}

function fillEntry(entry: Buffer, kind: number, first: number, second: number, generation: number): Buffer {
  entry.writeUInt32LE(kind, 0);
  entry.writeUInt32LE(first, 4);
  entry.writeUInt32LE(second, 8);
  entry.writeUInt32LE(generation % 2 ** 32, 12);
  entry.writeUInt32LE(Math.floor(generation / 2 ** 32), 16);
  entry.writeUInt32LE(zlib.crc32(entry.subarray(0, CHECK_AT)), CHECK_AT);
  return entry;
}

/**
 * The header of the log that is open as `fd`: where and by whom it is written. Lines of text, so that people can read
 * what was set aside. Not the directory's name: a store may be moved.
 */
export function logHeader(disk: HostDisk, place: string, session: string, fd: number): Buffer {
  const header = Buffer.alloc(HEADER_BYTES);
  header.write(`${MAGIC}boot ${bootOf(disk)}\nsession ${session}\n${place}file ${disk.inodeOfSync(fd)}\n`);
  return header;
}

/** The directory and its mounting, as it stands in the header. */
export function mapLogDirectory(disk: HostDisk, store: string): string {
  return `mounting ${disk.mountingSync(store)}\ndirectory ${disk.inodeAtSync(store)}\n`;
}

function field(header: Buffer, name: string): string | undefined {
  const text = header.toString('latin1', 0, HEADER_BYTES);
  return new RegExp(`^${name} (.*)$`, 'm').exec(text)?.[1];
}

/** Where nothing tells one boot from another: nobody will take over what is logged. */
const UNKNOWN_BOOT = randomUUID();

function bootOf(disk: HostDisk): string {
  return (disk.bootId() ?? UNKNOWN_BOOT).replaceAll('-', '');
}
