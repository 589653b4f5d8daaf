/** The store in memory (memory-store.ts) for the store suite. Owns its medium. */
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { Medium, MemoryStore } from './memory-store.js';
import type { StoreKind, StoreUnderTest } from './store-under-test.js';

export const memoryStore: StoreKind = {
  label: 'store in memory, whose disks do copy-on-write themselves',
  abilities: {
    objectSize: 2 ** 20,
    canWrite: true,
    canSnapshot: true,
    canSnapshotTemporarily: true,
    canClone: true,
    canResize: true,
    keepsState: true,
    knowsHolesAtOnce: false,
    tellsChanges: true,
    countsCopies: false,
    copiesBlocks: false,
    copiesEndWithSnapshots: true,
  },
  effort: 0.5,
  sequences: { quick: 20, full: 60, long: 5000 },
  start: () => Promise.resolve(new MemoryUnderTest()),
};

class MemoryUnderTest implements StoreUnderTest {
  #medium = new Medium();

  open(): Promise<VdiCatalog> {
    return Promise.resolve(new VdiCatalog(new MemoryStore(this.#medium)));
  }

  /** What the store that is killed still does, it does to the medium that is left behind. */
  crash(): Promise<void> {
    this.#medium = this.#medium.copy();
    return Promise.resolve();
  }

  objects(): Promise<string[]> {
    const disks = [...this.#medium.disks];
    return Promise.resolve(
      disks.flatMap(([vid, { blocks }]) => [`${vid}`, ...[...blocks.keys()].map((n) => `${vid}/${n}`)]),
    );
  }

  stop(): Promise<void> {
    return Promise.resolve();
  }
}
