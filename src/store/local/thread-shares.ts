/**
 * The threads of the pool, in shares: what waits for a slow disk (changes, syncs, look-ups) never has all of them, so that
 * reads always find some; and within a share one disk leaves room for another. libuv's pool is one for the process, and
 * so are these. What is not managed here is quick as a rule, or rare: opening files, LMDB's commits, name resolution.
 */

/** libuv's, where UV_THREADPOOL_SIZE does not say (bin/start.cjs does). */
const DEFAULT_THREADS = 4;

export class ThreadShare {
  readonly #most: number;
  /** Of one disk, at a time. */
  readonly #mostOfOne: number;
  #busy = 0;
  readonly #disks = new Map<unknown, Disk>();
  /** Those of `#disks` for which something waits; the one whose turn comes next is the first. */
  readonly #waiting = new Set<Disk>();

  constructor(most: number) {
    this.#most = Math.max(1, Math.floor(most));
    this.#mostOfOne = Math.max(1, Math.ceil((this.#most * 3) / 4));
  }

  /** Threads that are taken. */
  get busy(): number {
    return this.#busy;
  }

  /** Undefined if there is a thread; then, or when it resolves, `leave` is owed. `key`: whose work it is. */
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
    if (disk === undefined) throw new Error('invariant: a thread is given back that nobody had');
    this.#busy--;
    disk.busy--;
    for (const next of this.#waiting) {
      if (this.#busy >= this.#most) break;
      if (next.busy >= this.#mostOfOne) continue;
      this.#busy++;
      next.busy++;
      // Behind the others, if more of it waits.
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

/** Reads of data. Of six threads or more the others together leave a sixth to them, and they leave a third to the others. */
export const READS = new ThreadShare((threads * 2) / 3);
/** Whatever changes files: writes, zeroing, making, copying, removing. */
export const CHANGES = new ThreadShare(threads / 3);
export const SYNCS = new ThreadShare(threads / 3);
/** Where data is, and reading ahead. */
export const LOOKUPS = new ThreadShare(threads / 6);
