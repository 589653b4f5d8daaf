/**
 * The owners of a store's files. All files must belong to the owner of the directory; else that user's daemon cannot open files
 * that another user, usually root, has created. Reports only: nothing is chowned in a directory that another user controls.
 */
import path from 'node:path';
import type { HostDisk } from '../../system/disk.js';
import { shellWord } from '../../text/shell-word.js';

/** The parts of a store apart from single objects. */
const PARTS = ['lock', 'meta.mdb', 'objects', 'overlays', 'recent'];

export class Owners {
  readonly #disk: HostDisk;
  readonly #location: string;
  /** The owner of the store's directory. */
  readonly #uid: number;
  #wrong = 0;
  #first: string | undefined;

  constructor(disk: HostDisk, location: string) {
    this.#disk = disk;
    this.#location = location;
    this.#uid = disk.statSync(location)?.uid ?? 0;
  }

  note(name: string, uid: number): void {
    if (uid === this.#uid) return;
    this.#wrong++;
    this.#first ??= `${name} belongs to uid ${uid}`;
  }

  /** Check everything except object files. */
  noteParts(): void {
    for (const name of PARTS) this.#noteName(path.join(this.#location, name));
    for (const folder of ['objects', 'recent']) {
      const directory = path.join(this.#location, folder);
      for (const name of namesIn(this.#disk, directory)) this.#noteName(path.join(directory, name));
    }
  }

  #noteName(name: string): void {
    const status = this.#disk.lstatSync(name);
    if (status) this.note(name, status.uid);
  }

  /** One line for all wrong owners, with what to do; undefined if there are none. */
  get problem(): string | undefined {
    if (this.#first === undefined) return undefined;
    const others = this.#wrong === 1 ? '' : `, and ${this.#wrong - 1} more files have a wrong owner`;
    const who = `! -uid ${this.#uid}`;
    // A file with a second name outside the store must not change its owner.
    const what = '\\( -type d -o -links 1 \\)';
    return (
      `wrong owner: ${this.#first}, the store to uid ${this.#uid}${others}: the store's daemon may not open them; with the ` +
      `daemon stopped, as root: find ${shellWord(this.#location)} ${who} ${what} -execdir chown -h ${this.#uid} {} +`
    );
  }
}

function namesIn(disk: HostDisk, directory: string): string[] {
  try {
    return disk.readdirSync(directory);
  } catch {
    return []; // closed to us: its own wrong owner is noted
  }
}
