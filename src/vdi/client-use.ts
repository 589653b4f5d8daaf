/**
 * One client's use of one disk: its connections, which of them were cut off, and until when the client is expected back. Owns
 * the rules by which a connection counts as one that was cut off and has come back. Which uses there are, and what is stored
 * of them: in-use.ts.
 */
import { isRunning } from '../system/process-identity.js';
import { ClientConnections, type ConnectionSpan } from './client-connections.js';
import { isTimestamp, msSince, timestampNow, type Timestamp } from './timestamp.js';

/**
 * How long a client counts that said goodbye after errors: some clients try the failed request again on another connection
 * (nbdkit's retry filter), which they open soon after.
 */
const AFTER_ERRORS_MS = 5 * 60_000;

/** Opens exports. */
export interface Client {
  /** The same whenever it connects, and no other client's, as far as that can be told. */
  readonly id: string;
  /** For people. */
  readonly label: string;
  /** `id` stands for one process; otherwise several clients may share it. */
  readonly isExact: boolean;
  /** That process: see processKey. */
  readonly process?: string;
}

/** What is stored of one client's use of one disk. */
export interface UseRecord {
  readonly name: string;
  readonly tag: string;
  readonly client: Client;
  /** Date.now() */
  readonly since: number;
  /** One of its connections may write. */
  readonly writable: boolean;
  /** The process that serves it, as long as it is not cut off. */
  readonly server: string;
  readonly lostAt?: Timestamp | undefined;
  readonly forMs: number;
  /** It was not cut off: it said goodbye after errors. Once its process has ended it will not try again. */
  readonly hasLeft?: boolean | undefined;
}

/** One connection's part in a use. */
export interface UseOfConnection {
  readonly use: Use;
  readonly writable: boolean;
  /** The connections of which one was cut off that this one may continue. */
  readonly tookOver: ClientConnections | undefined;
}

/** How a connection has ended. */
export interface EndOfUse {
  /** Its client said goodbye. */
  readonly isOver: boolean;
  /** ... after errors, so that it may try again. */
  readonly hadErrors: boolean;
  readonly hasWritten: boolean;
  readonly span: ConnectionSpan;
}

export class Use {
  readonly key: string;
  record: UseRecord;
  readonly writers = new ClientConnections();
  readonly readers = new ClientConnections();
  /** Of the connection that was cut off last: when, for how long the client counts since, and UseRecord's `hasLeft`. */
  lostSince: Timestamp | undefined;
  lostForMs: number;
  hasLeft = false;
  /** The write of `record` that is in flight. */
  storing?: Promise<void> | undefined;
  /** Of a client that is not exact, since it last had no writer: writers that took over, wrote nothing and left ... */
  #onlyLooked = 0;
  /** ... and whether one has written and left in order. */
  #hasWritten = false;

  constructor(key: string, record: UseRecord, lostForMs: number) {
    this.key = key;
    this.record = record;
    this.lostForMs = lostForMs;
  }

  /** A use that is known only by its record: the number of its connections does not matter. */
  static lost(key: string, record: UseRecord): Use {
    const use = new Use(key, record, record.forMs);
    (record.writable ? use.writers : use.readers).loseAll(1);
    use.lostSince = record.lostAt;
    use.hasLeft = record.hasLeft === true;
    return use;
  }

  /** Connections that are connected. */
  get live(): number {
    return this.writers.live + this.readers.live;
  }

  /** Connections that were cut off and may come back. */
  get lost(): number {
    return this.writers.lost + this.readers.lost;
  }

  get mayWrite(): boolean {
    return this.writers.live + this.writers.lost + this.#onlyLooked > 0;
  }

  /** How long the connections that were cut off still count, in ms. */
  get leftMs(): number {
    return this.lostSince ? this.lostForMs - msSince(this.lostSince) : this.lostForMs;
  }

  /** Whether the connections that were cut off still count. */
  get counts(): boolean {
    const { process } = this.record.client;
    // A process that has ended does not come back, if it only read or has left. One that could write and was cut off may have
    // been a proxy, whose client comes back through another process.
    if ((this.writers.lost === 0 || this.hasLeft) && process !== undefined && !isRunning(process)) return false;
    return this.lostSince === undefined || this.leftMs > 0;
  }

  arrive(writable: boolean): UseOfConnection {
    const { writers, readers } = this;
    // A connection that may only read cannot be a writer that was cut off.
    const tookOver = writable && writers.takeOver() ? writers : readers.takeOver() ? readers : undefined;
    (writable ? writers : readers).live++;
    return { use: this, writable, tookOver };
  }

  /** Returns whether the connection has ended in order: its client is not expected to continue it on another connection. */
  leave({ writable, tookOver }: UseOfConnection, { isOver, hadErrors, hasWritten, span }: EndOfUse): boolean {
    const { writers, readers } = this;
    const own = writable ? writers : readers;
    const { isExact } = this.record.client;
    const isInOrder = isOver && !hadErrors;
    own.live--;
    if (!isInOrder) {
      own.loseAll(1, span);
    } else if (isExact) {
      // One process: when its last connection says goodbye, its earlier lost connections will not come back. The end of a
      // connection that could only read proves nothing about the writers.
      if (own.live === 0) own.forget();
      if (this.live === 0 && writable) readers.forget();
    } else if (hasWritten) {
      this.#hasWritten = true;
    } else if (tookOver === writers) {
      this.#onlyLooked++;
    }
    // Several clients may share an address: the end of a writer that wrote nothing proves nothing about the others. If it took
    // over, it was counted above.
    const saysSomething = isExact || !writable || hasWritten;
    if (isInOrder && tookOver === undefined && saysSomething) own.leave(span);
    own.settle();
    if (writers.live === 0) {
      // Several clients may share an address: if no writer has written, they only looked, and the lost one may still write.
      if (!this.#hasWritten) writers.loseAll(this.#onlyLooked);
      else if (isInOrder) writers.forget();
      this.#onlyLooked = 0;
      this.#hasWritten = false;
    }
    return isInOrder;
  }

  /** A connection did not end in order just now: the client counts for `forMs`, or less if it said goodbye (`isOver`). */
  noteCutOff(isOver: boolean, forMs: number): void {
    this.lostSince = timestampNow();
    // If other connections were cut off, the client counts as cut off.
    this.hasLeft = isOver && (this.lost === 1 || this.hasLeft);
    this.lostForMs = this.hasLeft ? Math.min(forMs, AFTER_ERRORS_MS) : forMs;
  }

  /** The connection was refused after all: undo `arrive`. */
  withdraw({ writable, tookOver }: UseOfConnection): void {
    (writable ? this.writers : this.readers).live--;
    tookOver?.loseAll(1);
  }

  /** The connections that were cut off do not count any more. */
  forgetLost(): void {
    this.writers.forget();
    this.readers.forget();
    this.#onlyLooked = 0;
    this.lostSince = undefined;
  }

  /**
   * Bring `record` up to date. It is for the process after this one, for which every client that is connected now was cut off
   * when this process ended: `forMs` is how long such a client counts.
   */
  updateRecord(forMs: number): void {
    const isLost = this.live === 0;
    this.record = {
      ...{ ...this.record, writable: this.mayWrite, lostAt: isLost ? this.lostSince : undefined },
      ...{ forMs: isLost ? this.lostForMs : forMs, hasLeft: isLost && this.hasLeft ? true : undefined },
    };
  }
}

/** `value` was read from a store, whose content may come from anywhere. */
export function isUseRecord(value: unknown): value is UseRecord {
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
