/**
 * Open descriptors of object files, never more than so many at a time: those that are being opened, in use and being closed
 * are counted, and whoever would open one too many waits. Owns them from `insert` until they are closed: a file that somebody
 * is using (`busy`) stays open, also when it has left the cache; a file that has left it is `retired` and must not be used for
 * anything new. Knows nothing of names and directories.
 */
import type { HostDisk } from '../../system/disk.js';
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

/** Of the descriptors one in so many is left free, so that who opens a file need not wait for another to be closed. */
const SPARE_DIVISOR = 8;
const MAX_SPARE = 64;

export class DescriptorCache {
  readonly #disk: HostDisk;
  /** What is never exceeded. */
  readonly #limit: number;
  /** With more files than this those that were not used lately are closed. */
  readonly #comfort: number;
  /** Descriptors that are open, will be in a moment, or are being closed. */
  #held = 0;
  /** Of those, being closed. */
  #closing = 0;
  /** While somebody waits: no file is left that nobody uses. */
  #areAllBusy = false;
  /** Who waits for descriptors, by whose work it is. Those whose turn comes next are the first. */
  readonly #waiting = new Map<unknown, { readonly count: number; readonly wake: () => void }[]>();
  readonly #files = new Map<number, VidFiles>();
  readonly #clock: ObjectFile[] = [];
  #hand = 0;
  #lastVid = -1;
  #last: (ObjectFile | undefined)[] = [];

  /** `limit`: at least 2, for a copy of one object to another. */
  constructor(disk: HostDisk, limit: number) {
    this.#disk = disk;
    this.#limit = limit;
    this.#comfort = limit - Math.max(1, Math.min(MAX_SPARE, Math.floor(limit / SPARE_DIVISOR)));
  }

  get size(): number {
    return this.#clock.length;
  }

  /** Descriptors that are taken, for `insert` or `giveBack` to account for. */
  get held(): number {
    return this.#held;
  }

  /**
   * Take `count` descriptors, before opening so many files; undefined if they are there, else when it resolves. Each is owed an
   * `insert` or a `giveBack`. Whoever waits here must have no file in use: those who have them may wait for each other. `who`:
   * whose work it is; those who wait take turns, so that hundreds of one disk do not come before one of another.
   */
  take(count: number, who: unknown): Promise<void> | undefined {
    if (this.#waiting.size === 0 && this.#held + count <= this.#limit) {
      this.#held += count;
      return undefined;
    }
    return new Promise((resolve) => {
      const queue = this.#waiting.get(who);
      if (queue) queue.push({ count, wake: resolve });
      else this.#waiting.set(who, [{ count, wake: resolve }]);
      this.#closeForThoseWhoWait();
    });
  }

  /** What was taken and is not needed, or what was closed. */
  giveBack(count: number): void {
    this.#held -= count;
    for (const [who, queue] of this.#waiting) {
      const [next] = queue;
      // Who needs two waits until there are: others do not come before it.
      if (next === undefined || this.#held + next.count > this.#limit) break;
      queue.shift();
      this.#waiting.delete(who);
      // Behind the others, if more of it waits.
      if (queue.length > 0) this.#waiting.set(who, queue);
      this.#held += next.count;
      next.wake();
    }
    if (this.#waiting.size === 0) this.#areAllBusy = false;
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
   * Own `fd`, a descriptor of the object's file, for which one was taken. Returns the cached file, busy once on the caller's
   * behalf; it is another one if the object was there already, and `fd` is closed then.
   */
  insert(key: number, fd: number): ObjectFile {
    const vid = vidOf(key);
    const known = this.get(vid, idxOf(key));
    if (known) {
      this.#close(fd);
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
    if (file.retired) this.#close(file.fd);
    else if (this.#waiting.size > 0) this.retire(file);
    else if (this.#clock.length > this.#comfort) this.#shrink();
  }

  /** Take the file out of the cache; it is closed as soon as nobody uses it. */
  retire(file: ObjectFile): void {
    if (file.retired) return;
    file.retired = true;
    const vid = vidOf(file.key);
    const files = this.#files.get(vid);
    if (files?.byIdx[idxOf(file.key)] !== file) throw new Error('invariant: a cached file that is not in the index');
    files.byIdx[idxOf(file.key)] = undefined;
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
    if (file.busy === 0) this.#close(file.fd);
  }

  #close(fd: number): void {
    this.#closing++;
    const closed = (): void => {
      this.#closing--;
      this.giveBack(1);
    };
    this.#disk.close(fd).then(closed, closed);
  }

  /** Close what is not in use, and the rest as its users end. */
  close(): void {
    for (const file of [...this.#clock]) this.retire(file);
  }

  /** Second chance: the files the hand meets that were not used since it last came by, and are not busy. */
  #shrink(): void {
    this.#closeDownTo(this.#comfort);
  }

  /** So many files as are waited for, of those that nobody uses. Those that are used now are closed when their users end. */
  #closeForThoseWhoWait(): void {
    if (this.#areAllBusy) return;
    let wanted = this.#held - this.#closing - this.#limit;
    for (const queue of this.#waiting.values()) for (const { count } of queue) wanted += count;
    const target = Math.max(0, this.#clock.length - wanted);
    this.#closeDownTo(target);
    this.#areAllBusy = this.#clock.length > target;
  }

  #closeDownTo(count: number): void {
    let steps = 2 * this.#clock.length;
    while (this.#clock.length > count && steps-- > 0) {
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
