/**
 * Makes objects of one open VDI durable: their data and their names. Owns the failure of a sync, which is final: after it the
 * kernel may have dropped dirty pages, and no later sync proves that they are durable.
 */
import type { DataObjects } from './data-objects.js';
import type { ReferenceCounts } from './reference-counts.js';

/** Files synced at a time by one flush: enough to fill the disk's queue, few enough to leave the thread pool room. */
const PARALLEL_SYNCS = 8;

export interface SyncHost {
  readonly objects: DataObjects;
  readonly references: ReferenceCounts;
  /** The folders of these objects could not be synced: new names in them are not durable, and never will be. */
  namesLost(keys: Iterable<number>, error: unknown): void;
}

export class ObjectSyncs {
  readonly #host: SyncHost;
  /** Whose work it is, for its share of threads. */
  readonly #who: object;
  #failure: Error | undefined;

  constructor(host: SyncHost, who: object) {
    this.#host = host;
    this.#who = who;
  }

  get hasFailed(): boolean {
    return this.#failure !== undefined;
  }

  /** From here on nothing of this VDI can become durable. The first error stays. */
  fail(error: unknown): void {
    this.#failure ??= error as Error;
  }

  /** Errors: the failure of an earlier sync. */
  assertIntact(): void {
    if (this.#failure !== undefined) throw this.#failure;
  }

  /** Make the data of these files durable (DataObjects.fileOf). */
  async sync(files: Iterable<number>): Promise<void> {
    const left = files[Symbol.iterator]();
    const worker = async (): Promise<void> => {
      for (let next = left.next(); !next.done; next = left.next()) {
        const file = next.value;
        // Trimmed meanwhile: nothing refers to the object, and its file may be gone.
        if (this.#host.objects.isUnneeded(file)) continue;
        try {
          await this.#host.objects.sync(file, this.#who);
        } catch (error) {
          if (causeOf(error)?.syscall === 'fdatasync') this.#failure = error as Error;
          throw error;
        }
      }
    };
    await Promise.all(Array.from({ length: PARALLEL_SYNCS }, worker));
  }

  /** Make the names of new objects durable. */
  async syncNames(created: Iterable<number>): Promise<void> {
    try {
      await this.#host.objects.syncNames(created);
    } catch (error) {
      // The kernel reports such a failure to one fsync only, and not to later ones of the same folder.
      if (causeOf(error)?.syscall === 'fsync') this.#host.namesLost(created, error);
      throw error;
    }
    // Another VDI's sync of the same folder may have failed meanwhile.
    this.assertIntact();
  }
}

/** The system call that failed. */
function causeOf(error: unknown): NodeJS.ErrnoException | undefined {
  return (error as Error).cause as NodeJS.ErrnoException | undefined;
}
