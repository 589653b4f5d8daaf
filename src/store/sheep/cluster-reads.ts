/** Reading of a cluster's objects: from what was read ahead, from the nodes, and once more if an object seems to be missing. */
import type { StoreError } from '../store-error.js';
import type { VdiRecord } from '../vdi-record.js';
import type { ClusterClient } from './cluster-client.js';
import type { GoneRetries } from './gone-retries.js';
import type { ReadTracker } from './read-tracker.js';
import { isLost, lostError } from './lost-owner.js';
import { oidKey } from '../../sheepdog/object-ids.js';

/** How the open VDIs of a store read their objects. */
export interface ObjectReading {
  readObject(vid: number, idx: number, offset: number, into: Buffer): Promise<void>;
}

/** Of the store that reads: its open VDIs, and its log. */
export interface ReadingStore {
  readonly open: ReadonlyMap<number, { readonly record: VdiRecord; readonly map: Uint32Array }>;
  log(line: string): void;
}

export class ClusterReads implements ObjectReading {
  readonly #cluster: ClusterClient;
  readonly #tracker: ReadTracker;
  readonly #retries: GoneRetries;

  constructor(cluster: ClusterClient, tracker: ReadTracker, retries: GoneRetries) {
    this.#cluster = cluster;
    this.#tracker = tracker;
    this.#retries = retries;
  }

  /** Errors: GONE (the object is missing with all nodes in their places), IO. */
  readObject(vid: number, idx: number, offset: number, into: Buffer): Promise<void> {
    if (isLost(vid)) return Promise.reject(lostError(idx));
    const read = this.#read(vid, idx, offset, into);
    return this.#tracker.users > 0 ? this.#tracker.track(oidKey(vid, idx), read) : read;
  }

  /** The same for an object that is likely to be missing: without asking again. */
  async readOnce(vid: number, idx: number, offset: number, into: Buffer): Promise<void> {
    const ahead = this.#cluster.readAhead.read(vid, idx, offset, into);
    if (ahead && (await ahead)) return;
    await this.#cluster.readData(vid, idx, offset, into);
  }

  async #read(vid: number, idx: number, offset: number, into: Buffer): Promise<void> {
    try {
      const ahead = this.#cluster.readAhead.read(vid, idx, offset, into);
      if (ahead && (await ahead)) return;
      await this.#cluster.readData(vid, idx, offset, into);
    } catch (error) {
      if ((error as StoreError).code !== 'GONE') throw error;
      await this.#retries.retry(error as StoreError, () => this.#cluster.readData(vid, idx, offset, into));
    }
  }
}
