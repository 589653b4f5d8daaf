/**
 * Shares of the thread pool. Work that waits for a slow disk (changes, syncs, look-ups) never takes all threads, so that reads
 * always find some; and within a share one disk leaves room for another. libuv has one pool for the process, and so these
 * shares exist once. Work outside them is quick or rare: closing files, LMDB's commits, name resolution.
 */

/** libuv's default, if UV_THREADPOOL_SIZE is not set (bin/start.cjs sets it). */
const DEFAULT_THREADS = 4;

export class ThreadShare {
  readonly #most: number;
  /** Threads of one disk at most. */
  readonly #mostOfOne: number;
  #busy = 0;
  readonly #disks = new Map<unknown, Disk>();
  /** Those of `#disks` that have waiters; the first one is served next. */
  readonly #waiting = new Set<Disk>();

  constructor(most: number) {
    this.#most = Math.max(1, Math.floor(most));
    this.#mostOfOne = Math.max(1, Math.ceil((this.#most * 3) / 4));
  }

  /** Threads in use. */
  get busy(): number {
    return this.#busy;
  }

  /** Take a thread: at once (undefined), or when the promise resolves. The caller must `leave`. `key`: the owner of the work. */
  enter(key: unknown): Promise<void> | undefined {
    let disk = this.#disks.get(key);
    if (disk === undefined) this.#disks.set(key, (disk = new Disk()));
    if (this.#busy < this.#most && disk.busy < this.#mostOfOne) {
      this.#busy++;
      disk.busy++;
      return undefined;
    }
    const { queue } = disk;
    this.#waiting.add(disk);
    return new Promise((resolve) => queue.push(resolve));
  }

  leave(key: unknown): void {
    const disk = this.#disks.get(key);
    if (disk === undefined) throw new Error('invariant: a thread is given back that was not taken');
    this.#busy--;
    disk.busy--;
    for (const next of this.#waiting) {
      if (this.#busy >= this.#most) break;
      if (next.busy >= this.#mostOfOne) continue;
      this.#busy++;
      next.busy++;
      // A disk with more waiters goes to the end of the line.
      this.#waiting.delete(next);
      const wake = next.queue.shift();
      if (next.queue.length > 0) this.#waiting.add(next);
      wake?.();
      break;
    }
    if (disk.busy === 0 && disk.queue.length === 0) this.#disks.delete(key);
  }
}

class Disk {
  busy = 0;
  readonly queue: (() => void)[] = [];
}

const threads = Number(process.env.UV_THREADPOOL_SIZE) || DEFAULT_THREADS;

/** Reads of data. With six threads or more, the other shares together leave a sixth for reads, and reads leave a third. */
export const READS = new ThreadShare((threads * 2) / 3);
/** Changes of files: writing, zeroing, creating, copying, removing. */
export const CHANGES = new ThreadShare(threads / 3);
export const SYNCS = new ThreadShare(threads / 3);
/** Queries of extents, and read-ahead. */
export const LOOKUPS = new ThreadShare(threads / 6);
