/**
 * The life of the temporary snapshots NAME@now and NAME@now:LABEL: taken when the first connection asks for one, shared by all
 * that have it open at the same time, dropped when the last one has left in order. A client that was cut off may come back,
 * and must find the same snapshot: otherwise its image would be of two points in time. So the snapshot is kept until the client
 * comes back, or its time has passed. Owns that time, and how many are kept. What is remembered of snapshots that have ended:
 * ended-snapshots.ts.
 */
import type { Peer } from 'nbd-server-ts';
import { CatalogError } from '../vdi/catalog-error.js';
import type { VdiCatalog } from '../vdi/catalog.js';
import type { Client } from '../vdi/client-use.js';
import type { TemporaryKeeper } from '../vdi/kept-snapshots.js';
import type { Log } from '../vdi/log.js';
import { NameQueue } from '../vdi/name-queue.js';
import { isLabelled, isLabelOfRun } from '../vdi/names.js';
import type { Vdi } from '../vdi/vdi.js';
import { clientMessage } from './client-messages.js';
import { EndedSnapshots } from './ended-snapshots.js';
import { Reader, TakenSnapshots, TemporarySnapshot, type EndOfReading } from './temporary-snapshot.js';

/** How long a client that was cut off may come back by default: the reconnect delay that docs/clients.md names. */
export const DEFAULT_KEEP_MS = 300_000;
/** Snapshots without a connection; a cluster has room for MAX_SHADOWS of a disk altogether. */
const MAX_KEPT_PER_DISK = 4;
const MAX_KEPT_PER_CLIENT = 16;
/** Clients of one snapshot that read it or may come back. */
const MAX_READERS = 1024;
/** Of NAME@now without a label. */
const PLAIN_TAG = 'now';
const TICK_MS = 1_000;
const MIN_TICK_MS = 50;
/** A process that was stopped, or a machine that slept, served nobody meanwhile: no tick counts for more than this many. */
const MAX_TICKS_AT_ONCE = 2;

export interface TemporaryOptions {
  readonly keepMs?: number | undefined;
  /** How many are kept at a time, of all disks and clients: each has files open, and no connection counts them. */
  readonly maxKept?: number | undefined;
  /** Clients can connect: their time passes. */
  readonly serves?: boolean | undefined;
  /** How long the next process remembers a reader that was cut off; see ended-snapshots.ts. */
  readonly readerMemoryMs?: number | undefined;
  readonly log?: Log | undefined;
}

/** A temporary snapshot that one connection holds. */
export interface HeldSnapshot {
  readonly vdi: Vdi;
  readonly snapshot: TemporarySnapshot;
  readonly client: Client | undefined;
  /** The connection may continue one that was cut off. */
  tookOver: boolean;
}

export class TemporarySnapshots implements TemporaryKeeper {
  readonly #catalog: VdiCatalog;
  readonly #keepMs: number;
  readonly #maxKept: number;
  readonly #log: Log;
  readonly #serves: boolean;
  readonly #ended: EndedSnapshots;
  readonly #taken = new TakenSnapshots();
  /** The snapshot that was described to a connection, by its peer: the connection opens the same one. */
  readonly #asked = new Map<Peer, HeldSnapshot>();
  /** By NAME@TAG: opening and closing. */
  readonly #queue = new NameQueue();
  #ticking: NodeJS.Timeout | undefined;
  #tickedAt = 0;

  constructor(catalog: VdiCatalog, options: TemporaryOptions = {}) {
    this.#catalog = catalog;
    this.#keepMs = options.keepMs ?? DEFAULT_KEEP_MS;
    this.#maxKept = options.maxKept ?? Infinity;
    this.#log = options.log ?? (() => undefined);
    this.#serves = options.serves ?? false;
    this.#ended = new EndedSnapshots(catalog.facts, this.#keepMs, options.readerMemoryMs);
    catalog.keeper = this;
    this.#tickIfNeeded();
  }

  /** Every open needs one `close`. Errors: ENDED (the client would get another snapshot than before), those of the catalog. */
  open(name: string, tag: string, peer: Peer, client: Client | undefined): Promise<HeldSnapshot> {
    return this.#queue.run([`${name}@${tag}`], async () => {
      const asked = this.#asked.get(peer);
      const isAsked = asked?.snapshot.name === name && asked.snapshot.tag === tag;
      if (isAsked) this.#asked.delete(peer);
      const held = isAsked ? asked : await this.#hold(name, tag, client, true);
      const { snapshot } = held;
      snapshot.askers--;
      snapshot.users++;
      try {
        held.tookOver = await this.#arrive(snapshot, client);
        return held;
      } catch (error) {
        snapshot.users--;
        await this.#release(held).catch(() => undefined);
        throw error;
      }
    });
  }

  /** What `open` on the same connection will give. It is held until then, or until the connection is over: see `left`. */
  ask(name: string, tag: string, peer: Peer, client: Client | undefined): Promise<Vdi> {
    return this.#queue.run([`${name}@${tag}`], async () => {
      const asked = this.#asked.get(peer);
      if (asked?.snapshot.name === name && asked.snapshot.tag === tag) return asked.vdi;
      // One for each connection: else a connection that asks for many labels would hold as many snapshots.
      if (asked) this.left(peer);
      const held = await this.#hold(name, tag, client, false);
      this.#asked.set(peer, held);
      return held.vdi;
    });
  }

  /** The connection is over. */
  left(peer: Peer): void {
    const held = this.#asked.get(peer);
    if (!held) return;
    this.#asked.delete(peer);
    const { spec } = held.snapshot;
    this.#queue
      .run([spec], () => {
        held.snapshot.askers--;
        return this.#release(held);
      })
      .catch((error: unknown) => this.#log(`${spec} could not be dropped`, { err: error }));
  }

  close(held: HeldSnapshot, end: EndOfReading): Promise<void> {
    const { snapshot, client } = held;
    return this.#queue.run([snapshot.spec], async () => {
      snapshot.users--;
      if (!end.isRefused) snapshot.hasBeenRead = true;
      const reader = client && snapshot.readers.get(client.id);
      if (reader) this.#leave(held, reader, end);
      await this.#release(held);
    });
  }

  #leave({ snapshot, tookOver }: HeldSnapshot, reader: Reader, end: EndOfReading): void {
    reader.leave(tookOver, end, this.#keepMs);
    const { client, connections } = reader;
    if (connections.live > 0) return;
    if (connections.lost === 0) this.#forgetReader(snapshot, reader);
    // If the client still reads another NAME@now, the end of this process would cut it off from that one.
    else if (!isLabelled(snapshot.tag) && !this.#reads(snapshot.name, client))
      this.#ended.readerLost(snapshot.name, client);
  }

  /** One of its connections has a snapshot NAME@now open. */
  #reads(name: string, client: Client): boolean {
    const snapshots = this.#taken.of(`${name}@${PLAIN_TAG}`);
    return snapshots.some(({ readers }) => (readers.get(client.id)?.connections.live ?? 0) > 0);
  }

  kept(vid: number): { readonly client: string; readonly until: number } | undefined {
    const snapshot = this.#taken.byVid(vid);
    if (!snapshot || snapshot.isHeld) return undefined;
    const { away } = snapshot;
    if (away.length === 0) return undefined;
    const client = away.map((reader) => reader.client.label).join(', ');
    // eslint-disable-next-line no-restricted-syntax -- a time of day, for people
    return { client, until: Date.now() + Math.max(...away.map(({ leftMs }) => leftMs)) };
  }

  dropped(vid: number, why: string): void {
    const snapshot = this.#taken.byVid(vid);
    if (snapshot) this.#noteGone(snapshot, why);
  }

  /** The snapshot that is open or kept, or is taken now; with one more user in the catalog, and one more asker. */
  async #hold(name: string, tag: string, client: Client | undefined, isOpening: boolean): Promise<HeldSnapshot> {
    const known = this.#taken.find(name, tag, client);
    if (known) {
      if (client && !isLabelled(tag)) this.#ended.checkReader(name, client, isOpening);
      // Counted before the wait, so that nothing ends it meanwhile.
      known.askers++;
      try {
        return { snapshot: known, client, vdi: await this.#catalog.openTemporary(known.vid), tookOver: false };
      } catch (error) {
        known.askers--;
        throw error;
      }
    }
    if (isLabelled(tag)) this.#ended.checkLabel(name, tag);
    else if (client) this.#ended.checkReader(name, client, isOpening);
    const { vid } = await this.#take(name, tag);
    let vdi: Vdi;
    try {
      vdi = await this.#catalog.openTemporary(vid);
    } catch (error) {
      await this.#catalog.dropTemporary(name, tag, vid).catch((failure: unknown) => {
        this.#log(`${name}@${tag} could not be dropped`, { err: failure });
      });
      throw error;
    }
    const snapshot = new TemporarySnapshot(name, tag, vdi);
    this.#taken.add(snapshot);
    return { snapshot, client, vdi, tookOver: false };
  }

  /**
   * Connected clients have precedence over clients that may come back. Does not queue for the snapshots that it ends: an
   * operation on another label of the disk may be waiting for this one. It need not: a snapshot that is about to be opened has an
   * asker.
   */
  async #take(name: string, tag: string): Promise<{ readonly vid: number }> {
    for (;;) {
      try {
        return await this.#catalog.snapshotTemporary(name, tag);
      } catch (error) {
        const oldest = this.#taken.kept().find((snapshot) => snapshot.name === name);
        if ((error as { code?: string }).code !== 'LIMIT' || !oldest) throw error;
        await this.#endIfKept(oldest, `${name} has as many temporary snapshots as it can have`);
      }
    }
  }

  /**
   * A connection of this client has opened the snapshot. That is stored before the client gets an answer. Returns whether the
   * connection may be one that was cut off.
   */
  async #arrive(snapshot: TemporarySnapshot, client: Client | undefined): Promise<boolean> {
    const { name, tag, takenAt, readers } = snapshot;
    if (client && !readers.has(client.id) && readers.size >= MAX_READERS) {
      throw new CatalogError('LIMIT', `${name}@${tag} has ${MAX_READERS} readers, and no more are possible`);
    }
    if (!isLabelled(tag)) {
      if (client) await this.#ended.reads(name, client, takenAt);
    } else if (!snapshot.isRemembered && (client || !isLabelOfRun(tag))) {
      // Also for our own commands, since the user chose the label; but not a label drawn for one run, which never comes again.
      await this.#ended.useLabel(name, tag);
      snapshot.isRemembered = true;
    }
    if (!client) return false;
    let reader = readers.get(client.id);
    if (!reader) readers.set(client.id, (reader = new Reader(client)));
    return reader.arrive();
  }

  /** The connection does not hold it any more. */
  async #release({ snapshot, vdi }: HeldSnapshot): Promise<void> {
    // Nothing may end it before it is closed.
    snapshot.askers++;
    try {
      await this.#catalog.release(vdi);
    } finally {
      snapshot.askers--;
      await this.#settle(snapshot);
    }
  }

  /** Keep it or drop it, if no connection has it. */
  async #settle(snapshot: TemporarySnapshot): Promise<void> {
    this.#tickIfNeeded();
    if (snapshot.isHeld || !this.#taken.has(snapshot)) return;
    for (const reader of snapshot.readers.values()) if (snapshot.isGone(reader)) reader.connections.forget();
    const { away } = snapshot;
    if (away.length === 0) return this.#end(snapshot, 'it was read to its end', true);
    const { failure } = snapshot.vdi;
    if (failure) return this.#end(snapshot, clientMessage(failure));
    if (this.#keepMs === 0) return this.#end(snapshot, 'its client was cut off');
    const kept = this.#taken.kept();
    const ofDisk = kept.filter(({ name }) => name === snapshot.name);
    this.#endOldestOver(MAX_KEPT_PER_DISK, ofDisk, 'too many of its disk were kept');
    this.#endOldestOver(this.#maxKept, kept, 'too many were kept');
    for (const { client } of away) {
      const ofClient = kept.filter(({ readers }) => readers.get(client.id)?.isAway);
      this.#endOldestOver(MAX_KEPT_PER_CLIENT, ofClient, 'too many of its client were kept');
    }
  }

  #endOldestOver(limit: number, [oldest, ...others]: readonly TemporarySnapshot[], why: string): void {
    if (oldest !== undefined && others.length >= limit) this.#endSoon(oldest, why);
  }

  /** Once the operation on it that is in flight has ended. */
  #endSoon(snapshot: TemporarySnapshot, why: string | undefined): void {
    const { spec } = snapshot;
    this.#queue
      .run([spec], () => this.#endIfKept(snapshot, why))
      .catch((error: unknown) => this.#log(`${spec} could not be dropped`, { err: error }));
  }

  /** If no connection has it. Without a `why`, only if no client is expected back, or it cannot be read any more. */
  async #endIfKept(snapshot: TemporarySnapshot, why: string | undefined): Promise<void> {
    if (snapshot.isHeld || !this.#taken.has(snapshot)) return;
    const { failure } = snapshot.vdi;
    // The clients that come back get these words.
    const failed = failure && clientMessage(failure);
    const isAwaited = snapshot.away.length > 0;
    const because = why ?? (isAwaited ? failed : 'its client was cut off and did not come back in time');
    if (because !== undefined) await this.#end(snapshot, because);
  }

  /** Drop it. `isOver`: no client comes back for it. */
  async #end(snapshot: TemporarySnapshot, why: string, isOver = false): Promise<void> {
    if (!this.#taken.has(snapshot)) return;
    this.#noteGone(snapshot, why, isOver);
    await this.#catalog.dropTemporary(snapshot.name, snapshot.tag, snapshot.vid);
  }

  #noteGone(snapshot: TemporarySnapshot, why: string, isOver = false): void {
    const { name, tag, takenAt } = snapshot;
    this.#taken.remove(snapshot);
    if (isLabelled(tag)) {
      if (snapshot.isRemembered && snapshot.hasBeenRead) {
        this.#ended.labelEnded(name, tag, why, isOver && !snapshot.hasLateReader);
      } else if (snapshot.isRemembered) {
        this.#ended.labelUnused(name, tag);
      }
      return;
    }
    for (const reader of [...snapshot.readers.values()]) {
      if (reader.isAway) this.#ended.readerEnded(name, reader.client, takenAt, why, reader.leftMs);
      else this.#forgetReader(snapshot, reader);
    }
    this.#tickIfNeeded();
  }

  /** The client does not read this snapshot any more. */
  #forgetReader({ name, tag, spec, readers }: TemporarySnapshot, { client }: Reader): void {
    readers.delete(client.id);
    if (isLabelled(tag)) return;
    const readsOn = this.#taken.of(spec).some((other) => other.readers.has(client.id));
    if (!readsOn) this.#ended.hasRead(name, client);
  }

  #isWaiting(): boolean {
    return this.#ended.isWaiting || this.#taken.hasAway;
  }

  #tickIfNeeded(): void {
    if (!this.#serves || this.#ticking !== undefined || !this.#isWaiting()) return;
    this.#tickedAt = performance.now();
    const period = Math.min(TICK_MS, Math.max(MIN_TICK_MS, this.#keepMs / 4));
    this.#ticking = setInterval(() => this.#tick(period), period).unref();
  }

  /** Time passes for clients that may come back, by a clock that nobody sets. */
  #tick(period: number): void {
    const now = performance.now();
    const passed = Math.min(now - this.#tickedAt, MAX_TICKS_AT_ONCE * period);
    this.#tickedAt = now;
    this.#ended.age(passed);
    for (const snapshot of this.#taken.all()) {
      for (const reader of snapshot.away) {
        const { connections } = reader;
        reader.leftMs -= passed;
        if (reader.leftMs <= 0) snapshot.hasLateReader = true;
        if (reader.leftMs <= 0 || snapshot.isGone(reader)) connections.forget();
        if (connections.lost === 0 && connections.live === 0) this.#forgetReader(snapshot, reader);
      }
      if (!snapshot.isHeld) this.#endSoon(snapshot, undefined);
    }
    if (this.#isWaiting()) return;
    clearInterval(this.#ticking);
    this.#ticking = undefined;
  }
}
