/**
 * Who has broken the protocol lately. A client that does it once is closed at once; one that comes back and does it again
 * is closed later and later, so that it cannot go round as fast as the two machines can. Owns the count of each offender,
 * for a whole server: whoever comes back may be served by another event loop.
 */

/** What the second violation in a row costs; every further one twice as much. */
const FIRST_DELAY_MS = 100;
/** An offender that has been good for so long is forgotten. */
const FORGET_MS = 10 * 60_000;
/** Offenders that are remembered; the one that was seen longest ago makes room. */
const MAX_OFFENDERS = 1024;

interface Offender {
  readonly count: number;
  readonly lastAt: number;
}

/** What a breach of the protocol costs a client. */
export interface Violation {
  /** How often in a row this peer has broken the protocol on this export, this time included. */
  readonly count: number;
  /** How long its socket is kept before it is closed, milliseconds. */
  readonly delayMs: number;
}

/** What a connection asks and tells. `now`: milliseconds of a clock that does not jump. */
export interface OffenderCounts {
  /** The count of an offender; 0 for everybody else. */
  countOf(offender: string, now: number): number;
  /** Note one more violation. */
  record(offender: string, now: number): Violation;
}

export class Offenders implements OffenderCounts {
  /** In the order in which they were seen last. */
  readonly #offenders = new Map<string, Offender>();

  readonly #maxDelayMs: number;

  /** `maxDelayMs`: what a violation may cost at most; 0: every connection is closed at once. */
  constructor(maxDelayMs: number) {
    this.#maxDelayMs = maxDelayMs;
  }

  countOf(offender: string, now: number): number {
    const known = this.#offenders.get(offender);
    return known === undefined || now - known.lastAt > FORGET_MS ? 0 : known.count;
  }

  record(offender: string, now: number): Violation {
    const count = this.countOf(offender, now) + 1;
    this.#offenders.delete(offender);
    this.#offenders.set(offender, { count, lastAt: now });
    if (this.#offenders.size > MAX_OFFENDERS) {
      const [oldest] = this.#offenders.keys();
      if (oldest !== undefined) this.#offenders.delete(oldest);
    }
    return { count, delayMs: count < 2 ? 0 : Math.min(this.#maxDelayMs, FIRST_DELAY_MS * 2 ** (count - 2)) };
  }
}
