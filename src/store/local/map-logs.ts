/**
 * The map logs of a store: the folder recent/, with files that open VDIs write (map-log.ts) and files that an earlier process
 * has left. Owns the names in recent/ and in set-aside/. Does not decide which logs are applied.
 */
import { randomUUID } from 'node:crypto';
import path from 'node:path';
import { O_CREAT, O_EXCL, O_WRONLY, removeIfThereSync, type HostDisk } from '../../system/disk.js';
import { makeDirectory } from '../../system/make-directory.js';
import { writeFully } from '../../system/whole-io.js';
import { MapLog, writeWhole, type LogFolder } from './map-log.js';
import { logHeader, mapLogDirectory } from './map-log-format.js';
import { LogReader, type LoggedState, type StoredVdis } from './map-log-reading.js';
import { WriteThrottle } from './write-throttle.js';

const RECENT = 'recent';
const SET_ASIDE = 'set-aside';

/** Create the folder for the logs of the store `directory`. */
export function makeLogFolder(disk: HostDisk, directory: string): void {
  makeDirectory(disk, path.join(directory, RECENT), 0o700);
}

/** Paths of logs that were set aside in the store `directory`. */
export function logsSetAside(disk: HostDisk, directory: string): string[] {
  const aside = path.join(directory, SET_ASIDE);
  return disk.statSync(aside)?.isDirectory() ? disk.readdirSync(aside).map((name) => path.join(aside, name)) : [];
}

/** The folder recent/ of one store. */
export class MapLogs {
  readonly #disk: HostDisk;
  readonly #store: string;
  readonly #directory: string;
  readonly #onError: (error: unknown) => void;
  readonly #place: string;
  /** Names this session of the store: logs of other sessions do not count. */
  session: string = randomUUID();
  readonly #throttle: WriteThrottle;
  #next = 1;

  /** `onError` is called when a log cannot be written; no operation fails because of it. `throttle`: of the store's disk. */
  constructor(disk: HostDisk, store: string, onError: (error: unknown) => void, throttle = new WriteThrottle()) {
    this.#disk = disk;
    this.#store = store;
    this.#throttle = throttle;
    this.#directory = path.join(store, RECENT);
    this.#place = mapLogDirectory(disk, store);
    this.#onError = onError;
  }

  /** The log of a VDI that is being opened; `generation` is its next flush. The log has no file before its first entry. */
  logOf(vid: number, generation: number): MapLog {
    return new MapLog(this.#disk, vid, generation, this.#throttle, this.#folder, this.#onError);
  }

  /** Changes in the logs of the last session, `session`, that the stored maps do not have. Errors: those of the disk. */
  read(session: string | undefined, stored: StoredVdis): LoggedState {
    const reader = new LogReader(this.#disk, this.#place, session, stored);
    for (const name of this.#names()) reader.add(path.join(this.#directory, name));
    return reader.result();
  }

  /**
   * Remove all logs in recent/: everything in them is durable. Returns what failed, if so: the logs that are left are older than
   * the stored maps, and harmless.
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
   * Move these files to the folder set-aside/; no start reads them again. Returns their new names. If a file cannot be moved
   * (full disk), it stays, and `clear` must not be called.
   */
  setAside(files: readonly string[]): { readonly moved: readonly string[]; readonly failure?: unknown } {
    const aside = path.join(this.#store, SET_ASIDE);
    const moved: string[] = [];
    try {
      makeDirectory(this.#disk, aside, 0o700);
      // The first logs of the list make the others doubtful, so they are moved last: after an interruption the rest is still doubtful.
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
    // The folder may be missing because the disk had no room to create it.
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
