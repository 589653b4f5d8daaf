/**
 * The VDIs that are open, and how many users each has. All users of a VDI share one `Vdi`. Owns opening, counting and
 * closing. The last user's flush holds up no operation on the name; only then is the name taken, and the VDI closed unless
 * somebody has opened it meanwhile.
 */
import type { ObjectStore } from '../store/object-store.js';
import type { VdiRecord } from '../store/vdi-record.js';
import type { NameQueue } from './name-queue.js';
import { parseSpec, type VdiSpec } from './names.js';
import { openAsVdi } from './open-as-vdi.js';
import type { Vdi } from './vdi.js';

interface OpenEntry {
  readonly vdi: Vdi;
  /** 0: its last user has left and it is being flushed. A user who comes before it is closed takes it over. */
  users: number;
  /** The flush after the last user. Never rejects: closing flushes again. */
  lastFlush?: Promise<unknown>;
  closed?: Promise<void>;
}

export class OpenVdis {
  readonly #store: ObjectStore;
  readonly #names: NameQueue;
  /** Not by vid: a working VDI changes its vid with every snapshot. */
  readonly #entries = new Set<OpenEntry>();
  #isStopped = false;

  constructor(store: ObjectStore, names: NameQueue) {
    this.#store = store;
    this.#names = names;
  }

  usersOf(vid: number): number {
    return this.#entryOf(vid)?.users ?? 0;
  }

  isUsed(vid: number): boolean {
    return this.usersOf(vid) > 0;
  }

  /** Users by vid. */
  userCounts(): ReadonlyMap<number, number> {
    return new Map(Array.from(this.#entries, ({ vdi, users }) => [vdi.record.vid, users]));
  }

  /** The VDIs that have users. */
  *used(): Iterable<Vdi> {
    for (const { vdi, users } of this.#entries) if (users > 0) yield vdi;
  }

  /** Open the VDI, or share it if it is open. Each call needs one `release`. Only in an operation on its name. */
  async acquire(record: VdiRecord): Promise<Vdi> {
    let entry = this.#entryOf(record.vid);
    if (entry && isOutdated(entry.vdi.record, record)) {
      // If the open VDI fails here, its users get that error, and it is opened again below.
      await entry.vdi.opened.look?.().catch((error: unknown) => {
        if (!entry?.vdi.failure) throw error;
      });
      entry = this.#entryOf(record.vid);
    }
    if (!entry) {
      const opened = await this.#store.catalog.open(record.vid);
      entry = { vdi: openAsVdi(opened, this.#store.readOnlyBecause), users: 0 };
      this.#entries.add(entry);
    }
    entry.users++;
    return entry.vdi;
  }

  /** The counterpart of `acquire`. The last user's VDI is flushed, then closed. */
  async release(vdi: Vdi): Promise<void> {
    const entry = this.#entryWith(vdi);
    if (!entry || entry.users === 0) throw new Error('invariant: released a VDI that is not open');
    if (--entry.users > 0) return;
    const { name } = vdi.record;
    entry.lastFlush = flushQuietly(vdi);
    await entry.lastFlush;
    await this.#names.run([name], () => this.#closeUnused(entry));
  }

  /** Work with the VDI open. Only in an operation on its name. */
  async using<T>(record: VdiRecord, work: (vdi: Vdi) => Promise<T>): Promise<T> {
    const wasLeft = this.#entryOf(record.vid)?.users === 0;
    const vdi = await this.acquire(record);
    try {
      return await work(vdi);
    } finally {
      const entry = this.#entryWith(vdi);
      // If its last user had left before us, that user's `release` closes it.
      if (entry && --entry.users === 0 && !wasLeft) await this.#closeUnused(entry);
    }
  }

  /** Wait until a VDI whose last user has left is closed. Only in an operation on its name. */
  async settle({ vid }: VdiRecord): Promise<void> {
    const entry = this.#entryOf(vid);
    if (!entry || entry.users > 0) return;
    await entry.lastFlush;
    // A failure is reported to the user who has left.
    await this.#closeUnused(entry).catch(() => undefined);
  }

  /** `settle` for all. Only in an operation that runs alone. */
  async settleAll(): Promise<void> {
    for (const { vdi } of [...this.#entries]) await this.settle(vdi.record);
  }

  /** Wait for the flushes after last users that are in flight. */
  async lastFlushes(): Promise<void> {
    for (const { lastFlush } of [...this.#entries]) await lastFlush;
  }

  /**
   * Before an operation that flushes a working VDI: most dirty data goes to disk while no operation waits for the name. The
   * operation meets an error of this flush again, and reports it.
   */
  async flushAhead(name: string): Promise<void> {
    let meant: VdiSpec;
    try {
      meant = parseSpec(name);
    } catch {
      return;
    }
    for (const { vdi } of [...this.#entries]) {
      const { isSnapshot, ...record } = vdi.record;
      if (!isSnapshot && (meant.vid ?? record.vid) === record.vid && (meant.name || record.name) === record.name) {
        await flushQuietly(vdi);
      }
    }
  }

  /** The store is about to be closed, with all open VDIs: nothing is closed here any more. */
  stop(): void {
    this.#isStopped = true;
  }

  #entryWith(vdi: Vdi): OpenEntry | undefined {
    for (const entry of this.#entries) if (entry.vdi === vdi) return entry;
    return undefined;
  }

  /** Not a VDI that another tool has deleted: only its present users keep it. */
  #entryOf(vid: number): OpenEntry | undefined {
    for (const entry of this.#entries) {
      if (entry.vdi.record.vid === vid && !(entry.vdi.failure && entry.vdi.opened.look)) return entry;
    }
    return undefined;
  }

  async #closeUnused(entry: OpenEntry): Promise<void> {
    if (entry.users > 0 || this.#isStopped) return;
    if (this.#entries.delete(entry)) {
      // If this fails, the store keeps what could not be flushed, and the next open or close tries again.
      entry.closed = entry.vdi.close();
    }
    await entry.closed;
  }
}

/** Whether another tool has changed the open VDI, or made another of its id: `found` is its record in the store now. */
function isOutdated(open: VdiRecord, found: VdiRecord): boolean {
  return open.size !== found.size || open.name !== found.name || open.createdAt !== found.createdAt;
}

async function flushQuietly(vdi: Vdi): Promise<void> {
  try {
    await vdi.flush();
  } catch {
    // Closing flushes again, and so does every operation that needs the data durable.
  }
}
