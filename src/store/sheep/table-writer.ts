/**
 * Changes of the table of an inode that survive a change of members. A copy of the inode that a node was recovering may have
 * missed an entry; a client that reads that copy later gives up the entry's reference a second time. So changes that were in
 * flight when the members changed are confirmed: all entries up to the last changed one are written again as plain bytes, which
 * gives up no reference, and the counts of the changed entries are reset. Owns what the table should be. Open VDIs do this
 * themselves (sheep-vdi.ts), because other clients may take snapshots of them.
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
  /** Entries that were changed in an earlier epoch and are not confirmed: by idx, the owner before the change. */
  readonly #unconfirmed = new Map<number, number>();

  /** `table`: what the inode has now. It is kept up to date. */
  constructor(cluster: ClusterClient, vid: number, table: Uint32Array) {
    this.#cluster = cluster;
    this.#vid = vid;
    this.#table = table;
  }

  /** Sets the entries from `idx` on, each to another value than it has. Errors: as requests on objects. */
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

  /** Waits for all other changes: writing an entry as it was before would give up its reference twice. */
  async #confirm(): Promise<void> {
    await Promise.allSettled(this.#inFlight);
    const changed = [...this.#unconfirmed];
    const count = changed.reduce((highest, [idx]) => Math.max(highest, idx), 0) + 1;
    const table = this.#table.slice(0, count);
    const found = await this.#cluster.readTable(this.#vid, count);
    for (let idx = 0; idx < count; idx++) {
      // The old owner: read from a copy that has missed the change. Any other value is a change of another client, or a failed
      // one
      // of ours, and stays.
      if (found[idx] !== this.#unconfirmed.get(idx)) table[idx] = found[idx] as number;
    }
    await this.#cluster.fillTable(this.#vid, table);
    for (const [idx] of changed) {
      await this.#cluster.writeReferences(this.#vid, idx, NO_COUNT);
      this.#unconfirmed.delete(idx);
    }
  }
}
