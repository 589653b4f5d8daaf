/**
 * Open descriptors of object files, at most so many at a time. Owns them from `insert` until they are closed: a file
 * that somebody is using (`busy`) stays open, also when it has left the cache; a file that has left it is `retired` and
 * must not be used for anything new. Knows nothing of names and directories.
 */
import fs from 'node:fs';
import { idxOf, vidOf } from './reference-counts.js';

export class ObjectFile {
  /** Asynchronous operations under way; while there are any the descriptor stays open. */
  busy = 0;
  used = true;
  /** Out of the cache: its name is gone, or the descriptor was needed elsewhere. */
  retired = false;
  /** Known to have no holes, so that nobody need look for them. */
  isDense = false;
  waiters: (() => void)[] | undefined;
  /** Its place in the clock. */
  slot = 0;

  constructor(
    readonly key: number,
    readonly fd: number,
  ) {}
}

/** The cached files of one VDI id, by idx. */
interface VidFiles {
  readonly byIdx: (ObjectFile | undefined)[];
  count: number;
}

export class DescriptorCache {
  readonly #limit: number;
  readonly #files = new Map<number, VidFiles>();
  readonly #clock: ObjectFile[] = [];
  #hand = 0;
  #lastVid = -1;
  #last: (ObjectFile | undefined)[] = [];

  constructor(limit: number) {
    this.#limit = limit;
  }

  get size(): number {
    return this.#clock.length;
  }

  get(vid: number, idx: number): ObjectFile | undefined {
    if (vid !== this.#lastVid) {
      const files = this.#files.get(vid);
      if (!files) return undefined;
      this.#last = files.byIdx;
      this.#lastVid = vid;
    }
    const file = this.#last[idx];
    if (file) file.used = true;
    return file;
  }

  /**
   * Take over `fd`, a descriptor of the object's file. Returns the cached file, busy once on the caller's behalf; it is
   * another one if the object was there already, and `fd` is closed then.
   */
  insert(key: number, fd: number): ObjectFile {
    const vid = vidOf(key);
    const known = this.get(vid, idxOf(key));
    if (known) {
      fs.close(fd, () => undefined);
      return this.begin(known);
    }
    const file = this.begin(new ObjectFile(key, fd));
    let files = this.#files.get(vid);
    if (!files) this.#files.set(vid, (files = { byIdx: [], count: 0 }));
    files.byIdx[idxOf(key)] = file;
    files.count++;
    file.slot = this.#clock.push(file) - 1;
    this.#shrink();
    return file;
  }

  begin(file: ObjectFile): ObjectFile {
    file.busy++;
    return file;
  }

  end(file: ObjectFile): void {
    if (--file.busy > 0) return;
    if (file.waiters) {
      const { waiters } = file;
      file.waiters = undefined;
      for (const wake of waiters) wake();
    }
    if (file.busy > 0) return;
    if (file.retired) fs.close(file.fd, () => undefined);
    else if (this.#clock.length > this.#limit) this.#shrink();
  }

  /** Take the file out of the cache; it is closed as soon as nobody uses it. */
  retire(file: ObjectFile): void {
    if (file.retired) return;
    file.retired = true;
    const vid = vidOf(file.key);
    const files = this.#files.get(vid);
    if (files?.byIdx[idxOf(file.key)] !== file) throw new Error('invariant: a cached file that is not in the index');
    delete files.byIdx[idxOf(file.key)];
    if (--files.count === 0) {
      this.#files.delete(vid);
      this.#lastVid = -1;
    }
    const last = this.#clock.pop();
    if (last === undefined) throw new Error('invariant: an empty clock');
    if (last !== file) {
      this.#clock[file.slot] = last;
      last.slot = file.slot;
    }
    if (file.busy === 0) fs.close(file.fd, () => undefined);
  }

  /** Close what is not in use, and the rest as its users end. */
  close(): void {
    for (const file of [...this.#clock]) this.retire(file);
  }

  /** Second chance: the files the hand meets that were not used since it last came by, and are not busy. */
  #shrink(): void {
    let steps = 2 * this.#clock.length;
    while (this.#clock.length > this.#limit && steps-- > 0) {
      if (this.#hand >= this.#clock.length) this.#hand = 0;
      const file = this.#clock[this.#hand] as ObjectFile;
      // The last file of the clock takes the place of one that is retired: the hand looks at it next.
      if (file.busy === 0 && !file.used) this.retire(file);
      else {
        file.used = false;
        this.#hand++;
      }
    }
  }
}
