/**
 * Reads in flight, by object, while there are temporary snapshots: a reader of a snapshot may be reading an object of the working
 * VDI that both share, and must have it before the writer changes it. Costs nothing without temporary snapshots.
 */
export class ReadTracker {
  /** Temporary snapshots that need tracking; at 0 callers do not track. */
  users = 0;
  readonly #reads = new Map<number, Set<Promise<void>>>();

  track(key: number, read: Promise<void>): Promise<void> {
    let reads = this.#reads.get(key);
    if (!reads) this.#reads.set(key, (reads = new Set()));
    reads.add(read);
    const done = (): void => {
      reads.delete(read);
      if (reads.size === 0 && this.#reads.get(key) === reads) this.#reads.delete(key);
    };
    read.then(done, done);
    return read;
  }

  /** Resolves when the reads of the object that are in flight now have ended. */
  async whenDone(key: number): Promise<void> {
    const reads = this.#reads.get(key);
    if (reads) await Promise.allSettled([...reads]);
  }
}
