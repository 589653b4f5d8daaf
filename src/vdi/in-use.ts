/**
 * Who has which VDI or snapshot open, beyond the life of connections and of this process: a client that was cut off counts
 * as a user until it has come back and left in order, or a time has passed. Owns the counts and what is stored of them. It
 * does not know what may not be done meanwhile; the catalog does.
 */
import { memoryKey, type Memory } from './memory.js';
import { isRunning, ownKey } from './process-identity.js';
import { isStamp, msSince, stampNow, type Stamp } from './stamp.js';

/** How long a client that was cut off counts as a user. An idle guest comes back with its next request only. */
export const DEFAULT_IN_USE_MS = 60 * 60_000;
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
  /** It may write. */
  readonly writable: boolean;
  /** The process that serves it, as long as it is not cut off. */
  readonly server: string;
  readonly lostAt?: Stamp | undefined;
  readonly forMs: number;
}

interface Use {
  record: UseRecord;
  readonly key: string;
  /** Connections, and those that were cut off and have not come back. */
  live: number;
  lost: number;
}

/** One connection's. */
export interface UseOfConnection {
  readonly use: Use;
  /** It may be one that was cut off, come back. */
  readonly tookOver: boolean;
  /** Since when that one had been away. */
  readonly lostBefore: Stamp | undefined;
}

export class InUse {
  readonly #memory: Memory;
  readonly #forMs: number;
  readonly #log: Log;
  readonly #uses = new Map<string, Use>();

  constructor(memory: Memory, options: { readonly forMs: number; readonly log: Log }) {
    this.#memory = memory;
    this.#forMs = options.forMs;
    this.#log = options.log;
    this.#takeOver();
  }

  /** A connection has opened the export. When it resolves, that is remembered, whatever becomes of this process. */
  async begin(
    { name, tag }: { readonly name: string; readonly tag: string },
    client: Client,
    writable: boolean,
  ): Promise<UseOfConnection> {
    const key = PREFIX + memoryKey(name, tag, client.id);
    let use = this.#uses.get(key);
    if (use !== undefined && !this.#counts(use)) use.lost = 0;
    const tookOver = use !== undefined && use.lost > 0;
    const known = use?.record;
    const lostBefore = tookOver ? known?.lostAt : undefined;
    if (use === undefined) {
      const since = Date.now();
      use = {
        key,
        live: 0,
        lost: 0,
        record: { name, tag, client, since, writable, server: ownKey, forMs: this.#forMs },
      };
      this.#uses.set(key, use);
    } else if (tookOver) {
      use.lost--;
    }
    use.live++;
    const isStored = this.#memory.get(key) === known && known?.server === ownKey && known.lostAt === undefined;
    if (!isStored || (writable && !known.writable)) {
      const { record } = use;
      use.record = { ...record, client, writable: writable || record.writable, server: ownKey, lostAt: undefined };
      try {
        await this.#memory.put(key, use.record);
      } catch (error) {
        // The guest is more important than the guard against what others may do while it is cut off.
        this.#log(`${label(name, tag)} is open by ${client.label}, which is forgotten if this process is killed`, {
          err: error,
        });
      }
    }
    return { use, tookOver, lostBefore };
  }

  /** The connection is over. `isOver`: its client said goodbye. */
  end(
    { use, tookOver, lostBefore }: UseOfConnection,
    { isOver, hasWritten }: { isOver: boolean; hasWritten: boolean },
  ): void {
    const { client, writable } = use.record;
    use.live--;
    if (isOver && use.live === 0 && client.isExact) {
      // One process: when its last connection has said goodbye, none of those that broke before will come back.
      use.lost = 0;
    } else if (!isOver) {
      use.lost++;
    } else if (tookOver && writable && !hasWritten && !client.isExact) {
      // Somebody else behind the same address, who only looked: whoever was cut off may write yet.
      use.lost++;
    }
    if (this.#uses.get(use.key) !== use) return; // forgotten meanwhile
    if (use.lost > 0) {
      // Whoever only looked gives back the place of the one that is away, who has been so for as long as before.
      if (!isOver || use.record.lostAt === undefined) this.#noteLost(use, isOver ? lostBefore : undefined);
    } else if (use.live === 0) {
      this.#drop(use);
    }
  }

  /** Who uses this, connected or cut off. */
  of(name: string, tag: string): ClientUse[] {
    this.#takeOver();
    const found: ClientUse[] = [];
    for (const use of [...this.#uses.values()]) {
      const { record } = use;
      if (record.name !== name || record.tag !== tag) continue;
      if (!this.#counts(use)) {
        use.lost = 0;
        if (use.live === 0) this.#drop(use);
      }
      const { client, since, lostAt, forMs } = record;
      if (use.live > 0) found.push({ client: client.label, since, lostAt: null, until: null });
      if (use.lost > 0 && lostAt) {
        // eslint-disable-next-line no-restricted-syntax -- a time of day, for people
        const until = Date.now() + Math.max(0, forMs - msSince(lostAt));
        found.push({ client: client.label, since, lostAt: lostAt.at, until });
      }
    }
    // Another daemon of this machine serves it, for a cluster.
    for (const record of this.#records()) {
      if (record.name !== name || record.tag !== tag || record.lostAt || !this.#isForeign(record)) continue;
      const { client, since } = record;
      found.push({ client: client.label, since, lostAt: null, until: null, isElsewhere: true });
    }
    return found;
  }

  /** Whoever was cut off from this will not come back: somebody has said so. */
  forgetLost(name: string, tag: string): void {
    for (const use of [...this.#uses.values()]) {
      if (use.record.name !== name || use.record.tag !== tag) continue;
      use.lost = 0;
      if (use.live === 0) this.#drop(use);
    }
  }

  #counts({ record: { lostAt, forMs, client, writable } }: Use): boolean {
    // Who only read, and has ended, comes back to nothing. Behind one that may write there may be a proxy with its client.
    if (!writable && client.process !== undefined && !isRunning(client.process)) return false;
    return lostAt === undefined || msSince(lostAt) < forMs;
  }

  #noteLost(use: Use, since: Stamp = stampNow()): void {
    use.record = { ...use.record, lostAt: since, forMs: this.#forMs };
    if (this.#forMs === 0) {
      use.lost = 0;
      if (use.live === 0) this.#drop(use);
      return;
    }
    const { name, tag } = use.record;
    const lost = [...this.#uses.values()].filter(
      ({ record, live }) => record.name === name && record.tag === tag && live === 0 && record.client.id !== '*',
    );
    if (lost.length > MAX_LOST_CLIENTS) this.#countTogether(lost[0] as Use);
    if (this.#uses.size > MAX_RECORDS) {
      for (const other of [...this.#uses.values()]) if (other.live === 0 && !this.#counts(other)) this.#drop(other);
    }
    if (this.#uses.size > MAX_RECORDS) {
      this.#log(`${label(name, tag)}: too many clients were cut off, ${use.record.client.label} is not remembered`);
      if (use.live === 0) this.#drop(use);
      return;
    }
    this.#memory.putSoon(use.key, use.record);
  }

  #countTogether(oldest: Use): void {
    const { name, tag } = oldest.record;
    const key = PREFIX + memoryKey(name, tag, EARLIER_CLIENTS.id);
    const before = this.#uses.get(key);
    const record = { ...oldest.record, client: EARLIER_CLIENTS, since: before?.record.since ?? oldest.record.since };
    this.#uses.set(key, { key, record, live: 0, lost: 1 });
    this.#memory.putSoon(key, record);
    this.#drop(oldest);
  }

  #drop(use: Use): void {
    this.#uses.delete(use.key);
    this.#memory.putSoon(use.key, undefined);
  }

  /** What a process had open that has ended is of clients that were cut off; when, nobody knows: now at the latest. */
  #takeOver(): void {
    this.#memory.refresh();
    // What another process of this machine has stored anew is looked at anew.
    for (const [key, use] of this.#uses) {
      if (use.live === 0 && this.#memory.get(key) !== use.record) this.#uses.delete(key);
    }
    for (const record of this.#records()) {
      const key = PREFIX + memoryKey(record.name, record.tag, record.client.id);
      if (this.#uses.has(key) || record.server === ownKey || (!record.lostAt && this.#isForeign(record))) continue;
      const use: Use = { key, live: 0, lost: 1, record: record.lostAt ? record : { ...record, lostAt: stampNow() } };
      if (!this.#counts(use)) {
        this.#memory.putSoon(key, undefined);
        continue;
      }
      this.#uses.set(key, use);
      if (!record.lostAt) this.#memory.putSoon(key, use.record);
    }
  }

  /** A store that is not shared has a lock: what is recorded there of another process is of one that had it, or of the original of a copy. */
  #isForeign({ server }: UseRecord): boolean {
    return this.#memory.isShared && server !== ownKey && isRunning(server);
  }

  *#records(): Generator<UseRecord> {
    for (const [, value] of [...this.#memory.entries(PREFIX)]) if (isUseRecord(value)) yield value;
  }
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
    (lostAt === undefined || isStamp(lostAt))
  );
}
