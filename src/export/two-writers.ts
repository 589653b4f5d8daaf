/**
 * The warning when two independent clients write one disk at the same time. Owns how often it is logged, and what `vdi show`
 * reports of the last time.
 */
import type { Log } from '../vdi/log.js';
import type { Claim } from './writer-claim.js';

/** For one disk it is logged no more often than this, even if the clients reconnect often. */
const WARNING_INTERVAL_MS = 60_000;
/** Disks whose last two writers are remembered, until this process ends. */
const MAX_REMEMBERED = 1024;

/** Two clients that have written one disk while both were connected. Times are Date.now(). */
export interface TwoWriters {
  readonly at: number;
  readonly clients: readonly string[];
}

export class TwoWritersWarning {
  readonly #log: Log;
  /** By disk; `toldAt`, by performance.now(). */
  readonly #last = new Map<string, TwoWriters & { readonly toldAt: number }>();

  constructor(log: Log) {
    this.#log = log;
  }

  /** The last time that two clients wrote the disk, in this process. */
  last(disk: string): TwoWriters | undefined {
    const found = this.#last.get(disk);
    return found && { at: found.at, clients: found.clients };
  }

  /** The disk was deleted or created again. */
  forget(disk: string): void {
    this.#last.delete(disk);
  }

  /** `first` has written, and now `second` does. At most once for each connection. */
  warn(first: Claim, second: Claim): void {
    const { disk } = second;
    const clients = [first.label, second.label];
    const before = this.#last.get(disk);
    const now = performance.now();
    const isQuiet = before !== undefined && now - before.toldAt < WARNING_INTERVAL_MS;
    if (!isQuiet) {
      this.#log(
        `${disk} is written by two clients at once, ${first.label} and ${second.label}: this damages its filesystem, unless ` +
          "they coordinate their writes (cluster filesystem, live migration); 'sheepgate client list' shows both, and " +
          "'serve --exclusive' lets only one of them write",
        { vdi: disk, peers: [first.peer.address, second.peer.address], clients },
      );
    }
    this.#last.delete(disk);
    const [oldest] = this.#last.keys();
    if (this.#last.size >= MAX_REMEMBERED && oldest !== undefined) this.#last.delete(oldest);
    this.#last.set(disk, { at: Date.now(), clients, toldAt: isQuiet ? before.toldAt : now });
  }
}
