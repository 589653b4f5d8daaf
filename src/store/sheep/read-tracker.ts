/**
 * Reads under way, by object, while there are temporary snapshots: a reader of one has been told that an object of the
 * writer's is its own, and must have it before the writer may change it. Costs nothing while nobody asks for it.
 */
export class ReadTracker {
  /** Counted: tracking is on while any snapshot needs it. */
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

  /** Resolves when the reads of the object that are under way now have ended. */
  async whenDone(key: number): Promise<void> {
    const reads = this.#reads.get(key);
    if (reads) await Promise.allSettled([...reads]);
  }
}
