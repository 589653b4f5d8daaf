/**
 * What the logs of a store that was not closed have over its stored maps, and which of that is believed (FORMAT.md, recent/).
 * Changes nothing: the logs are applied, set aside or removed by those who open the store (store-recovery.ts).
 */
import { O_RDONLY, type HostDisk } from '../../system/disk.js';
import type { VdiRecord } from '../object-store.js';
import {
  bootOf,
  ENTRY_BYTES,
  field,
  HEADER_BYTES,
  isLog,
  logHeader,
  MOVED,
  OWNER,
  parse,
  VDI,
  type Entry,
} from './map-log-format.js';

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

/**
 * Reads logs, oldest first. An entry counts if it is newer than the map in meta.mdb: of a later flush than the last one
 * that was committed. And it is believed if its file is where it was written: this file, in this directory, on this
 * mounting of the filesystem, on this boot, by the process that had the store open last. A copy of a store, a volume
 * snapshot, a backup that was restored, a disk that was away for a moment: there the log may have arrived, and the
 * object that it speaks of not.
 */
export class LogReader {
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

/** All that it says is known. */
function isLogWhole({ entries, damage }: ReadLog): boolean {
  return damage === undefined && entries.length > 0;
}
