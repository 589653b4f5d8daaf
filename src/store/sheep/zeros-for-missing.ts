/**
 * Reading a cluster that has lost objects (--missing=zero): a decorator of its reading, in which what is missing reads as zeros.
 * The log names each such range once. A store that is read like this is never written: the invented zeros would become real data.
 */
import { labelOfVdi } from '../vdi-record.js';
import type { StoreError } from '../store-error.js';
import type { ClusterReads, ObjectReading, ReadingStore } from './cluster-reads.js';
import type { SheepStoreOptions } from './sheep-store.js';
import { oidKey } from '../../sheepdog/object-ids.js';

/** Options for SheepStore.open at `location`. */
export function zerosForMissing(location: string): Pick<SheepStoreOptions, 'readOnlyBecause' | 'readingOver'> {
  return {
    readOnlyBecause: `${location} is served with zeros in place of lost objects, and therefore read-only`,
    readingOver: (reads, store) => new ZerosForMissing(reads, store),
  };
}

class ZerosForMissing implements ObjectReading {
  readonly #reads: ClusterReads;
  readonly #store: ReadingStore;
  /** Objects that are read as zeros, by key. */
  readonly #missing = new Set<number>();

  constructor(reads: ClusterReads, store: ReadingStore) {
    this.#reads = reads;
    this.#store = store;
  }

  async readObject(vid: number, idx: number, offset: number, into: Buffer): Promise<void> {
    const key = oidKey(vid, idx);
    const isKnown = this.#missing.has(key);
    try {
      // An object that was missing after all repetitions is read only once from then on.
      await (isKnown ? this.#reads.readOnce(vid, idx, offset, into) : this.#reads.readObject(vid, idx, offset, into));
    } catch (error) {
      if ((error as StoreError).code !== 'GONE') throw error;
      into.fill(0);
      if (isKnown || this.#missing.has(key)) return;
      this.#missing.add(key);
      this.#logMissing(vid, idx);
    }
  }

  /** Which bytes of which disks, in the words of check. */
  #logMissing(vid: number, idx: number): void {
    const ranges: string[] = [];
    for (const { record, map } of this.#store.open.values()) {
      if (map[idx] !== vid) continue;
      const from = idx * 2 ** record.blockSizeShift;
      const to = Math.min(from + 2 ** record.blockSizeShift, record.size) - 1;
      ranges.push(`${labelOfVdi(record)} bytes ${from} to ${to}`);
    }
    this.#store.log(`lost: ${ranges.join(', ')} (object ${idx} of vid ${vid.toString(16)}); read as zeros`);
  }
}
