/**
 * Log lines about requests that wait for nodes: clients only see that nothing moves, so the log names the disk, the time and
 * the nodes. Owns when a line is written: when requests of a disk have waited for WAITING_MS, then less and less often while
 * they wait, and when it is over. Callers pass the waiting requests at each check.
 */

/** How long a request must have waited for a line. Healthy nodes answer within a fraction of a second. */
export const WAITING_MS = 5_000;
export const WAITING_CHECK_MS = 500;
/** From one line to the next of the same disk; doubled each time while requests wait. */
const FIRST_INTERVAL_MS = 10_000;
const LONGEST_INTERVAL_MS = 10 * 60_000;
/** Named in one line; the others are counted. */
const MAX_REASONS = 4;

/** A request that waits. */
export interface Waiter {
  /** By performance.now(). */
  readonly since: number;
  /** What it waits for, with the node. */
  readonly why: string;
}

interface Disk {
  /** Of the oldest request that waits now; undefined if none does. */
  since: number | undefined;
  requests: number;
  readonly reasons: Set<string>;
  lastSeenAt: number;
  /** No line is due before. */
  nextAt: number;
  intervalMs: number;
  /** A line has said that they wait. */
  isTold: boolean;
  /** How often they have waited and stopped waiting without a line. */
  untold: number;
}

export class WaitingLog {
  readonly #log: (line: string, details?: object) => void;
  readonly #disks = new Map<string, Disk>();

  constructor(log: (line: string, details?: object) => void) {
    this.#log = log;
  }

  /** `waiting`: all requests that wait now, each with the name of its disk for messages. `now`: performance.now(). */
  check(waiting: Iterable<readonly [disk: string, waiter: Waiter]>, now: number): void {
    for (const disk of this.#disks.values()) {
      disk.requests = 0;
      disk.reasons.clear();
    }
    for (const [name, { since, why }] of waiting) {
      const disk = this.#diskOf(name, now);
      disk.requests++;
      disk.reasons.add(why);
      disk.since = Math.min(disk.since ?? since, since);
      disk.lastSeenAt = now;
    }
    for (const [name, disk] of this.#disks) {
      if (disk.requests > 0) this.#goesOn(name, disk, now);
      else if (disk.since !== undefined) this.#isOver(name, disk, now);
      else if (now - disk.lastSeenAt >= disk.intervalMs) this.#forget(name, disk);
    }
  }

  #diskOf(name: string, now: number): Disk {
    let disk = this.#disks.get(name);
    if (disk === undefined) {
      const schedule = { nextAt: now, intervalMs: FIRST_INTERVAL_MS, lastSeenAt: now };
      disk = { ...schedule, since: undefined, requests: 0, reasons: new Set(), isTold: false, untold: 0 };
      this.#disks.set(name, disk);
    }
    return disk;
  }

  #goesOn(name: string, disk: Disk, now: number): void {
    if (now < disk.nextAt) return;
    const { requests, reasons, since = now } = disk;
    const named = [...reasons].slice(0, MAX_REASONS);
    if (reasons.size > MAX_REASONS) named.push(`and ${reasons.size - MAX_REASONS} more reasons`);
    const waitingMs = Math.round(now - since);
    const oldest = `for ${seconds(waitingMs)}: ${named.join('; ')}${takeUntold(disk)}`;
    const what =
      requests === 1 ? 'a request waits for the cluster' : `${requests} requests wait for the cluster, the oldest`;
    this.#log(`${name}: ${what} ${oldest}`, {
      ...{ disk: name, requests, waitingMs },
    });
    disk.isTold = true;
    disk.nextAt = now + disk.intervalMs;
    disk.intervalMs = Math.min(2 * disk.intervalMs, LONGEST_INTERVAL_MS);
  }

  #isOver(name: string, disk: Disk, now: number): void {
    const waitedMs = Math.round(now - (disk.since as number));
    if (disk.isTold) {
      this.#log(`${name}: no request waits for the cluster any more, after ${seconds(waitedMs)}`, {
        ...{ disk: name, waitedMs },
      });
    } else disk.untold++;
    disk.isTold = false;
    disk.since = undefined;
  }

  /** The disk has not waited for a while: the next wait starts with the first interval again. */
  #forget(name: string, disk: Disk): void {
    if (disk.untold > 0)
      this.#log(`${name}: requests have waited for the cluster again${takeUntold(disk)}`, { disk: name });
    this.#disks.delete(name);
  }
}

function takeUntold(disk: Disk): string {
  const { untold } = disk;
  disk.untold = 0;
  return untold === 0 ? '' : ` (${untold} more time${untold === 1 ? '' : 's'} since the last line)`;
}

function seconds(ms: number): string {
  return `${Math.round(ms / 1000)} s`;
}
