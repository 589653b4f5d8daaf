/**
 * The clients that use each VDI or snapshot, beyond the life of their connections and of this process: a client that was cut
 * off counts as a user until it has come back and left in order, or its time has passed. Owns which uses there are, what is
 * stored of them, and how many are. What must not be done to a disk in use is the catalog's decision (busy-checks.ts).
 */
import { isRunning, ownKey } from '../system/process-identity.js';
import { isUseRecord, Use, type Client, type EndOfUse, type UseOfConnection, type UseRecord } from './client-use.js';
import type { Log } from './log.js';
import { factKey, type StoredFacts } from './stored-facts.js';
import { timestampNow } from './timestamp.js';

/** Clients of one disk that were cut off and are remembered one by one; earlier ones are counted together. */
const MAX_LOST_CLIENTS = 32;
/** Uses of one store that are remembered. */
const MAX_RECORDS = 16_384;
const PREFIX = 'use/';
const EARLIER_CLIENTS: Client = { id: '*', label: 'clients that were cut off earlier', isExact: false };

/** One user, for people. Times are Date.now(). */
export interface ClientUse {
  readonly client: string;
  readonly since: number;
  /** When it was cut off; null if it is connected. */
  readonly lostAt: number | null;
  /** Until when it counts; null if it is connected. */
  readonly until: number | null;
  /** Another process of this machine serves it. */
  readonly isElsewhere?: boolean;
}

/** Users by disk. */
class AllUses {
  readonly #lists = new Map<string, ClientUse[]>();

  of(name: string, tag: string): ClientUse[] {
    return (this.#lists.size > 0 && this.#lists.get(factKey(name, tag))) || [];
  }

  list({ name, tag }: Pick<UseRecord, 'name' | 'tag'>): ClientUse[] {
    const key = factKey(name, tag);
    let list = this.#lists.get(key);
    if (!list) this.#lists.set(key, (list = []));
    return list;
  }
}

export class InUse {
  readonly #facts: StoredFacts;
  readonly #forMs: number;
  readonly #log: Log;
  readonly #uses = new Map<string, Use>();

  /** `forMs`: how long a client that was cut off counts as a user. */
  constructor(facts: StoredFacts, options: { readonly forMs: number; readonly log: Log }) {
    this.#facts = facts;
    this.#forMs = options.forMs;
    this.#log = options.log;
    this.#takeOver();
  }

  /**
   * A connection has opened the disk; `writable`: also to write. When it resolves, that is stored, and outlives this process.
   */
  async begin(
    { name, tag }: { readonly name: string; readonly tag: string },
    client: Client,
    writable: boolean,
  ): Promise<UseOfConnection> {
    const key = PREFIX + factKey(name, tag, client.id);
    let use = this.#uses.get(key);
    if (use !== undefined && !use.counts) use.forgetLost();
    const known = use?.record;
    if (use === undefined) {
      const since = Date.now();
      use = new Use(key, { name, tag, client, since, writable, server: ownKey, forMs: this.#forMs }, this.#forMs);
      this.#uses.set(key, use);
    }
    const connection = use.arrive(writable);
    const isStored = this.#facts.get(key) === known && known?.server === ownKey && known.lostAt === undefined;
    if (!isStored || (writable && !known.writable)) {
      use.record = { ...use.record, client, server: ownKey };
      use.updateRecord(this.#forMs);
      use.storing = this.#store(use.record);
    }
    // It may be another connection's, of the same record.
    const { storing } = use;
    await storing;
    if (use.storing === storing) use.storing = undefined;
    return connection;
  }

  /** The connection is over. */
  end(connection: UseOfConnection, end: EndOfUse): void {
    const { use } = connection;
    const isInOrder = use.leave(connection, end);
    if (this.#uses.get(use.key) !== use) return; // forgotten meanwhile
    if (use.lost === 0) {
      if (use.live === 0) this.#drop(use);
    } else if (!isInOrder) {
      use.noteCutOff(end.isOver, this.#forMs);
      this.#noteLost(use);
    } else if (use.live === 0) {
      // This connection changes nothing for the one that was cut off, which has been away for as long as before.
      this.#noteLost(use);
    }
  }

  /** The connection was refused after all: undo `begin`. */
  withdraw(connection: UseOfConnection): void {
    const { use } = connection;
    use.withdraw(connection);
    if (this.#uses.get(use.key) !== use) return; // forgotten meanwhile
    if (use.lost > 0) this.#noteLost(use);
    else if (use.live === 0) this.#drop(use);
  }

  /** The users of a disk, connected or cut off. */
  of(name: string, tag: string): ClientUse[] {
    return this.#find((record) => record.name === name && record.tag === tag).of(name, tag);
  }

  /** The users of all disks, looked up once. */
  all(): AllUses {
    return this.#find(() => true);
  }

  #find(isMeant: (record: UseRecord) => boolean): AllUses {
    this.#takeOver();
    const all = new AllUses();
    for (const use of [...this.#uses.values()]) {
      const { record } = use;
      if (!isMeant(record)) continue;
      const found = all.list(record);
      if (!use.counts) {
        use.forgetLost();
        if (use.live === 0) this.#drop(use);
      }
      const { client, since } = record;
      const { lostSince } = use;
      if (use.live > 0) found.push({ client: client.label, since, lostAt: null, until: null });
      if (use.lost > 0 && lostSince) {
        // eslint-disable-next-line no-restricted-syntax -- a time of day, for people
        const until = Date.now() + Math.max(0, use.leftMs);
        found.push({ client: client.label, since, lostAt: lostSince.at, until });
      }
    }
    // Of a cluster: clients of other daemons of this machine.
    for (const record of this.#records()) {
      if (!isMeant(record) || record.lostAt || !this.#isForeign(record)) continue;
      const { client, since } = record;
      all.list(record).push({ client: client.label, since, lostAt: null, until: null, isElsewhere: true });
    }
    return all;
  }

  /** The operator has said that no client that was cut off from this disk will come back. */
  forgetLost(name: string, tag: string): void {
    for (const use of [...this.#uses.values()]) {
      if (use.record.name !== name || use.record.tag !== tag) continue;
      use.forgetLost();
      if (use.live === 0) this.#drop(use);
    }
  }

  async #store(record: UseRecord): Promise<void> {
    const { name, tag, client } = record;
    try {
      await this.#facts.put(PREFIX + factKey(name, tag, client.id), record);
    } catch (error) {
      // Serving the guest matters more than protecting its disk while it is cut off.
      this.#log(
        `${label(name, tag)} is open by ${client.label}, but this cannot be stored, and is forgotten if this process is killed`,
        {
          err: error,
        },
      );
    }
  }

  #noteLost(use: Use): void {
    use.lostSince ??= timestampNow();
    if (use.lostForMs === 0) {
      use.forgetLost();
      if (use.live === 0) this.#drop(use);
      return;
    }
    use.updateRecord(this.#forMs);
    const { name, tag } = use.record;
    const others = [...this.#uses.values()].filter(
      (other) =>
        other.record.name === name && other.record.tag === tag && other.live === 0 && other.record.client.id !== '*',
    );
    // The clients that were cut off last are the likeliest to come back. (The map is in the order of first connections.)
    if (others.length > MAX_LOST_CLIENTS) {
      this.#countTogether(others.reduce((oldest, other) => (other.leftMs < oldest.leftMs ? other : oldest)));
    }
    if (this.#uses.size > MAX_RECORDS) {
      for (const other of [...this.#uses.values()]) if (other.live === 0 && !other.counts) this.#drop(other);
    }
    if (this.#uses.size > MAX_RECORDS) {
      this.#log(`${label(name, tag)}: too many clients were cut off, ${use.record.client.label} is not remembered`);
      if (use.live === 0) this.#drop(use);
      return;
    }
    this.#facts.putSoon(use.key, use.record);
  }

  #countTogether(oldest: Use): void {
    const { name, tag } = oldest.record;
    const key = PREFIX + factKey(name, tag, EARLIER_CLIENTS.id);
    const before = this.#uses.get(key);
    // Together they count for as long as the last of them.
    const last = before && before.leftMs > oldest.leftMs ? before : oldest;
    const since = Math.min(before?.record.since ?? Infinity, oldest.record.since);
    const writable = oldest.record.writable || before?.record.writable === true;
    const record = { ...last.record, client: EARLIER_CLIENTS, since, writable, hasLeft: undefined };
    this.#uses.set(key, Use.lost(key, record));
    this.#facts.putSoon(key, record);
    this.#drop(oldest);
  }

  #drop(use: Use): void {
    this.#uses.delete(use.key);
    this.#facts.putSoon(use.key, undefined);
  }

  /** Take over the uses of a process that has ended. Their clients were cut off, at an unknown time: now at the latest. */
  #takeOver(): void {
    this.#facts.refresh();
    // Reload the records that another process of this machine has stored since.
    for (const [key, use] of this.#uses) {
      const stored = this.#facts.get(key);
      if (use.live > 0 || stored === use.record) continue;
      // A client that was cut off from this process stays ours, unless its record is gone: an operator has said --force.
      if (use.record.server === ownKey && isUseRecord(stored) && stored.server === ownKey) continue;
      this.#uses.delete(key);
    }
    for (const record of this.#records()) {
      const key = PREFIX + factKey(record.name, record.tag, record.client.id);
      if (this.#uses.has(key) || record.server === ownKey || (!record.lostAt && this.#isForeign(record))) continue;
      const use = Use.lost(key, record.lostAt ? record : { ...record, lostAt: timestampNow() });
      if (!use.counts) {
        this.#facts.putSoon(key, undefined);
        continue;
      }
      this.#uses.set(key, use);
      if (!record.lostAt) this.#facts.putSoon(key, use.record);
    }
  }

  /**
   * Another process serves it now. A store that is not shared has a lock: another process in its records had the lock before, or
   * serves the store that this one is a copy of.
   */
  #isForeign({ server }: UseRecord): boolean {
    return this.#facts.isShared && server !== ownKey && isRunning(server);
  }

  *#records(): Generator<UseRecord> {
    for (const [, value] of [...this.#facts.entries(PREFIX)]) if (isUseRecord(value)) yield value;
  }
}

function label(name: string, tag: string): string {
  return tag === '' ? name : `${name}@${tag}`;
}
