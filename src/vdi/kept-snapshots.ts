/**
 * Temporary snapshots that no connection has open, kept for clients that may come back: what the catalog asks of their keeper
 * (src/export/temporary-snapshots.ts), and how an operation ends them. Owns neither the snapshots nor how long they are kept.
 */
import type { ObjectStore } from '../store/object-store.js';
import type { VdiRecord } from '../store/vdi-record.js';
import { specOf } from './names.js';
import type { OpenVdis } from './open-vdis.js';

/** A temporary snapshot that waits for its client. Times are Date.now(). */
export interface KeptSnapshot {
  readonly spec: string;
  readonly takenAt: number;
  readonly client: string;
  readonly until: number;
}

/** Keeps temporary snapshots that nobody has open. */
export interface TemporaryKeeper {
  /** The client that this snapshot is kept for; undefined if a connection has it open, or no client is expected back. */
  kept(vid: number): { readonly client: string; readonly until: number } | undefined;
  /** The snapshot was dropped for another operation. A client that comes back to it gets an error that says `why`. */
  dropped(vid: number, why: string): void;
}

/** For results: the kept temporary snapshots that the operation has ended. */
export interface Ended {
  readonly ended: readonly KeptSnapshot[];
}

export class KeptSnapshots {
  readonly #store: ObjectStore;
  readonly #open: OpenVdis;
  keeper: TemporaryKeeper | undefined;

  constructor(store: ObjectStore, open: OpenVdis) {
    this.#store = store;
    this.#open = open;
  }

  /** Undefined if it is no temporary snapshot, or is not kept for anybody. */
  of(record: VdiRecord): KeptSnapshot | undefined {
    if (!record.isTemporary) return undefined;
    const kept = this.keeper?.kept(record.vid);
    return kept && { spec: specOf(record), takenAt: record.snapshotAt, ...kept };
  }

  /** It is kept, and nobody has it open. */
  isUnused(record: VdiRecord): boolean {
    return !this.#open.isUsed(record.vid) && this.of(record) !== undefined;
  }

  /** Drop those of `records` that are kept and that nobody has open. Only in an operation on their names. */
  async end(records: readonly VdiRecord[], why: string): Promise<KeptSnapshot[]> {
    const ended: KeptSnapshot[] = [];
    if (this.#store.readOnlyBecause !== undefined) return ended;
    for (const record of records) {
      const kept = this.#open.isUsed(record.vid) ? undefined : this.of(record);
      if (!kept) continue;
      await this.#open.settle(record);
      await this.#store.catalog.remove(record.vid);
      this.keeper?.dropped(record.vid, why);
      ended.push(kept);
    }
    return ended;
  }
}
