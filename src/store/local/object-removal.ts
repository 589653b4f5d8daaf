/**
 * Removing object files in the background, a few at a time. Owns the queue and its limit. The caller guarantees that no map
 * refers to a queued object. A new object of the same name takes it out of the queue.
 */
import type { HostDisk } from '../../system/disk.js';
import type { DescriptorCache } from './descriptor-cache.js';
import type { AsFailure, ObjectNames } from './object-names.js';
import type { ObjectOpening } from './object-opening.js';
import { idxOf, vidOf } from './reference-counts.js';
import { CHANGES } from './thread-shares.js';

const PARALLEL_REMOVALS = 4;
/** Callers with more to remove wait: a queue of a million names costs memory, and growing it holds the loop. */
const MAX_QUEUED_REMOVALS = 4096;
/** The owner of removals' threads: they belong to no VDI. */
const REMOVALS = Symbol('removals');

export class ObjectRemoval {
  readonly #disk: HostDisk;
  readonly #names: ObjectNames;
  readonly #cache: DescriptorCache;
  readonly #opening: ObjectOpening;
  readonly #failed: AsFailure;
  readonly #removing = new Map<number, Promise<void>>();
  readonly #toRemove = new Set<number>();
  #removers = 0;
  readonly #whenRemoved: (() => void)[] = [];
  readonly #whenRoom: (() => void)[] = [];

  constructor(disk: HostDisk, names: ObjectNames, cache: DescriptorCache, opening: ObjectOpening, failed: AsFailure) {
    this.#disk = disk;
    this.#names = names;
    this.#cache = cache;
    this.#opening = opening;
    this.#failed = failed;
  }

  /** Reads in flight finish on the open descriptor. */
  remove(key: number, onError: (error: unknown) => void): void {
    this.#toRemove.add(key);
    if (this.#removers >= PARALLEL_REMOVALS) return;
    this.#removers++;
    void this.#removeQueued(onError);
  }

  /** The name is to be used again: take it out of the queue, and wait for its removal if that has begun. */
  takeBack(key: number): Promise<void> | undefined {
    this.#toRemove.delete(key);
    return this.#removing.get(key);
  }

  room(): Promise<void> | undefined {
    if (this.#toRemove.size < MAX_QUEUED_REMOVALS) return undefined;
    return new Promise<void>((resolve) => this.#whenRoom.push(resolve));
  }

  async removed(): Promise<void> {
    while (this.#removers > 0) await new Promise<void>((resolve) => this.#whenRemoved.push(resolve));
  }

  async #removeQueued(onError: (error: unknown) => void): Promise<void> {
    for (const key of this.#toRemove) {
      this.#toRemove.delete(key);
      const removal = this.#unlink(key, onError).finally(() => this.#removing.delete(key));
      this.#removing.set(key, removal);
      await removal;
      if (this.#whenRoom.length > 0 && this.#toRemove.size <= MAX_QUEUED_REMOVALS / 2) wakeAll(this.#whenRoom);
    }
    wakeAll(this.#whenRoom);
    if (--this.#removers > 0) return;
    wakeAll(this.#whenRemoved);
  }

  async #unlink(key: number, onError: (error: unknown) => void): Promise<void> {
    const turn = CHANGES.enter(REMOVALS);
    if (turn) await turn;
    const name = this.#names.path(key);
    try {
      await this.#disk.unlink(name);
      this.#names.noteRemoved(key);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') {
        onError(this.#failed(error, `removing object ${name}`));
      }
    } finally {
      CHANGES.leave(REMOVALS);
    }
    // Only now: an open before the unlink has a file without a name, which must not be taken for a new object of that name.
    await this.#opening.settled(key);
    const file = this.#cache.get(vidOf(key), idxOf(key));
    if (file) this.#cache.retire(file);
  }
}

function wakeAll(waiting: (() => void)[]): void {
  for (const wake of waiting.splice(0)) wake();
}
