/**
 * Moments that have ended, and that somebody may still ask for: labels that were used, and readers of NAME@now that were cut
 * off from a moment that is gone. Owns what is remembered of them, for how long and how many. A label that is remembered
 * is never given another moment; a reader is refused as long as it goes on trying.
 */
import { CatalogError } from '../vdi/catalog-error.js';
import { factKey, type StoredFacts } from '../vdi/stored-facts.js';
import { isRunning, ownKey } from '../system/process-identity.js';
import { isTimestamp, msSince, timestampNow, type Timestamp } from '../vdi/timestamp.js';
import type { Client } from '../vdi/client-use.js';

/** A used label is remembered for so long. Less than a day: whoever uses one every night has it again. */
const LABEL_MEMORY_MS = 12 * 60 * 60_000;
const MAX_LABELS_PER_DISK = 256;
const MAX_LABELS = 4096;
/** Readers of NAME@now that are remembered, of all disks. Each is an open connection, or was one a moment ago. */
const MAX_READERS = 4096;
/**
 * Longer than a client pauses between two attempts (qemu 16 s, nbdkit's retry up to 32 s): who comes sooner after having
 * been refused is the same one trying again, and would make one image of two moments.
 */
const RETRY_PAUSE_MS = 60_000;
/** Whoever goes on for longer has been told often enough. */
const MAX_REFUSING_MS = 60 * 60_000;
/** A reader that was cut off and finds the daemon again only later has given up by then, as a rule. */
const READER_MEMORY_MS = 60 * 60_000;
const LABEL_PREFIX = 'label/';
const READER_PREFIX = 'reader/';

/** What is stored of a label that was used. */
interface LabelRecord {
  readonly name: string;
  readonly tag: string;
  readonly usedAt: Timestamp;
  /** Whose it is, as long as it has not ended. */
  readonly server: string;
  readonly endedAt?: Timestamp;
  readonly why?: string;
  /** Everybody who had it open has said goodbye: nobody will come back for it. */
  readonly isOver?: boolean;
}

/** What is stored of a reader of NAME@now, while it reads. */
interface ReaderRecord {
  readonly name: string;
  readonly client: Client;
  readonly takenAt: number;
  readonly server: string;
  /** When it was cut off; a process that is killed cannot say. */
  readonly lostAt?: Timestamp;
}

interface Refusal {
  readonly reader: ReaderRecord;
  readonly why: string;
  /** How long it holds yet, and how long it has held since somebody was first refused. */
  leftMs: number;
  refusingMs: number | undefined;
}

export class EndedSnapshots {
  readonly #facts: StoredFacts;
  readonly #refusals = new Map<string, Refusal>();

  /**
   * `keptMs`: how long a reader that an earlier process left behind may come back. `readerMemoryMs`: how long that is known of
   * one that was cut off before; not less than it may come back.
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

  /** Whether time matters: then `age` is to be called. */
  get isWaiting(): boolean {
    return this.#refusals.size > 0;
  }

  /** Errors: ENDED if the label was used for a moment that has ended. */
  checkLabel(name: string, tag: string): void {
    this.#facts.refresh();
    const key = LABEL_PREFIX + factKey(name, tag);
    const record = this.#facts.get(key);
    if (!isLabelRecord(record)) return;
    if (isForgotten(record)) {
      this.#facts.putSoon(key, undefined);
      return;
    }
    const why = record.why ?? 'another daemon has it open, or had';
    const message =
      `${name}@${tag} was a moment of ${timeOf(record.usedAt.at)} that has ended (${why}). A label stands for one moment and ` +
      'one run; begin anew with another label';
    throw new CatalogError('ENDED', message);
  }

  /**
   * The label is about to stand for a moment. When it resolves, it never stands for another, whatever becomes of this process.
   * Errors: LIMIT if too many are remembered; those of the store.
   */
  async useLabel(name: string, tag: string): Promise<void> {
    if (!this.#facts.isDurable) {
      throw new CatalogError(
        'ENDED',
        `${name}@${tag} is refused, for it could not be remembered that it was used (see the log of the daemon's start); ` +
          `${name}@now makes do without`,
      );
    }
    this.#makeRoom(name);
    const record: LabelRecord = { name, tag, usedAt: timestampNow(), server: ownKey };
    await this.#facts.put(LABEL_PREFIX + factKey(name, tag), record);
  }

  /** The moment of a label is gone. `isOver`: nobody comes back for it. */
  labelEnded(name: string, tag: string, why: string, isOver: boolean): void {
    const key = LABEL_PREFIX + factKey(name, tag);
    const record = this.#facts.get(key);
    if (!isLabelRecord(record)) return; // commands of ours only
    this.#facts.putSoon(key, { ...record, endedAt: timestampNow(), why, isOver });
  }

  /** Everybody who was about to read the moment of this label was refused: it may stand for another. */
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
    // Only those go for which nobody can come back; else somebody would get another moment.
    const oldest = full.filter(([, { isOver }]) => isOver).sort(([, a], [, b]) => a.usedAt.at - b.usedAt.at)[0];
    if (oldest) {
      this.#facts.putSoon(oldest[0], undefined);
      return;
    }
    throw new CatalogError(
      'LIMIT',
      `${full.length} labels of ${full === ofDisk ? name : 'this store'} were used within ` +
        `${LABEL_MEMORY_MS / 3_600_000} hours whose clients may come back, and no more can be remembered; ${name}@now makes do without`,
    );
  }

  /** Errors: ENDED if this client was reading a NAME@now that has ended. `isOpening`: else it only asks. */
  checkReader(name: string, client: Client, isOpening: boolean): void {
    const refusal = this.#refusals.get(readerKey(name, client));
    if (!refusal) return;
    const { reader, why } = refusal;
    const another = client.isExact ? 'from another process, ' : '';
    const message =
      `${name}@now of ${timeOf(reader.takenAt)}, which ${client.label} was reading, has ended (${why}); going on with another ` +
      `moment would make one image of two. Begin anew ${another}under a label (${name}@now:LABEL), or after a pause of ` +
      `${RETRY_PAUSE_MS / 1000} s`;
    if (isOpening) {
      refusal.refusingMs ??= 0;
      refusal.leftMs = RETRY_PAUSE_MS;
    }
    throw new CatalogError('ENDED', message);
  }

  /** The client is about to read. When it resolves, it is known after a restart. */
  async reads(name: string, client: Client, takenAt: number): Promise<void> {
    const key = readerKey(name, client);
    const known = this.#facts.get(key);
    if (isReaderRecord(known) && known.server === ownKey && known.takenAt === takenAt && !known.lostAt) return;
    const record: ReaderRecord = { name, client, takenAt, server: ownKey };
    await this.#facts.put(key, record);
  }

  /** The client was cut off, and none of its connections reads on. */
  readerLost(name: string, client: Client): void {
    const key = readerKey(name, client);
    const known = this.#facts.get(key);
    if (isReaderRecord(known)) this.#facts.putSoon(key, { ...known, lostAt: timestampNow() });
  }

  /** The client has left in order, or its time has passed. */
  hasRead(name: string, client: Client): void {
    this.#facts.putSoon(readerKey(name, client), undefined);
  }

  /** What the client was reading is gone, and it may come back within `keptMs`. */
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

  /** So much time has passed, in which clients could have come. */
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
