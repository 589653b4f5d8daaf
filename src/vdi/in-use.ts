/**
 * Who has which VDI or snapshot open, beyond the life of connections and of this process: a client that was cut off counts
 * as a user until it has come back and left in order, or a time has passed. Owns the counts and what is stored of them. It
 * does not know what may not be done meanwhile; the catalog does.
 */
import { ClientConnections, type ConnectionSpan } from './client-connections.js';
import { factKey, type StoredFacts } from './stored-facts.js';
import { isRunning, ownKey } from '../system/process-identity.js';
import { isTimestamp, msSince, timestampNow, type Timestamp } from './timestamp.js';

/** How long a client that was cut off counts as a user. An idle guest comes back with its next request only. */
export const DEFAULT_IN_USE_MS = 60 * 60_000;
/**
 * How long one that said goodbye after it was told of errors does: some try that again on another connection (nbdkit's retry
 * filter), which they open soon after.
 */
const AFTER_ERRORS_MS = 5 * 60_000;
/** Clients of one export that are told apart when they were cut off; earlier ones are then counted together. */
const MAX_LOST_CLIENTS = 32;
/** Of one store. */
const MAX_RECORDS = 16_384;
const PREFIX = 'use/';
const EARLIER_CLIENTS: Client = { id: '*', label: 'clients that were cut off earlier', isExact: false };

type Log = (line: string, details?: object) => void;

/** Somebody who opens exports. */
export interface Client {
  /** The same whenever it comes; of nobody else, as far as can be told. */
  readonly id: string;
  /** For people. */
  readonly label: string;
  /** `id` stands for one process; else others may come under it as well. */
  readonly isExact: boolean;
  /** That process: see processKey. */
  readonly process?: string;
}

/** One user, for people. Times are Date.now(). */
export interface ClientUse {
  readonly client: string;
  readonly since: number;
  /** When it was cut off; null if it is connected. */
  readonly lostAt: number | null;
  /** Until when it counts. */
  readonly until: number | null;
  /** Another process of this machine serves it. */
  readonly isElsewhere?: boolean;
}

/** What is stored of one client of one export. */
interface UseRecord {
  readonly name: string;
  readonly tag: string;
  readonly client: Client;
  readonly since: number;
  /** One of its connections may write. */
  readonly writable: boolean;
  /** The process that serves it, as long as it is not cut off. */
  readonly server: string;
  readonly lostAt?: Timestamp | undefined;
  readonly forMs: number;
  /** It was not cut off: it said goodbye, having been told of errors. Once its process has ended it tries nothing again. */
  readonly hasLeft?: boolean | undefined;
}

interface Use {
  record: UseRecord;
  readonly key: string;
  readonly writers: ClientConnections;
  readonly readers: ClientConnections;
  /** Of those that were cut off: the last one's time, for how long they count, and UseRecord's `hasLeft`. */
  lostSince: Timestamp | undefined;
  lostForMs: number;
  hasLeft: boolean;
  /** Writers of a client that is not exact, since nobody was connected: those that took over, wrote nothing and have left ... */
  onlyLooked: number;
  /** ... and whether one has written and left in order. */
  hasWritten: boolean;
  /** Its record is on its way to the disk. */
  storing?: Promise<void> | undefined;
}

/** One connection's. */
export interface UseOfConnection {
  readonly use: Use;
  readonly writable: boolean;
  /** It may be one of those that were cut off, come back. */
  readonly tookOver: ClientConnections | undefined;
}

/** How a connection has ended. */
export interface EndOfUse {
  /** Its client said goodbye. */
  readonly isOver: boolean;
  /** ... having been told of errors: it may try that again. */
  readonly hadErrors: boolean;
  readonly hasWritten: boolean;
  readonly span: ConnectionSpan;
}

/** Uses by what is used. */
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

  constructor(facts: StoredFacts, options: { readonly forMs: number; readonly log: Log }) {
    this.#facts = facts;
    this.#forMs = options.forMs;
    this.#log = options.log;
    this.#takeOver();
  }

  /**
   * A connection has opened the export; `writable`: to write, as well. When it resolves, that is remembered, whatever
   * becomes of this process.
   */
  async begin(
    { name, tag }: { readonly name: string; readonly tag: string },
    client: Client,
    writable: boolean,
  ): Promise<UseOfConnection> {
    const key = PREFIX + factKey(name, tag, client.id);
    let use = this.#uses.get(key);
    if (use !== undefined && !this.#counts(use)) forget(use);
    const known = use?.record;
    if (use === undefined) {
      const since = Date.now();
      use = this.#newUse(key, { name, tag, client, since, writable, server: ownKey, forMs: this.#forMs });
      this.#uses.set(key, use);
    }
    const { writers, readers } = use;
    // Who may only read is not one that could write.
    const tookOver = writable && writers.takeOver() ? writers : readers.takeOver() ? readers : undefined;
    (writable ? writers : readers).live++;
    const isStored = this.#facts.get(key) === known && known?.server === ownKey && known.lostAt === undefined;
    if (!isStored || (writable && !known.writable)) {
      use.record = { ...use.record, client, server: ownKey };
      this.#state(use);
      use.storing = this.#store(use.record);
    }
    // Also another connection's, if it is the same.
    const { storing } = use;
    await storing;
    if (use.storing === storing) use.storing = undefined;
    return { use, writable, tookOver };
  }

  /** The connection is over. */
  end({ use, writable, tookOver }: UseOfConnection, { isOver, hadErrors, hasWritten, span }: EndOfUse): void {
    const { writers, readers } = use;
    const own = writable ? writers : readers;
    own.live--;
    const isInOrder = isOver && !hadErrors;
    if (!isInOrder) {
      own.loseAll(1, span);
    } else if (use.record.client.isExact) {
      // One process: when its last connection has said goodbye, none of those that broke before will come back. One that
      // could only read does not speak for one that writes.
      if (own.live === 0) own.forget();
      if (live(use) === 0 && writable) readers.forget();
    } else if (hasWritten) {
      use.hasWritten = true;
    } else if (tookOver === writers) {
      use.onlyLooked++;
    }
    // Behind an address who only looks speaks for no writer. Who took over has been counted for the one that he was.
    const speaks = use.record.client.isExact || !writable || hasWritten;
    if (isInOrder && tookOver === undefined && speaks) own.leave(span);
    own.settle();
    if (writers.live === 0) {
      // Those behind one address: if none has written, they only looked, and whoever was cut off may write yet.
      if (!use.hasWritten) writers.loseAll(use.onlyLooked);
      else if (isInOrder) writers.forget();
      use.onlyLooked = 0;
      use.hasWritten = false;
    }
    if (this.#uses.get(use.key) !== use) return; // forgotten meanwhile
    if (lost(use) === 0) {
      if (live(use) === 0) this.#drop(use);
    } else if (!isInOrder) {
      use.lostSince = timestampNow();
      // If others of it were cut off, they count for longer.
      use.hasLeft = isOver && (lost(use) === 1 || use.hasLeft);
      use.lostForMs = use.hasLeft ? Math.min(this.#forMs, AFTER_ERRORS_MS) : this.#forMs;
      this.#noteLost(use);
    } else if (live(use) === 0) {
      // Whoever came meanwhile changes nothing for the one that is away, who has been so for as long as before.
      this.#noteLost(use);
    }
  }

  /** The connection was refused after all: all is as if it had not come. */
  withdraw({ use, writable, tookOver }: UseOfConnection): void {
    (writable ? use.writers : use.readers).live--;
    tookOver?.loseAll(1);
    if (this.#uses.get(use.key) !== use) return; // forgotten meanwhile
    if (lost(use) > 0) this.#noteLost(use);
    else if (live(use) === 0) this.#drop(use);
  }

  /** Who uses this, connected or cut off. */
  of(name: string, tag: string): ClientUse[] {
    return this.#find((record) => record.name === name && record.tag === tag).of(name, tag);
  }

  /** The same of all, looked up once. */
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
      if (!this.#counts(use)) {
        forget(use);
        if (live(use) === 0) this.#drop(use);
      }
      const { client, since } = record;
      const { lostSince } = use;
      if (live(use) > 0) found.push({ client: client.label, since, lostAt: null, until: null });
      if (lost(use) > 0 && lostSince) {
        // eslint-disable-next-line no-restricted-syntax -- a time of day, for people
        const until = Date.now() + Math.max(0, leftMs(use));
        found.push({ client: client.label, since, lostAt: lostSince.at, until });
      }
    }
    // Another daemon of this machine serves it, for a cluster.
    for (const record of this.#records()) {
      if (!isMeant(record) || record.lostAt || !this.#isForeign(record)) continue;
      const { client, since } = record;
      all.list(record).push({ client: client.label, since, lostAt: null, until: null, isElsewhere: true });
    }
    return all;
  }

  /** Whoever was cut off from this will not come back: somebody has said so. */
  forgetLost(name: string, tag: string): void {
    for (const use of [...this.#uses.values()]) {
      if (use.record.name !== name || use.record.tag !== tag) continue;
      forget(use);
      if (live(use) === 0) this.#drop(use);
    }
  }

  /** Whether those that were cut off still do. */
  #counts(use: Use): boolean {
    const { process } = use.record.client;
    // Who only read, or has left, and has ended, comes back to nothing. Behind one that could write and was cut off there may
    // be a proxy with its client.
    if ((use.writers.lost === 0 || use.hasLeft) && process !== undefined && !isRunning(process)) return false;
    return use.lostSince === undefined || leftMs(use) > 0;
  }

  /** What is stored is for whoever comes after this process: then all that are connected now were cut off, and just then. */
  #state(use: Use): void {
    const isLost = live(use) === 0;
    use.record = {
      ...{ ...use.record, writable: mayWrite(use), lostAt: isLost ? use.lostSince : undefined },
      ...{ forMs: isLost ? use.lostForMs : this.#forMs, hasLeft: isLost && use.hasLeft ? true : undefined },
    };
  }

  async #store(record: UseRecord): Promise<void> {
    const { name, tag, client } = record;
    try {
      await this.#facts.put(PREFIX + factKey(name, tag, client.id), record);
    } catch (error) {
      // The guest is more important than the guard against what others may do while it is cut off.
      this.#log(`${label(name, tag)} is open by ${client.label}, which is forgotten if this process is killed`, {
        err: error,
      });
    }
  }

  #noteLost(use: Use): void {
    use.lostSince ??= timestampNow();
    if (use.lostForMs === 0) {
      forget(use);
      if (live(use) === 0) this.#drop(use);
      return;
    }
    this.#state(use);
    const { name, tag } = use.record;
    const others = [...this.#uses.values()].filter(
      (other) =>
        other.record.name === name && other.record.tag === tag && live(other) === 0 && other.record.client.id !== '*',
    );
    // Those that were here last are the likeliest to come back. A place in the map says when somebody first came.
    if (others.length > MAX_LOST_CLIENTS) {
      this.#countTogether(others.reduce((oldest, other) => (leftMs(other) < leftMs(oldest) ? other : oldest)));
    }
    if (this.#uses.size > MAX_RECORDS) {
      for (const other of [...this.#uses.values()]) if (live(other) === 0 && !this.#counts(other)) this.#drop(other);
    }
    if (this.#uses.size > MAX_RECORDS) {
      this.#log(`${label(name, tag)}: too many clients were cut off, ${use.record.client.label} is not remembered`);
      if (live(use) === 0) this.#drop(use);
      return;
    }
    this.#facts.putSoon(use.key, use.record);
  }

  #countTogether(oldest: Use): void {
    const { name, tag } = oldest.record;
    const key = PREFIX + factKey(name, tag, EARLIER_CLIENTS.id);
    const before = this.#uses.get(key);
    // Until the last of them counts no more.
    const last = before && leftMs(before) > leftMs(oldest) ? before : oldest;
    const since = Math.min(before?.record.since ?? Infinity, oldest.record.since);
    const writable = oldest.record.writable || before?.record.writable === true;
    const record = { ...last.record, client: EARLIER_CLIENTS, since, writable, hasLeft: undefined };
    this.#uses.set(key, this.#lostUse(key, record));
    this.#facts.putSoon(key, record);
    this.#drop(oldest);
  }

  #newUse(key: string, record: UseRecord): Use {
    return {
      ...{
        key,
        record,
        writers: new ClientConnections(),
        readers: new ClientConnections(),
        onlyLooked: 0,
        hasWritten: false,
      },
      ...{ lostSince: undefined, lostForMs: this.#forMs, hasLeft: false },
    };
  }

  /** Of which only the record is known: how many connections there were does not matter. */
  #lostUse(key: string, record: UseRecord): Use {
    const use = this.#newUse(key, record);
    (record.writable ? use.writers : use.readers).loseAll(1);
    use.lostSince = record.lostAt;
    use.lostForMs = record.forMs;
    use.hasLeft = record.hasLeft === true;
    return use;
  }

  #drop(use: Use): void {
    this.#uses.delete(use.key);
    this.#facts.putSoon(use.key, undefined);
  }

  /** What a process had open that has ended is of clients that were cut off; when, nobody knows: now at the latest. */
  #takeOver(): void {
    this.#facts.refresh();
    // What another process of this machine has stored anew is looked at anew.
    for (const [key, use] of this.#uses) {
      const stored = this.#facts.get(key);
      if (live(use) > 0 || stored === use.record) continue;
      // Who was cut off from this process is in nobody else's hands, unless it is not there any more: somebody has said --force.
      if (use.record.server === ownKey && isUseRecord(stored) && stored.server === ownKey) continue;
      this.#uses.delete(key);
    }
    for (const record of this.#records()) {
      const key = PREFIX + factKey(record.name, record.tag, record.client.id);
      if (this.#uses.has(key) || record.server === ownKey || (!record.lostAt && this.#isForeign(record))) continue;
      const use = this.#lostUse(key, record.lostAt ? record : { ...record, lostAt: timestampNow() });
      if (!this.#counts(use)) {
        this.#facts.putSoon(key, undefined);
        continue;
      }
      this.#uses.set(key, use);
      if (!record.lostAt) this.#facts.putSoon(key, use.record);
    }
  }

  /** A store that is not shared has a lock: what is recorded there of another process is of one that had it, or of the original of a copy. */
  #isForeign({ server }: UseRecord): boolean {
    return this.#facts.isShared && server !== ownKey && isRunning(server);
  }

  *#records(): Generator<UseRecord> {
    for (const [, value] of [...this.#facts.entries(PREFIX)]) if (isUseRecord(value)) yield value;
  }
}

function live({ writers, readers }: Use): number {
  return writers.live + readers.live;
}

function lost({ writers, readers }: Use): number {
  return writers.lost + readers.lost;
}

function mayWrite({ writers, onlyLooked }: Use): boolean {
  return writers.live + writers.lost + onlyLooked > 0;
}

/** Those that were cut off do not count any more. */
function forget(use: Use): void {
  use.writers.forget();
  use.readers.forget();
  use.onlyLooked = 0;
  use.lostSince = undefined;
}

/** How long those that were cut off count yet. */
function leftMs({ lostSince, lostForMs }: Use): number {
  return lostSince ? lostForMs - msSince(lostSince) : lostForMs;
}

function label(name: string, tag: string): string {
  return tag === '' ? name : `${name}@${tag}`;
}

function isUseRecord(value: unknown): value is UseRecord {
  const { name, tag, client, since, server, lostAt, forMs } = (value ?? {}) as Partial<UseRecord>;
  return (
    typeof name === 'string' &&
    typeof tag === 'string' &&
    typeof client?.id === 'string' &&
    typeof client.label === 'string' &&
    Number.isFinite(since) &&
    typeof server === 'string' &&
    Number.isFinite(forMs) &&
    (lostAt === undefined || isTimestamp(lostAt))
  );
}
