/**
 * The map logs of a store: the folder recent/, with the files that its open VDIs write (map-log.ts) and those that an earlier
 * process has left. Owns the names in recent/ and in set-aside/.
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

/** Make the folder for the logs of the store `directory`. */
export function makeLogFolder(disk: HostDisk, directory: string): void {
  makeDirectory(disk, path.join(directory, RECENT), 0o700);
}

/** Logs that were set aside in the store `directory`. */
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
