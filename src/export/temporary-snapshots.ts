/**
 * The life of NAME@now and NAME@now:LABEL: taken when the first connection asks for it, shared by all that have it open at
 * the same time, dropped when the last one has left in order. A client that was cut off may come back and must find the same
 * moment, or else its image would be of two: until it does, or its time has passed, the moment is kept. Owns the counts
 * and that time; what a snapshot is, the catalog knows, and ended-moments.ts what is remembered when it is gone.
 */
import type { Ending, Peer } from 'nbd-server-ts';
import { CatalogError } from '../vdi/catalog-error.js';
import type { VdiCatalog } from '../vdi/catalog.js';
import type { TemporaryKeeper } from '../vdi/kept-snapshots.js';
import { ClientConnections, type ConnectionSpan } from '../vdi/client-connections.js';
import type { Client } from '../vdi/client-use.js';
import { isLabelled, isLabelOfRun } from '../vdi/names.js';
import { isRunning } from '../system/process-identity.js';
import type { Vdi } from '../vdi/vdi.js';
import { EndedSnapshots } from './ended-snapshots.js';
import { clientMessage } from './client-messages.js';

/** How long a client that was cut off may come back, unless told otherwise: the reconnect delay that docs/clients.md names. */
export const DEFAULT_KEEP_MS = 300_000;
/** Moments without a connection; a cluster has room for MAX_SHADOWS of a disk altogether. */
const MAX_KEPT_PER_DISK = 4;
const MAX_KEPT_PER_CLIENT = 16;
/** Clients of one moment that read it or may come back. */
const MAX_READERS = 1024;
/** Of NAME@now without a label. */
const PLAIN_TAG = 'now';
const TICK_MS = 1_000;
const MIN_TICK_MS = 50;
/** A process that was stopped, or a machine that slept, served nobody meanwhile: no tick counts for more than this many. */
const MAX_TICKS_AT_ONCE = 2;

export interface TemporaryOptions {
  readonly keepMs?: number | undefined;
  /** Kept at a time for whoever was cut off, of all disks and clients: each has files open, and no connection counts them. */
  readonly maxKept?: number | undefined;
  /** Clients can come: their time passes. */
  readonly serves?: boolean | undefined;
  /** How long a reader that was cut off is remembered by the next process; see ended-moments.ts. */
  readonly readerMemoryMs?: number | undefined;
  readonly log?: ((line: string, details?: object) => void) | undefined;
}

/** One client of a moment. */
interface Reader {
  readonly client: Client;
  readonly connections: ClientConnections;
  /** How long those that were cut off may yet come back. */
  leftMs: number;
  /** Its last connection has said goodbye, while others of it were cut off and may come back. */
  hasLeft: boolean;
}

interface Moment {
  readonly name: string;
  readonly tag: string;
  readonly vid: number;
  readonly takenAt: number;
  readonly vdi: Vdi;
  /** ClientConnections that have it open, and those that were told of it and have not opened it. */
  users: number;
  askers: number;
  /** Its label is remembered to have been used. */
  isRemembered: boolean;
  /** The time of somebody who was cut off has passed: he may ask for it yet. */
  hasLateReader: boolean;
  /** Somebody has had it, and was not refused after all. */
  hasBeenRead: boolean;
  /** The snapshots that it was compared with, by tag: another one of that tag would tell of other changes. */
  readonly bases: Map<string, number>;
  readonly readers: Map<string, Reader>;
}

/** A moment that one connection holds. */
export interface HeldMoment {
  readonly vdi: Vdi;
  readonly moment: Moment;
  readonly client: Client | undefined;
  /** It may be one that was cut off, come back. */
  tookOver: boolean;
}

/** How a connection's part in a moment ends. */
export interface EndOfReading {
  readonly ending: Ending;
  /** The client was told that something could not be read, and may try that again. */
  readonly hadErrors: boolean;
  /** It was refused after all: all is as if it had not come. */
  readonly isRefused: boolean;
  readonly span: ConnectionSpan;
}

export class TemporarySnapshots implements TemporaryKeeper {
  readonly #catalog: VdiCatalog;
  readonly #keepMs: number;
  readonly #maxKept: number;
  readonly #log: (line: string, details?: object) => void;
  readonly #serves: boolean;
  readonly #ended: EndedSnapshots;
  /** By NAME@TAG, the oldest first: of a label there is one at most. */
  readonly #moments = new Map<string, Moment[]>();
  /** What a connection was told of, by its peer: it opens the same. */
  readonly #asked = new Map<Peer, HeldMoment>();
  /** By NAME@TAG: opening and closing it, one after the other. */
  readonly #queues = new Map<string, Promise<void>>();
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

  /** Every open needs one `close`. Errors: ENDED if there would be another moment than before, and those of the catalog. */
  open(name: string, tag: string, peer: Peer, client: Client | undefined): Promise<HeldMoment> {
    return this.#alone(`${name}@${tag}`, async () => {
      const asked = this.#asked.get(peer);
      const isAsked = asked?.moment.name === name && asked.moment.tag === tag;
      if (isAsked) this.#asked.delete(peer);
      const held = isAsked ? asked : await this.#hold(name, tag, client, true);
      const { moment } = held;
      moment.askers--;
      moment.users++;
      try {
        held.tookOver = await this.#arrive(moment, client);
        return held;
      } catch (error) {
        moment.users--;
        await this.#letGo(held).catch(() => undefined);
        throw error;
      }
    });
  }

  /** What `open` on the same connection gives. It is held until then, or until the connection is over: see `left`. */
  ask(name: string, tag: string, peer: Peer, client: Client | undefined): Promise<Vdi> {
    return this.#alone(`${name}@${tag}`, async () => {
      const asked = this.#asked.get(peer);
      if (asked?.moment.name === name && asked.moment.tag === tag) return asked.vdi;
      // One for each connection: else one that asks for many labels would hold as many snapshots.
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
    const { name, tag } = held.moment;
    this.#alone(`${name}@${tag}`, () => {
      held.moment.askers--;
      return this.#letGo(held);
    }).catch((error: unknown) => this.#log(`${name}@${tag} could not be dropped`, { err: error }));
  }

  close(held: HeldMoment, end: EndOfReading): Promise<void> {
    const { moment, client } = held;
    return this.#alone(`${moment.name}@${moment.tag}`, async () => {
      moment.users--;
      if (!end.isRefused) moment.hasBeenRead = true;
      const reader = client && moment.readers.get(client.id);
      if (reader) this.#leave(held, reader, end);
      await this.#letGo(held);
    });
  }

  #leave({ moment, tookOver }: HeldMoment, reader: Reader, { ending, hadErrors, isRefused, span }: EndOfReading): void {
    const { connections, client } = reader;
    connections.live--;
    const isCutOff = !isRefused && (ending === 'lost' || hadErrors);
    if (isCutOff) {
      connections.loseAll(1, span);
      reader.leftMs = this.#keepMs;
    } else if (isRefused) {
      // Who was refused has been away for as long as before.
      if (tookOver) connections.loseAll(1);
    } else if (!tookOver) {
      connections.leave(span);
    }
    connections.settle();
    if (connections.live > 0) return;
    if (connections.lost === 0) {
      this.#forgetReader(moment, reader);
      return;
    }
    // Those of one process may work side by side: what was cut off comes back though the others are done.
    if (!isCutOff && !isRefused) reader.hasLeft = true;
    // As long as one reads, the end of this process would cut it off just then.
    if (!isLabelled(moment.tag) && !this.#reads(moment.name, client)) this.#ended.readerLost(moment.name, client);
  }

  /** One of its connections has a moment of NAME@now open. */
  #reads(name: string, client: Client): boolean {
    const moments = this.#moments.get(`${name}@${PLAIN_TAG}`) ?? [];
    return moments.some(({ readers }) => (readers.get(client.id)?.connections.live ?? 0) > 0);
  }

  kept(vid: number): { readonly client: string; readonly until: number } | undefined {
    const moment = this.#byVid(vid);
    if (!moment || moment.users + moment.askers > 0) return undefined;
    const lost = [...moment.readers.values()].filter(isAway);
    if (lost.length === 0) return undefined;
    const client = lost.map((reader) => reader.client.label).join(', ');
    // eslint-disable-next-line no-restricted-syntax -- a time of day, for people
    return { client, until: Date.now() + Math.max(...lost.map(({ leftMs }) => leftMs)) };
  }

  dropped(vid: number, why: string): void {
    const moment = this.#byVid(vid);
    if (moment) this.#noteGone(moment, why);
  }

  /** The moment that is open, kept, or taken now; with one more user in the catalog, and one more who asks. */
  async #hold(name: string, tag: string, client: Client | undefined, isOpening: boolean): Promise<HeldMoment> {
    const known = this.#find(name, tag, client);
    if (known) {
      if (client && !isLabelled(tag)) this.#ended.checkReader(name, client, isOpening);
      // Before it is waited for: nobody is to end it meanwhile.
      known.askers++;
      try {
        return { moment: known, client, vdi: await this.#catalog.openTemporary(known.vid), tookOver: false };
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
    const moment: Moment = {
      ...{ name, tag, vid, takenAt: vdi.record.snapshotAt, vdi },
      ...{
        users: 0,
        askers: 1,
        isRemembered: false,
        hasLateReader: false,
        hasBeenRead: false,
        bases: new Map<string, number>(),
        readers: new Map<string, Reader>(),
      },
    };
    const spec = `${name}@${tag}`;
    this.#moments.set(spec, [...(this.#moments.get(spec) ?? []), moment]);
    return { moment, client, vdi, tookOver: false };
  }

  /** A client that was cut off gets its own moment back; others share what is open, and not what is only kept. */
  #find(name: string, tag: string, client: Client | undefined): Moment | undefined {
    const moments = this.#moments.get(`${name}@${tag}`) ?? [];
    if (isLabelled(tag)) return moments[0];
    const own = client && moments.findLast(({ readers }) => readers.has(client.id));
    return own ?? moments.findLast(({ users, askers }) => users + askers > 0);
  }

  /**
   * Whoever is here comes before whoever may come back. Nobody's turn is waited for: whoever opens another label of the disk
   * may be waiting for ours. None is needed, since a moment that somebody is about to open has one who asks.
   */
  async #take(name: string, tag: string): Promise<{ readonly vid: number }> {
    for (;;) {
      try {
        return await this.#catalog.snapshotTemporary(name, tag);
      } catch (error) {
        const oldest = this.#keptMoments().find((moment) => moment.name === name);
        if ((error as { code?: string }).code !== 'LIMIT' || !oldest) throw error;
        await this.#endIfKept(oldest, `${name} has as many temporary snapshots as it can have`);
      }
    }
  }

  /**
   * A connection of this client has opened the moment: remembered before the client is answered. Whether it may be one that
   * was cut off.
   */
  async #arrive(moment: Moment, client: Client | undefined): Promise<boolean> {
    const { name, tag, takenAt } = moment;
    if (client && !moment.readers.has(client.id) && moment.readers.size >= MAX_READERS) {
      throw new CatalogError('LIMIT', `${name}@${tag} has ${MAX_READERS} readers, and no more are possible`);
    }
    if (!isLabelled(tag)) {
      if (client) await this.#ended.reads(name, client, takenAt);
    } else if (!moment.isRemembered && (client || !isLabelOfRun(tag))) {
      // Also for a command of ours: the label is the user's. One that was drawn for the run nobody gives again.
      await this.#ended.useLabel(name, tag);
      moment.isRemembered = true;
    }
    if (!client) return false;
    let reader = moment.readers.get(client.id);
    if (!reader) {
      reader = { client, connections: new ClientConnections(), leftMs: 0, hasLeft: false };
      moment.readers.set(client.id, reader);
    }
    reader.hasLeft = false;
    reader.connections.live++;
    return reader.connections.takeOver();
  }

  /** The connection has no part in it any more. */
  async #letGo({ moment, vdi }: HeldMoment): Promise<void> {
    // Until it is closed nobody is to end it.
    moment.askers++;
    try {
      await this.#catalog.release(vdi);
    } finally {
      moment.askers--;
      await this.#settle(moment);
    }
  }

  /** Keep it or drop it, if nobody has it. */
  async #settle(moment: Moment): Promise<void> {
    this.#tickIfNeeded();
    if (moment.users + moment.askers > 0 || this.#byVid(moment.vid) !== moment) return;
    for (const reader of moment.readers.values()) if (isGone(moment, reader)) reader.connections.forget();
    const lost = [...moment.readers.values()].filter(isAway);
    if (lost.length === 0) return this.#end(moment, 'it was read to its end', true);
    const { failure } = moment.vdi;
    if (failure) return this.#end(moment, clientMessage(failure));
    if (this.#keepMs === 0) return this.#end(moment, 'its client was cut off');
    const kept = this.#keptMoments();
    const ofDisk = kept.filter(({ name }) => name === moment.name);
    if (ofDisk.length > MAX_KEPT_PER_DISK) this.#endSoon(ofDisk[0] as Moment, 'too many of its disk were kept');
    if (kept.length > this.#maxKept) this.#endSoon(kept[0] as Moment, 'too many were kept');
    for (const { client } of lost) {
      const ofClient = kept.filter(({ readers }) => (readers.get(client.id)?.connections.lost ?? 0) > 0);
      if (ofClient.length > MAX_KEPT_PER_CLIENT)
        this.#endSoon(ofClient[0] as Moment, 'too many of its client were kept');
    }
  }

  /** When whoever is opening or closing it is done. */
  #endSoon(moment: Moment, why: string | undefined): void {
    const spec = `${moment.name}@${moment.tag}`;
    this.#alone(spec, () => this.#endIfKept(moment, why)).catch((error: unknown) =>
      this.#log(`${spec} could not be dropped`, { err: error }),
    );
  }

  /** If nobody has it open. Without a `why` only if nobody comes back for it, or it cannot be read any more. */
  async #endIfKept(moment: Moment, why: string | undefined): Promise<void> {
    if (moment.users + moment.askers > 0 || this.#byVid(moment.vid) !== moment) return;
    const isAwaited = [...moment.readers.values()].some(isAway);
    const { failure } = moment.vdi;
    // It is told to the clients who come back.
    const failed = failure && clientMessage(failure);
    const because = why ?? (isAwaited ? failed : 'its client was cut off and did not come back in time');
    if (because !== undefined) await this.#end(moment, because);
  }

  /** Drop it. `isOver`: nobody comes back for it. */
  async #end(moment: Moment, why: string, isOver = false): Promise<void> {
    if (this.#byVid(moment.vid) !== moment) return;
    this.#noteGone(moment, why, isOver);
    await this.#catalog.dropTemporary(moment.name, moment.tag, moment.vid);
  }

  #noteGone(moment: Moment, why: string, isOver = false): void {
    const { name, tag, takenAt } = moment;
    const spec = `${name}@${tag}`;
    const left = (this.#moments.get(spec) ?? []).filter((other) => other !== moment);
    if (left.length > 0) this.#moments.set(spec, left);
    else this.#moments.delete(spec);
    if (isLabelled(tag)) {
      if (moment.isRemembered && moment.hasBeenRead) {
        this.#ended.labelEnded(name, tag, why, isOver && !moment.hasLateReader);
      } else if (moment.isRemembered) {
        this.#ended.labelUnused(name, tag);
      }
      return;
    }
    for (const reader of [...moment.readers.values()]) {
      if (isAway(reader)) this.#ended.readerEnded(name, reader.client, takenAt, why, reader.leftMs);
      else this.#forgetReader(moment, reader);
    }
    this.#tickIfNeeded();
  }

  /** It has no part in this moment any more. */
  #forgetReader(moment: Moment, { client }: Reader): void {
    const { name, tag } = moment;
    moment.readers.delete(client.id);
    if (isLabelled(tag)) return;
    const readsOn = (this.#moments.get(`${name}@${tag}`) ?? []).some(({ readers }) => readers.has(client.id));
    if (!readsOn) this.#ended.hasRead(name, client);
  }

  /** Those that nobody has open, the oldest first. */
  #keptMoments(): Moment[] {
    const kept = [...this.#moments.values()].flat().filter(({ users, askers }) => users + askers === 0);
    return kept.sort((a, b) => a.takenAt - b.takenAt);
  }

  #byVid(vid: number): Moment | undefined {
    for (const moments of this.#moments.values()) {
      const found = moments.find((moment) => moment.vid === vid);
      if (found) return found;
    }
    return undefined;
  }

  #isWaiting(): boolean {
    if (this.#ended.isWaiting) return true;
    for (const moments of this.#moments.values()) {
      if (moments.some(({ readers }) => [...readers.values()].some(isAway))) return true;
    }
    return false;
  }

  #tickIfNeeded(): void {
    if (!this.#serves || this.#ticking !== undefined || !this.#isWaiting()) return;
    this.#tickedAt = performance.now();
    const period = Math.min(TICK_MS, Math.max(MIN_TICK_MS, this.#keepMs / 4));
    this.#ticking = setInterval(() => this.#tick(period), period).unref();
  }

  /** Time passes for those who may come back, by a clock that nobody sets. */
  #tick(period: number): void {
    const now = performance.now();
    const passed = Math.min(now - this.#tickedAt, MAX_TICKS_AT_ONCE * period);
    this.#tickedAt = now;
    this.#ended.age(passed);
    for (const moment of [...this.#moments.values()].flat()) {
      for (const reader of moment.readers.values()) {
        if (!isAway(reader)) continue;
        const { connections } = reader;
        reader.leftMs -= passed;
        if (reader.leftMs <= 0) moment.hasLateReader = true;
        if (reader.leftMs <= 0 || isGone(moment, reader)) connections.forget();
        if (connections.lost === 0 && connections.live === 0) this.#forgetReader(moment, reader);
      }
      if (moment.users + moment.askers === 0) this.#endSoon(moment, undefined);
    }
    if (this.#isWaiting()) return;
    clearInterval(this.#ticking);
    this.#ticking = undefined;
  }

  #alone<T>(spec: string, work: () => Promise<T>): Promise<T> {
    const result = (this.#queues.get(spec) ?? Promise.resolve()).then(work);
    const settled: Promise<void> = result.then(
      () => undefined,
      () => undefined,
    );
    this.#queues.set(spec, settled);
    void settled.then(() => {
      if (this.#queues.get(spec) === settled) this.#queues.delete(spec);
    });
    return result;
  }
}

/** ClientConnections of it were cut off, and may come back. */
function isAway({ connections }: Reader): boolean {
  return connections.lost > 0;
}

/**
 * Whether nobody can come back: NAME@now is given back to the same process only, and it has ended. Under a label somebody else
 * may take up its work, through another process of a proxy for instance, unless it has left in order.
 */
function isGone({ tag }: Moment, { client, hasLeft }: Reader): boolean {
  return (!isLabelled(tag) || hasLeft) && client.process !== undefined && !isRunning(client.process);
}
