/**
 * Changes of the table of an inode that hold whatever becomes of the members meanwhile: a copy of the inode that a node was
 * recovering may have missed an entry, and whoever reads that copy later gives its reference up a second time. So what was
 * under way when the members changed is written once more as plain bytes, of which no reference is given up: all entries up to
 * the last that was changed, and no counts for the changed ones. Owns what the table should be. An open disk has its own way
 * (sheep-vdi.ts), which knows of snapshots that others take.
 */
import { encodeReference } from '../../sheepdog/inode-table.js';
import type { ClusterClient } from './cluster-client.js';

const NO_COUNT = encodeReference(0, 0);

export class TableWriter {
  readonly #cluster: ClusterClient;
  readonly #vid: number;
  /** As the nodes have it. */
  readonly #table: Uint32Array;
  readonly #inFlight = new Set<Promise<void>>();
  #confirming: Promise<void> | undefined;
  /** Entries that were changed in an epoch that has passed, and are not confirmed: by idx, what they were before. */
  readonly #unconfirmed = new Map<number, number>();

  /** `table`: what the inode has now; kept up to date. */
  constructor(cluster: ClusterClient, vid: number, table: Uint32Array) {
    this.#cluster = cluster;
    this.#vid = vid;
    this.#table = table;
  }

  /** Set the entries from `idx` on, each to something else than it is. Errors: the cluster's. */
  async set(idx: number, owners: readonly number[]): Promise<void> {
    while (this.#confirming) await this.#confirming;
    const writing = this.#write(idx, owners);
    this.#inFlight.add(writing);
    try {
      await writing;
    } finally {
      this.#inFlight.delete(writing);
    }
    if (this.#unconfirmed.size === 0) return;
    this.#confirming ??= this.#confirm().finally(() => (this.#confirming = undefined));
    await this.#confirming;
  }

  async #write(idx: number, owners: readonly number[]): Promise<void> {
    const { recovery } = this.#cluster;
    const { epoch } = recovery;
    await this.#cluster.writeTable(this.#vid, idx, owners);
    for (const [n, owner] of owners.entries()) {
      if (recovery.epoch !== epoch) this.#unconfirmed.set(idx + n, this.#table[idx + n] as number);
      this.#table[idx + n] = owner;
    }
  }

  /** With nothing else under way: an entry that is written as it was before would have its reference given up twice. */
  async #confirm(): Promise<void> {
    await Promise.allSettled(this.#inFlight);
    const changed = [...this.#unconfirmed];
    const count = changed.reduce((highest, [idx]) => Math.max(highest, idx), 0) + 1;
    const table = this.#table.slice(0, count);
    const found = await this.#cluster.readTable(this.#vid, count);
    for (let idx = 0; idx < count; idx++) {
      // From a copy that has missed it. Anything else is somebody else's change, or one of ours that failed, and stays.
      if (found[idx] !== this.#unconfirmed.get(idx)) table[idx] = found[idx] as number;
    }
    await this.#cluster.fillTable(this.#vid, table);
    for (const [idx] of changed) {
      await this.#cluster.writeReferences(this.#vid, idx, NO_COUNT);
      this.#unconfirmed.delete(idx);
    }
  }
}
