/**
 * Temporary snapshots that have ended and that clients may still ask for: labels that were used, and readers of NAME@now that
 * were cut off from a snapshot that is gone. Owns what is remembered of them, for how long and how many. A label that is
 * remembered never gets another snapshot; a reader is refused as long as it keeps trying.
 */
import { CatalogError } from '../vdi/catalog-error.js';
import { factKey, type StoredFacts } from '../vdi/stored-facts.js';
import { isRunning, ownKey } from '../system/process-identity.js';
import { isTimestamp, msSince, timestampNow, type Timestamp } from '../vdi/timestamp.js';
import type { Client } from '../vdi/client-use.js';

/** How long a used label is remembered. Less than a day: a job that uses the same label every night gets it again. */
const LABEL_MEMORY_MS = 12 * 60 * 60_000;
const MAX_LABELS_PER_DISK = 256;
const MAX_LABELS = 4096;
/** Readers of NAME@now that are remembered, of all disks. Each has an open connection, or had one a short time ago. */
const MAX_READERS = 4096;
/**
 * Longer than clients pause between two attempts (qemu 16 s, nbdkit's retry up to 32 s): a client that comes sooner after it was
 * refused is trying again, and would make one image of two snapshots.
 */
const RETRY_PAUSE_MS = 60_000;
/** A client that keeps trying for longer than this is refused no more. */
const MAX_REFUSING_MS = 60 * 60_000;
/** A reader that finds the daemon again only after this time has usually given up. */
const READER_MEMORY_MS = 60 * 60_000;
const LABEL_PREFIX = 'label/';
const READER_PREFIX = 'reader/';

/** What is stored of a label that was used. */
interface LabelRecord {
  readonly name: string;
  readonly tag: string;
  readonly usedAt: Timestamp;
  /** The process that serves it, as long as it has not ended. */
  readonly server: string;
  readonly endedAt?: Timestamp;
  readonly why?: string;
  /** All clients that had it open have said goodbye: none will come back for it. */
  readonly isOver?: boolean;
}

/** What is stored of a reader of NAME@now, while it reads. */
interface ReaderRecord {
  readonly name: string;
  readonly client: Client;
  readonly takenAt: number;
  readonly server: string;
  /** When it was cut off; undefined if its server was killed. */
  readonly lostAt?: Timestamp;
}

interface Refusal {
  readonly reader: ReaderRecord;
  readonly why: string;
  /** How long the refusal still holds, and for how long clients have been refused by it, in ms. */
  leftMs: number;
  refusingMs: number | undefined;
}

export class EndedSnapshots {
  readonly #facts: StoredFacts;
  readonly #refusals = new Map<string, Refusal>();

  /**
   * `keptMs`: how long a reader of an earlier process may come back. `readerMemoryMs`: how long a reader that was cut off before
   * is remembered; at least `keptMs`.
   */
  constructor(facts: StoredFacts, keptMs: number, readerMemoryMs = READER_MEMORY_MS) {
    const rememberedMs = Math.max(readerMemoryMs, keptMs);
    this.#facts = facts;
    for (const [key, value] of [...facts.entries(LABEL_PREFIX)]) {
      if (!isLabelRecord(value)) continue;
      if (value.endedAt || value.server === ownKey || (facts.isShared && isRunning(value.server))) continue;
      facts.putSoon(key, { ...value, endedAt: timestampNow(), why: 'the daemon ended' });
    }
    for (const [key, value] of [...facts.entries(READER_PREFIX)]) {
      if (!isReaderRecord(value) || value.server === ownKey || (facts.isShared && isRunning(value.server))) continue;
      if (value.lostAt && msSince(value.lostAt) >= rememberedMs) {
        facts.putSoon(key, undefined);
        continue;
      }
      if (!value.lostAt) facts.putSoon(key, { ...value, lostAt: timestampNow() });
      this.#refuse(key, value, 'the daemon ended', keptMs);
    }
  }

  /** Whether the caller must call `age`. */
  get isWaiting(): boolean {
    return this.#refusals.size > 0;
  }

  /** Errors: ENDED (the label was used for a snapshot that has ended). */
  checkLabel(name: string, tag: string): void {
    this.#facts.refresh();
    const key = LABEL_PREFIX + factKey(name, tag);
    const record = this.#facts.get(key);
    if (!isLabelRecord(record)) return;
    if (isForgotten(record)) {
      this.#facts.putSoon(key, undefined);
      return;
    }
    const why = record.why ?? 'another daemon has opened it';
    const message =
      `${name}@${tag} was a temporary snapshot of ${timeOf(record.usedAt.at)} that has ended (${why}); a label is for one ` +
      'snapshot and one run: start again with another label';
    throw new CatalogError('ENDED', message);
  }

  /**
   * The label is used for a snapshot. Once it resolves, the label never gets another, even if this process is killed. Errors:
   * LIMIT (too many labels are remembered), ENDED (nothing can be stored), those of the store.
   */
  async useLabel(name: string, tag: string): Promise<void> {
    if (!this.#facts.isDurable) {
      throw new CatalogError(
        'ENDED',
        `${name}@${tag} is refused, because used labels cannot be stored here (the log of the daemon's start says why); ` +
          `${name}@now needs no label`,
      );
    }
    this.#makeRoom(name);
    const record: LabelRecord = { name, tag, usedAt: timestampNow(), server: ownKey };
    await this.#facts.put(LABEL_PREFIX + factKey(name, tag), record);
  }

  /** The snapshot of a label is gone. `isOver`: no client comes back for it. */
  labelEnded(name: string, tag: string, why: string, isOver: boolean): void {
    const key = LABEL_PREFIX + factKey(name, tag);
    const record = this.#facts.get(key);
    if (!isLabelRecord(record)) return; // only our own commands had it
    this.#facts.putSoon(key, { ...record, endedAt: timestampNow(), why, isOver });
  }

  /** All clients that were about to read the snapshot of this label were refused: the label may get another. */
  labelUnused(name: string, tag: string): void {
    this.#facts.putSoon(LABEL_PREFIX + factKey(name, tag), undefined);
  }

  #makeRoom(name: string): void {
    const all: [string, LabelRecord][] = [];
    for (const [key, value] of [...this.#facts.entries(LABEL_PREFIX)]) {
      if (!isLabelRecord(value) || isForgotten(value)) this.#facts.putSoon(key, undefined);
      else all.push([key, value]);
    }
    const ofDisk = all.filter(([, record]) => record.name === name);
    const full = ofDisk.length >= MAX_LABELS_PER_DISK ? ofDisk : all.length >= MAX_LABELS ? all : undefined;
    if (!full) return;
    // Only a label that no client comes back for is forgotten: else a client would get another snapshot.
    const oldest = full.filter(([, { isOver }]) => isOver).sort(([, a], [, b]) => a.usedAt.at - b.usedAt.at)[0];
    if (oldest) {
      this.#facts.putSoon(oldest[0], undefined);
      return;
    }
    throw new CatalogError(
      'LIMIT',
      `${full.length} labels of ${full === ofDisk ? name : 'this store'} are remembered, because their clients may come back, ` +
        `and no more can be; each is forgotten ${LABEL_MEMORY_MS / 3_600_000} hours after its end; ${name}@now needs no label`,
    );
  }

  /** `isOpening`: it opens the snapshot, and does not only ask. Errors: ENDED (this client was reading a NAME@now that has ended). */
  checkReader(name: string, client: Client, isOpening: boolean): void {
    const refusal = this.#refusals.get(readerKey(name, client));
    if (!refusal) return;
    const { reader, why } = refusal;
    const another = client.isExact ? 'from another process, ' : '';
    const message =
      `${name}@now of ${timeOf(reader.takenAt)}, which ${client.label} was reading, has ended (${why}); to continue with ` +
      `another snapshot would mix two points in time in one image: start again ${another}under a label (${name}@now:LABEL), or ` +
      `after a pause of ${RETRY_PAUSE_MS / 1000} s`;
    if (isOpening) {
      refusal.refusingMs ??= 0;
      refusal.leftMs = RETRY_PAUSE_MS;
    }
    throw new CatalogError('ENDED', message);
  }

  /** The client is about to read. Once it resolves, that is known after a restart. */
  async reads(name: string, client: Client, takenAt: number): Promise<void> {
    const key = readerKey(name, client);
    const known = this.#facts.get(key);
    if (isReaderRecord(known) && known.server === ownKey && known.takenAt === takenAt && !known.lostAt) return;
    const record: ReaderRecord = { name, client, takenAt, server: ownKey };
    await this.#facts.put(key, record);
  }

  /** The client was cut off, and has no other connection that reads. */
  readerLost(name: string, client: Client): void {
    const key = readerKey(name, client);
    const known = this.#facts.get(key);
    if (isReaderRecord(known)) this.#facts.putSoon(key, { ...known, lostAt: timestampNow() });
  }

  /** The client has left in order, or the time in which it may come back has passed. */
  hasRead(name: string, client: Client): void {
    this.#facts.putSoon(readerKey(name, client), undefined);
  }

  /** The snapshot that the client was reading is gone; the client may come back within `keptMs`. */
  readerEnded(name: string, client: Client, takenAt: number, why: string, keptMs: number): void {
    const key = readerKey(name, client);
    if (this.#refusals.size >= MAX_READERS && !this.#refusals.has(key)) {
      const [first] = this.#refusals.keys();
      if (first !== undefined) this.#forget(first);
    }
    this.#refuse(key, { name, client, takenAt, server: ownKey }, why, keptMs);
  }

  #refuse(key: string, reader: ReaderRecord, why: string, keptMs: number): void {
    this.#refusals.set(key, { reader, why, leftMs: Math.max(keptMs, RETRY_PAUSE_MS), refusingMs: undefined });
  }

  /** `ms` have passed in which clients could have come back. */
  age(ms: number): void {
    for (const [key, refusal] of [...this.#refusals]) {
      refusal.leftMs -= ms;
      if (refusal.refusingMs !== undefined) refusal.refusingMs += ms;
      if (refusal.leftMs > 0 && (refusal.refusingMs ?? 0) < MAX_REFUSING_MS) continue;
      this.#forget(key);
    }
  }

  #forget(key: string): void {
    this.#refusals.delete(key);
    this.#facts.putSoon(key, undefined);
  }
}

function readerKey(name: string, client: Client): string {
  return READER_PREFIX + factKey(name, client.id);
}

function isForgotten({ endedAt }: LabelRecord): boolean {
  return endedAt !== undefined && msSince(endedAt) >= LABEL_MEMORY_MS;
}

function timeOf(ms: number): string {
  return new Date(ms).toISOString().replace(/\.\d+/, '');
}

function isLabelRecord(value: unknown): value is LabelRecord {
  const { name, tag, usedAt, server, endedAt } = (value ?? {}) as Partial<LabelRecord>;
  return (
    typeof name === 'string' &&
    typeof tag === 'string' &&
    isTimestamp(usedAt) &&
    typeof server === 'string' &&
    (endedAt === undefined || isTimestamp(endedAt))
  );
}

function isReaderRecord(value: unknown): value is ReaderRecord {
  const { name, client, takenAt, server, lostAt } = (value ?? {}) as Partial<ReaderRecord>;
  return (
    typeof name === 'string' &&
    typeof client?.id === 'string' &&
    typeof client.label === 'string' &&
    Number.isFinite(takenAt) &&
    typeof server === 'string' &&
    (lostAt === undefined || isTimestamp(lostAt))
  );
}
