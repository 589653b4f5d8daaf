/**
 * The life of NAME@now and NAME@now:LABEL: taken when the first connection opens it, shared by all that have it open at
 * the same time, dropped when the last one closes. Owns the counts; what a snapshot is, the catalog knows. One that a
 * killed process leaves behind is dropped when the catalog is opened the next time.
 */
import type { VdiCatalog } from '../vdi/catalog.js';
import type { Vdi } from '../vdi/vdi.js';

export class TemporarySnapshots {
  readonly #catalog: VdiCatalog;
  readonly #users = new Map<string, number>();
  /** By NAME@TAG: opening and closing it, one after the other. */
  readonly #queues = new Map<string, Promise<void>>();

  constructor(catalog: VdiCatalog) {
    this.#catalog = catalog;
  }

  /** Every open needs one `close`. Errors: those of the catalog. */
  open(name: string, tag: string): Promise<Vdi> {
    const spec = `${name}@${tag}`;
    return this.#alone(spec, async () => {
      const users = this.#users.get(spec) ?? 0;
      // One whose dropping failed would be an old state of the disk.
      if (users === 0) await this.#catalog.dropTemporary(name, tag);
      try {
        if (users === 0) await this.#catalog.snapshotTemporary(name, tag);
        const vdi = await this.#catalog.openVdi(spec);
        this.#users.set(spec, users + 1);
        return vdi;
      } catch (error) {
        // It may be there although taking it failed. The first failure is the one to tell.
        if (users === 0) await this.#catalog.dropTemporary(name, tag).catch(() => undefined);
        throw error;
      }
    });
  }

  close(vdi: Vdi, name: string, tag: string): Promise<void> {
    const spec = `${name}@${tag}`;
    return this.#alone(spec, async () => {
      const users = (this.#users.get(spec) ?? 0) - 1;
      if (users > 0) this.#users.set(spec, users);
      else this.#users.delete(spec);
      try {
        await this.#catalog.release(vdi);
      } finally {
        if (users <= 0) await this.#catalog.dropTemporary(name, tag);
      }
    });
  }

  #alone<T>(spec: string, work: () => Promise<T>): Promise<T> {
    const result = (this.#queues.get(spec) ?? Promise.resolve()).then(work);
    const settled: Promise<void> = result.then(
      () => undefined,
      () => undefined,
    );
    this.#queues.set(spec, settled);
    void settled.then(() => {
      if (this.#queues.get(spec) === settled) this.#queues.delete(spec);
    });
    return result;
  }
}
