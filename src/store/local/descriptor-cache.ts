/**
 * Open descriptors of object files, up to a limit. Descriptors that are being opened, in use or being closed count; above the
 * limit, callers wait. Owns each descriptor from `insert` until it is closed. A file in use (`busy`) stays open, even after it
 * has left the cache; a file that has left the cache is `retired` and must not be used for anything new. Knows no names and no
 * directories.
 */
import type { HostDisk } from '../../system/disk.js';
import { idxOf, vidOf } from './reference-counts.js';

export class ObjectFile {
  /** Asynchronous operations in flight; meanwhile the descriptor stays open. */
  busy = 0;
  used = true;
  /** Not in the cache any more: its name was removed, or the descriptor was needed elsewhere. */
  retired = false;
  /** Known to have no holes. */
  isDense = false;
  waiters: (() => void)[] | undefined;
  /** Its index in the clock. */
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

/** One of this many descriptors is kept free, so that an open need not wait for another file to be closed. */
const SPARE_DIVISOR = 8;
const MAX_SPARE = 64;

export class DescriptorCache {
  readonly #disk: HostDisk;
  /** Descriptors at most. */
  readonly #limit: number;
  /** Above this many files, files that were not used lately are closed. */
  readonly #comfort: number;
  /** Descriptors that are being opened, open, or being closed. */
  #held = 0;
  /** Those of them that are being closed. */
  #closing = 0;
  /** While there are waiters: all files are in use. */
  #areAllBusy = false;
  /** Waiters for descriptors, by the owner of the work. The first owner is served next. */
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

  /** Descriptors taken, and not given back. */
  get held(): number {
    return this.#held;
  }

  /**
   * Take `count` descriptors before opening as many files: at once (undefined), or when the promise resolves. Each needs an
   * `insert` or a `giveBack` later. The caller must have no file in use while it waits, or callers could wait for each other in
   * a circle. `who`: the owner of the work. Owners take turns, so that hundreds of waiters of one disk do not delay another.
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

  /** Give back descriptors that were taken and not used, or that are closed. */
  giveBack(count: number): void {
    this.#held -= count;
    for (const [who, queue] of this.#waiting) {
      const [next] = queue;
      // A waiter for two waits until two are free; others do not overtake it.
      if (next === undefined || this.#held + next.count > this.#limit) break;
      queue.shift();
      this.#waiting.delete(who);
      // An owner with more waiters goes to the end of the line.
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
   * Own `fd`, a descriptor of the object's file, for which one was taken. Returns the cached file, busy for the caller, who must
   * `end` it. If the object is in the cache already, that file is returned and `fd` is closed.
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

  /** Remove the file from the cache; it is closed when its last user ends. */
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

  /** Close all files: files in use when their users end. */
  close(): void {
    for (const file of [...this.#clock]) this.retire(file);
  }

  /** Second-chance eviction: close files that are not busy and were not used since the hand last passed them. */
  #shrink(): void {
    this.#closeDownTo(this.#comfort);
  }

  /** Close as many unused files as there are descriptors waited for. Files in use are closed when their users end. */
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
      // Retiring moves the clock's last file to this index: the hand examines it next.
      if (file.busy === 0 && !file.used) this.retire(file);
      else {
        file.used = false;
        this.#hand++;
      }
    }
  }
}
