/**
 * Reads the map logs of a store that was not closed, and decides which of their changes can be applied to the stored maps and
 * which logs are doubtful (FORMAT.md, recent/). Changes nothing: store-recovery.ts applies logs, sets them aside or removes them.
 */
import { O_RDONLY, type HostDisk } from '../../system/disk.js';
import type { VdiRecord } from '../vdi-record.js';
import {
  bootOf,
  ENTRY_BYTES,
  field,
  HEADER_BYTES,
  isLog,
  logHeader,
  MOVED,
  parse,
  VDI,
  type Entry,
} from './map-log-format.js';

/** One change at idx of the VDI that is stored as `vid`. The flush `generation` was to store it. */
export interface LoggedChange {
  readonly vid: number;
  readonly idx: number;
  /** OWNER, OVERLAID, BASED, HAS_BLOCKS, LACKS_BLOCKS or MADE_WHOLE (map-log-format.ts), with its second number. */
  readonly kind: number;
  readonly value: number;
  readonly generation: number;
}

/** VDIs as meta.mdb has them. */
export interface StoredVdis {
  record(vid: number): VdiRecord | undefined;
  /** The last flush that the stored map contains; 0 if none. */
  flushedGeneration(vid: number): number;
}

/** The content of recent/, judged. */
export interface LoggedState {
  /** Answered, and not in a stored map: oldest first. */
  readonly changes: readonly LoggedChange[];
  /** The files with these changes. */
  readonly files: readonly string[];
  /** Files with changes that the stored maps lack, and that cannot be applied; with the reason. */
  readonly doubtful: readonly { readonly file: string; readonly why: string }[];
}

/**
 * Reads logs, oldest first. An entry counts if it is newer than the map in meta.mdb: of a later flush than the last committed
 * one. It can be applied if its file is where it was written: this file, in this directory, on this mounting of the
 * filesystem, on this boot, in the last session. With a copy of a store, a volume snapshot, a restored backup or a disk that
 * was away for a moment, the log may be there and the object that it names may not.
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
      if (bytes === undefined || bytes.length < HEADER_BYTES + ENTRY_BYTES) return; // no write was answered for it yet
      const boot = field(bytes, 'boot') ?? bytes.toString('latin1', 32, 64);
      if (boot !== bootOf(this.#disk)) return; // another boot: the objects that it names may be lost
      const session = field(bytes, 'session');
      const log: ReadLog = { file, session, misfit: this.#misfit(bytes, fd), damage: undefined, entries: [] };
      if (isLog(bytes)) log.damage = parse(bytes, log.entries);
      this.#logs.push(log);
    } finally {
      this.#disk.closeSync(fd);
    }
  }

  /** Undefined if the disk cannot read it: the log is then damaged, with unknown content. Errors: those of the disk but EIO. */
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

  /** Why the file cannot be applied, by its header; undefined if it can. */
  #misfit(bytes: Buffer, fd: number): string | undefined {
    if (!isLog(bytes)) return 'it is not a log that this version knows';
    if (bytes.subarray(0, HEADER_BYTES).equals(logHeader(this.#disk, this.#place, this.#session ?? '', fd)))
      return undefined;
    if (field(bytes, 'session') !== this.#session) return 'it is of an earlier session of the store';
    return 'it was written elsewhere, or before the last mount of the filesystem';
  }
}

/**
 * Logs of one session. A VDI may have several, which depend on each other: an older log may contain the VDI's move to another
 * vid. So they are judged together: if one of them cannot be applied, none of that VDI is.
 */
class LogsOfOpening {
  readonly #logs: readonly ReadLog[];
  readonly #stored: StoredVdis;
  /** Logs of an unknown VDI: it may be a stored VDI under another vid. */
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
      log.misfit ??= `it names a VDI that is not stored, with vid ${unknown.toString(16)}`;
      this.#ofUnknown.add(log);
    }
  }

  /** The vid of a VDI that the log changes and that is neither stored nor removed; undefined if there is none. */
  #unknownOf(log: ReadLog): number | undefined {
    for (const { kind, vid, generation } of placed(log)) {
      if (!isChange(kind)) continue;
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
    // The lost part of a log may contain a VDI's move: an unknown VDI may be the one that moved.
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
        ...drawnIn.map(({ file }) => ({ file, why: `it depends on ${bad[0]?.file}` })),
      ],
    };
  }

  /** The log's changes that the stored maps lack, under the stored vids. */
  #newer(log: ReadLog): LoggedChange[] {
    const changes: LoggedChange[] = [];
    for (const { kind, vid, first, second, generation } of placed(log)) {
      if (!isChange(kind)) continue;
      const stored = this.#storedVid(vid);
      const isWorking = this.#stored.record(stored)?.isSnapshot === false;
      if (!isWorking || generation <= this.#stored.flushedGeneration(stored)) continue;
      changes.push({ vid: stored, idx: first, kind, value: second, generation });
    }
    return changes;
  }

  /** The vid in meta.mdb. A snapshot that is not durable was not taken: later changes belong to the VDI's vid before it. */
  #storedVid(vid: number): number {
    let at: number | undefined = vid;
    for (let steps = 0; at !== undefined && steps <= this.#formerly.size; steps++, at = this.#formerly.get(at))
      if (this.#stored.record(at)) return at;
    return vid;
  }

  /** The names of the VDIs in the log; undefined for a VDI that is not stored. */
  #namesOf({ entries }: ReadLog): (string | undefined)[] {
    const names = new Set<string | undefined>();
    for (const { kind, first } of entries) {
      if (!isChange(kind)) names.add(this.#stored.record(this.#storedVid(first))?.name);
    }
    return [...names];
  }
}

/** The entries of a log, each with the VDI's vid before it. */
function* placed({ entries }: ReadLog): Generator<Entry & { readonly vid: number }> {
  let vid = 0;
  for (const entry of entries) {
    yield { ...entry, vid };
    if (entry.kind === VDI || entry.kind === MOVED) vid = entry.first;
  }
}

/** Whether an entry of this kind changes an object; the others say which VDI the next ones belong to. */
function isChange(kind: number): boolean {
  return kind !== VDI && kind !== MOVED;
}

function isBad({ misfit, damage }: ReadLog): boolean {
  return misfit !== undefined || damage !== undefined;
}

interface ReadLog {
  readonly file: string;
  /** The session of the store, by the header. */
  readonly session: string | undefined;
  /** Why the log cannot be applied, by its header or its VDI. */
  misfit: string | undefined;
  /** Why the rest of the log could not be read. */
  damage: string | undefined;
  readonly entries: Entry[];
}

/** Whether the whole content of the log is known. */
function isLogWhole({ entries, damage }: ReadLog): boolean {
  return damage === undefined && entries.length > 0;
}
