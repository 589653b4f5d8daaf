/**
 * Peers that have violated the protocol lately. The first violation closes the connection at once; repeated ones close it later
 * and later, so that a client that reconnects cannot loop at full speed. It owns the counts, for a whole server: a client that
 * reconnects may be served by another event loop.
 */

/** The delay of the second violation in a row, milliseconds; every further one doubles it. */
const FIRST_DELAY_MS = 100;
/** An offender without violations for so long is forgotten, milliseconds. */
const FORGET_MS = 10 * 60_000;
/** Most offenders remembered; the one seen longest ago makes room. */
const MAX_OFFENDERS = 1024;

interface Offender {
  readonly count: number;
  readonly lastAt: number;
}

/** What a violation of the protocol costs a client. */
export interface Violation {
  /** How often in a row this peer has violated the protocol on this export, this time included. */
  readonly count: number;
  /** How long its socket is kept before it is closed, milliseconds. */
  readonly delayMs: number;
}

/** The counts as a connection uses them. `now`: milliseconds of a monotonic clock. */
export interface OffenderCounts {
  /** The count of an offender; 0 for any other peer. */
  countOf(offender: string, now: number): number;
  /** Count one more violation. */
  record(offender: string, now: number): Violation;
}

export class Offenders implements OffenderCounts {
  /** In the order of their last violation. */
  readonly #offenders = new Map<string, Offender>();

  readonly #maxDelayMs: number;

  /** `maxDelayMs`: the longest delay; 0: every connection is closed at once. */
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
