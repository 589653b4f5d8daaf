/**
 * One temporary snapshot and its readers: the clients that have it open, or were cut off from it and may come back. Owns these
 * counts; when a snapshot is taken, kept and dropped is decided in temporary-snapshots.ts.
 */
import type { Ending } from 'nbd-server-ts';
import { isRunning } from '../system/process-identity.js';
import { ClientConnections, type ConnectionSpan } from '../vdi/client-connections.js';
import type { Client } from '../vdi/client-use.js';
import { isLabelled } from '../vdi/names.js';
import type { Vdi } from '../vdi/vdi.js';

/** How a connection's part in a temporary snapshot ends. */
export interface EndOfReading {
  readonly ending: Ending;
  /** A read failed, and the client may try it again. */
  readonly hadErrors: boolean;
  /** The connection was refused after all: undo its opening. */
  readonly isRefused: boolean;
  readonly span: ConnectionSpan;
}

export class TemporarySnapshot {
  readonly name: string;
  readonly tag: string;
  readonly vid: number;
  readonly takenAt: number;
  readonly vdi: Vdi;
  /** Connections that have it open. */
  users = 0;
  /** Connections to which it was described and that have not opened it, and operations on it that are in flight. */
  askers = 1;
  /** It is stored that its label was used. */
  isRemembered = false;
  /** The time of a client that was cut off has passed: it may still ask for the snapshot. */
  hasLateReader = false;
  /** A connection has opened it, and was not refused after all. */
  hasBeenRead = false;
  /** The vids of the snapshots that it was compared with, by tag: a new snapshot under the tag would show other changes. */
  readonly bases = new Map<string, number>();
  readonly readers = new Map<string, Reader>();

  constructor(name: string, tag: string, vdi: Vdi) {
    this.name = name;
    this.tag = tag;
    this.vdi = vdi;
    this.vid = vdi.record.vid;
    this.takenAt = vdi.record.snapshotAt;
  }

  get spec(): string {
    return `${this.name}@${this.tag}`;
  }

  /** A connection has it, or is about to. */
  get isHeld(): boolean {
    return this.users + this.askers > 0;
  }

  /** The readers that were cut off and may come back. */
  get away(): Reader[] {
    return [...this.readers.values()].filter(({ isAway }) => isAway);
  }

  /**
   * Whether this reader cannot come back. NAME@now is given back only to the same process, and that has ended. Under a label
   * another process may take up its work, for instance of a proxy, unless the reader has left in order.
   */
  isGone({ client, hasLeft }: Reader): boolean {
    return (!isLabelled(this.tag) || hasLeft) && client.process !== undefined && !isRunning(client.process);
  }
}

/** One client of a temporary snapshot. */
export class Reader {
  readonly client: Client;
  readonly connections = new ClientConnections();
  /** How long those of its connections that were cut off may still come back. */
  leftMs = 0;
  /** Its last connection has said goodbye, while others were cut off and may come back. */
  hasLeft = false;

  constructor(client: Client) {
    this.client = client;
  }

  get isAway(): boolean {
    return this.connections.lost > 0;
  }

  /** Returns whether the connection may be one that was cut off. */
  arrive(): boolean {
    this.hasLeft = false;
    this.connections.live++;
    return this.connections.takeOver();
  }

  /** A connection has ended. `keepMs`: how long it may come back. */
  leave(tookOver: boolean, { ending, hadErrors, isRefused, span }: EndOfReading, keepMs: number): void {
    const { connections } = this;
    connections.live--;
    const isCutOff = !isRefused && (ending === 'lost' || hadErrors);
    if (isCutOff) {
      connections.loseAll(1, span);
      this.leftMs = keepMs;
    } else if (isRefused) {
      // The connection that it took over from has been away for as long as before.
      if (tookOver) connections.loseAll(1);
    } else if (!tookOver) {
      connections.leave(span);
    }
    connections.settle();
    // Connections of one process may work side by side: one that was cut off comes back though the others are done.
    if (connections.live === 0 && connections.lost > 0 && !isCutOff && !isRefused) this.hasLeft = true;
  }
}

/** The temporary snapshots that there are. */
export class TakenSnapshots {
  /** By NAME@TAG, the oldest first: of a label there is one at most. */
  readonly #bySpec = new Map<string, TemporarySnapshot[]>();

  add(snapshot: TemporarySnapshot): void {
    this.#bySpec.set(snapshot.spec, [...this.of(snapshot.spec), snapshot]);
  }

  remove(snapshot: TemporarySnapshot): void {
    const left = this.of(snapshot.spec).filter((other) => other !== snapshot);
    if (left.length > 0) this.#bySpec.set(snapshot.spec, left);
    else this.#bySpec.delete(snapshot.spec);
  }

  of(spec: string): readonly TemporarySnapshot[] {
    return this.#bySpec.get(spec) ?? [];
  }

  has(snapshot: TemporarySnapshot): boolean {
    return this.of(snapshot.spec).includes(snapshot);
  }

  all(): TemporarySnapshot[] {
    return [...this.#bySpec.values()].flat();
  }

  byVid(vid: number): TemporarySnapshot | undefined {
    for (const snapshots of this.#bySpec.values()) {
      const found = snapshots.find((snapshot) => snapshot.vid === vid);
      if (found) return found;
    }
    return undefined;
  }

  /** For this client: its own if it was cut off from one, else the newest that a connection holds. Kept ones are not shared. */
  find(name: string, tag: string, client: Client | undefined): TemporarySnapshot | undefined {
    const snapshots = this.of(`${name}@${tag}`);
    if (isLabelled(tag)) return snapshots[0];
    const own = client && snapshots.findLast(({ readers }) => readers.has(client.id));
    return own ?? snapshots.findLast(({ isHeld }) => isHeld);
  }

  /** Those that no connection has, the oldest first. */
  kept(): TemporarySnapshot[] {
    const kept = this.all().filter(({ isHeld }) => !isHeld);
    return kept.sort((a, b) => a.takenAt - b.takenAt);
  }

  /** Whether any reader is away. */
  get hasAway(): boolean {
    for (const snapshots of this.#bySpec.values()) {
      for (const { readers } of snapshots) for (const { isAway } of readers.values()) if (isAway) return true;
    }
    return false;
  }
}
