/**
 * Runs the catalog's operations: one at a time on each name, and no change to a store that is read-only. Owns only the rules for
 * which names an operation is about: the name that its spec leads to, and further names that it gives.
 */
import type { ObjectStore } from '../store/object-store.js';
import { CatalogError } from './catalog-error.js';
import { NameQueue } from './name-queue.js';
import { parseSpec } from './names.js';

export class OperationQueue {
  readonly #store: ObjectStore;
  readonly #names: NameQueue;

  constructor(store: ObjectStore, names: NameQueue) {
    this.#store = store;
    this.#names = names;
  }

  /** Nothing can be changed, and working VDIs are read-only as well. */
  get isReadOnly(): boolean {
    return this.#store.readOnlyBecause !== undefined;
  }

  /** Errors: READ_ONLY. */
  mustBeWritable(): void {
    const why = this.#store.readOnlyBecause;
    if (why !== undefined) throw new CatalogError('READ_ONLY', why);
  }

  /** Where temporary snapshots are in memory only, a read-only store has them too. Errors: READ_ONLY. */
  mustTakeTemporaries(): void {
    if (!this.#store.catalog.temporariesStoreNothing) this.mustBeWritable();
  }

  /** Run `work` as the only operation on the name that `spec` is about, and on `more`. Errors: BAD_NAME. */
  async on<T>(spec: string, work: () => Promise<T>, more: readonly string[] = []): Promise<T> {
    const { name, vid } = parseSpec(spec);
    return vid === undefined ? this.#names.run([name, ...more], work) : this.onVid(vid, work, more);
  }

  /** The same for the name of the VDI or snapshot with this id. */
  async onVid<T>(vid: number, work: () => Promise<T>, more: readonly string[] = []): Promise<T> {
    const record = await this.#store.catalog.record(vid);
    return this.#names.run(record === undefined ? more : [record.name, ...more], work);
  }

  /** `on`, for an operation that changes something. Errors: BAD_NAME, READ_ONLY. */
  async change<T>(spec: string, work: () => Promise<T>, more: readonly string[] = []): Promise<T> {
    this.mustBeWritable();
    return this.on(spec, work, more);
  }

  /** The same for plain names, which need not exist. Errors: READ_ONLY. */
  async changeNames<T>(names: readonly string[], work: () => Promise<T>): Promise<T> {
    this.mustBeWritable();
    return this.#names.run(names, work);
  }

  /** `on`, for an operation that takes or drops temporary snapshots. Errors: BAD_NAME, READ_ONLY. */
  async changeTemporaries<T>(spec: string, work: () => Promise<T>): Promise<T> {
    this.mustTakeTemporaries();
    return this.on(spec, work);
  }

  /** Run `work` as the only operation at all. */
  alone<T>(work: () => Promise<T>): Promise<T> {
    return this.#names.runAlone(work);
  }
}
