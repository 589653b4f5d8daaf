/**
 * Opening object files: one descriptor per object in the cache, one open of an object at a time, and no circle of waiters for
 * descriptors. Owns the opens in progress; the cache owns the descriptors. Never hands out a file without its object's length.
 * Reads and writes no data.
 */
import { O_RDONLY, O_RDWR, type HostDisk } from '../../system/disk.js';
import { StoreError } from '../store-error.js';
import type { DescriptorCache, ObjectFile } from './descriptor-cache.js';
import type { AsFailure, ObjectNames } from './object-names.js';
import { idxOf, localObjectKey, vidOf } from './reference-counts.js';
import { READS } from './thread-shares.js';

export class ObjectOpening {
  readonly #disk: HostDisk;
  readonly #names: ObjectNames;
  readonly #cache: DescriptorCache;
  readonly #flags: number;
  readonly #failed: AsFailure;
  readonly #opening = new Map<number, Promise<ObjectFile>>();

  constructor(
    disk: HostDisk,
    names: ObjectNames,
    cache: DescriptorCache,
    options: { readonly isReadOnly: boolean },
    failed: AsFailure,
  ) {
    this.#disk = disk;
    this.#names = names;
    this.#cache = cache;
    this.#flags = options.isReadOnly ? O_RDONLY : O_RDWR;
    this.#failed = failed;
  }

  /** Open an object that is not in the cache. It is busy for the caller, who must `end` it. Errors: DAMAGED, IO. */
  async open(vid: number, idx: number, who: unknown): Promise<ObjectFile> {
    const key = localObjectKey(vid, idx);
    for (let pending = this.#opening.get(key); pending; pending = this.#opening.get(key)) {
      const file = await pending;
      // Between its opening and this line it may have been evicted.
      if (!file.retired) return this.#cache.begin(file);
    }
    const cached = this.#cache.get(vid, idx);
    if (cached) return this.#cache.begin(cached);
    return this.#openWith(key, this.#turnToOpen(who), () => READS.leave(who));
  }

  /** First a descriptor, then a thread of READS: opening a file may read the disk. */
  #turnToOpen(who: unknown): Promise<void> | undefined {
    const taking = this.#cache.take(1, who);
    return taking ? taking.then(() => READS.enter(who)) : READS.enter(who);
  }

  /**
   * Open the object with a descriptor that has been taken for it, or will be when `turn` resolves. `opened` is called after the
   * open. No other open of the object may be in progress.
   */
  #openWith(key: number, turn?: Promise<void>, opened?: () => void): Promise<ObjectFile> {
    const name = this.#names.path(key);
    const opening = (turn ? turn.then(() => this.#disk.open(name, this.#flags)) : this.#disk.open(name, this.#flags))
      .finally(opened)
      .then(
        (fd) => {
          this.#opening.delete(key);
          try {
            this.#names.mustBeWhole(key, fd);
          } catch (error) {
            const giveBack = (): void => this.#cache.giveBack(1);
            this.#disk.close(fd).then(giveBack, giveBack);
            throw error;
          }
          return this.#cache.insert(key, fd);
        },
        (error: unknown) => {
          this.#opening.delete(key);
          this.#cache.giveBack(1);
          if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw this.#failed(error, `opening object ${name}`);
          throw new StoreError(
            'DAMAGED',
            `the map refers to object ${name}, which does not exist; 'sheepgate check' lists what is missing`,
          );
        },
      );
    this.#opening.set(key, opening);
    return opening;
  }

  /**
   * Use an object as the source of a copy, with a descriptor that the caller has taken. It must not wait for another open of
   * the object, which may wait for a descriptor: copies may hold all of them.
   */
  async usingSource(key: number, use: (fd: number) => Promise<void>): Promise<void> {
    const cached = this.#cache.get(vidOf(key), idxOf(key));
    if (cached) this.#cache.giveBack(1);
    else if (this.#opening.has(key)) return this.#usingApart(key, use);
    const file = cached ? this.#cache.begin(cached) : await this.#openWith(key);
    try {
      await use(file.fd);
    } catch (error) {
      throw this.#failed(error, `copying object ${this.#names.path(key)}`);
    } finally {
      this.#cache.end(file);
    }
  }

  /** With a file outside the cache: the open in progress may find that the name is gone. */
  async #usingApart(key: number, use: (fd: number) => Promise<void>): Promise<void> {
    const name = this.#names.path(key);
    try {
      const fd = await this.#disk.open(name, O_RDONLY);
      try {
        await use(fd);
      } finally {
        await this.#disk.close(fd);
      }
    } catch (error) {
      throw this.#failed(error, `copying object ${name}`);
    } finally {
      this.#cache.giveBack(1);
    }
  }

  /** Resolves when no open of the object is in progress, whatever came of it. */
  async settled(key: number): Promise<void> {
    await this.#opening.get(key)?.catch(() => undefined);
  }

  idle(key: number): Promise<void> | undefined {
    const opening = this.#opening.get(key);
    if (opening)
      return opening.then(
        () => this.idle(key),
        () => undefined,
      );
    const file = this.#cache.get(vidOf(key), idxOf(key));
    if (!file || file.busy === 0) return undefined;
    return new Promise((resolve) => (file.waiters ??= []).push(resolve));
  }

  /** Resolves when no open is in progress. */
  async allSettled(): Promise<void> {
    await Promise.allSettled(this.#opening.values());
  }
}
