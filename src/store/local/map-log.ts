/**
 * What the maps in memory have over the maps in meta.mdb, written down as it happens, so that a killed daemon loses no
 * write that it has answered: a client that connects again does not repeat those. Owns the files in recent/ (FORMAT.md).
 * They are never synced: they are for the death of the process, and are worth nothing after one of the machine.
 */
import { randomUUID } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import type { VdiRecord } from '../object-store.js';
import { makeDirectory } from './make-directory.js';

/** A flush starts a new file when the present one is longer: often enough to keep them small, too seldom to be felt. */
const ROTATE_BYTES = 64 * 1024;
/** Kind, then two numbers, then 0; u32 little-endian each. */
const ENTRY_BYTES = 16;
const HEADER_BYTES = 64;
const MAGIC = 'sheepgate map log 1';
/** [vid, 0]: what follows is of this VDI. First in every file. */
const VDI = 1;
/** [idx, owner]: the map entry of idx is this now. */
const OWNER = 2;
/** [vid, 0]: a snapshot was taken, the VDI goes on under this vid. */
const MOVED = 3;

/** One map entry that was set, of the VDI that had `vid` when it was. */
export interface LoggedChange {
  readonly vid: number;
  readonly idx: number;
  readonly owner: number;
}

/** The folder recent/ of one store. */
export class MapLogs {
  readonly #directory: string;
  readonly #header: Buffer;
  readonly #onError: (error: unknown) => void;
  #next = 1;

  /** `onError` is told when a log cannot be written; nothing fails for that. */
  constructor(store: string, onError: (error: unknown) => void) {
    this.#directory = path.join(store, 'recent');
    makeDirectory(this.#directory, 0o700);
    this.#header = headerOfThisBoot();
    this.#onError = onError;
  }

  /** A log for a VDI that is opened. It has no file until it has something to say. */
  logOf(vid: number): MapLog {
    return new MapLog(vid, (first) => this.#create(first), this.#onError);
  }

  /**
   * What was logged and may not be durable, oldest first, for the VDIs that `record` still knows. A snapshot that was not
   * made durable was not taken: what came after it is the VDI's as it was before.
   */
  read(record: (vid: number) => VdiRecord | undefined): LoggedChange[] {
    const changes: LoggedChange[] = [];
    const formerly = new Map<number, number>();
    for (const name of this.#names()) {
      const bytes = fs.readFileSync(path.join(this.#directory, name));
      if (!bytes.subarray(0, HEADER_BYTES).equals(this.#header)) continue; // of another boot: its objects may be lost
      let vid = 0;
      for (let at = HEADER_BYTES; at + ENTRY_BYTES <= bytes.length; at += ENTRY_BYTES) {
        const kind = bytes.readUInt32LE(at);
        const first = bytes.readUInt32LE(at + 4);
        if (kind === OWNER) changes.push({ vid, idx: first, owner: bytes.readUInt32LE(at + 8) });
        else if (kind === MOVED) formerly.set(first, vid);
        if (kind === VDI || kind === MOVED) vid = first;
      }
    }
    const stored = (vid: number): number => {
      for (let at: number | undefined = vid; at !== undefined; at = formerly.get(at)) if (record(at)) return at;
      return vid;
    };
    return changes
      .map((change) => ({ ...change, vid: stored(change.vid) }))
      .filter(({ vid }) => record(vid)?.isSnapshot === false);
  }

  /** Remove all of them: everything is durable. */
  clear(): void {
    for (const name of this.#names()) fs.unlinkSync(path.join(this.#directory, name));
  }

  #names(): string[] {
    return fs
      .readdirSync(this.#directory)
      .filter((name) => /^\d+$/.test(name))
      .sort((a, b) => Number(a) - Number(b));
  }

  #create(first: Buffer): { name: string; fd: number } {
    const name = path.join(this.#directory, String(this.#next++));
    const fd = fs.openSync(name, 'ax', 0o600);
    try {
      const head = Buffer.concat([this.#header, first]);
      if (fs.writeSync(fd, head) !== head.length) throw new Error(`${name}: written in part`);
      return { name, fd };
    } catch (error) {
      fs.closeSync(fd);
      fs.rmSync(name, { force: true });
      throw error;
    }
  }
}

/** The log of one open VDI: a file, or several while flushes fail. */
export class MapLog {
  #vid: number;
  readonly #create: (first: Buffer) => { name: string; fd: number };
  readonly #onError: (error: unknown) => void;
  readonly #entry = Buffer.alloc(ENTRY_BYTES);
  /** Files that the next successful flush makes superfluous. */
  #old: string[] = [];
  #file: { name: string; fd: number } | undefined;
  #bytes = 0;
  #isBroken = false;

  constructor(vid: number, create: (first: Buffer) => { name: string; fd: number }, onError: (error: unknown) => void) {
    this.#vid = vid;
    this.#create = create;
    this.#onError = onError;
  }

  /** The map entry of idx is `owner` now. In the file when this returns. */
  changed(idx: number, owner: number): void {
    this.#append(OWNER, idx, owner);
  }

  /** A snapshot takes the VDI's vid, and the VDI goes on under `vid`. */
  moved(vid: number): void {
    this.#append(MOVED, vid, 0);
    this.#vid = vid;
  }

  /**
   * A flush takes over what has changed until now. Returns what to call when that is durable; if it fails, nothing. Not
   * while a snapshot is not durable: a file has to tell of the move as long as it may be undone.
   */
  flushing(): () => void {
    this.#isBroken = false;
    if (this.#bytes > ROTATE_BYTES) this.#endFile();
    const { length } = this.#old;
    return () => this.#unlink(length);
  }

  /** Everything is durable, or given up. */
  remove(): void {
    this.#endFile();
    this.#unlink(this.#old.length);
  }

  #append(kind: number, first: number, second: number): void {
    if (this.#isBroken) return;
    const entry = this.#entry;
    entry.writeUInt32LE(kind, 0);
    entry.writeUInt32LE(first, 4);
    entry.writeUInt32LE(second, 8);
    try {
      this.#file ??= this.#create(entryOf(VDI, this.#vid));
      if (fs.writeSync(this.#file.fd, entry) !== ENTRY_BYTES) throw new Error(`${this.#file.name}: written in part`);
      this.#bytes += ENTRY_BYTES;
    } catch (error) {
      // A full disk. The beginning of a log must not be restored: what it points at may be removed by then.
      this.#isBroken = true;
      this.remove();
      this.#onError(error);
    }
  }

  #endFile(): void {
    if (!this.#file) return;
    fs.closeSync(this.#file.fd);
    this.#old.push(this.#file.name);
    this.#file = undefined;
    this.#bytes = 0;
  }

  #unlink(count: number): void {
    for (const name of this.#old.splice(0, count)) {
      try {
        fs.unlinkSync(name);
      } catch (error) {
        this.#onError(error);
      }
    }
  }
}

function entryOf(kind: number, first: number): Buffer {
  const entry = Buffer.alloc(ENTRY_BYTES);
  entry.writeUInt32LE(kind, 0);
  entry.writeUInt32LE(first, 4);
  return entry;
}

/** Magic and boot id: page cache that was not synced is there as long as the kernel that has it. */
function headerOfThisBoot(): Buffer {
  const header = Buffer.alloc(HEADER_BYTES);
  header.write(MAGIC, 0);
  header.write(bootId().trim().replaceAll('-', ''), 32, 'latin1');
  return header;
}

function bootId(): string {
  try {
    return fs.readFileSync('/proc/sys/kernel/random/boot_id', 'latin1');
  } catch {
    return randomUUID(); // no procfs: nobody will take over what is logged
  }
}
