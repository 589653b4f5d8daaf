/**
 * Who has broken the protocol lately. A client that does it once is closed at once; one that comes back and does it again
 * is closed later and later, so that it cannot go round as fast as the two machines can. Owns the count of each offender,
 * and the sockets that wait for their end: their connections have no device and no request any more, and count for nobody.
 */

import type { Duplex } from 'node:stream';

/** What the second violation in a row costs; every further one twice as much. */
const FIRST_DELAY_MS = 100;
/** An offender that has been good for so long is forgotten. */
const FORGET_MS = 10 * 60_000;
/** Offenders that are remembered; the one that was seen longest ago makes room. */
const MAX_OFFENDERS = 1024;

/** Sockets that wait; with one more the one that has waited longest is closed early. */
const MAX_HELD = 64;
/** With more than this on its way to the client a socket is not held: its memory would be, too. */
const MAX_HELD_UNSENT_BYTES = 64 * 1024;

interface Offender {
  readonly count: number;
  readonly lastAt: number;
}

export interface Violation {
  /** How often in a row this peer has broken the protocol on this export, this time included. */
  readonly count: number;
  /** How long its socket is kept before it is closed, milliseconds. */
  readonly delayMs: number;
}

export class Violations {
  /** In the order in which they were seen last. */
  private readonly offenders = new Map<string, Offender>();
  /** Those that wait, in the order in which they came, and what will end it. */
  private readonly held = new Map<Duplex, NodeJS.Timeout>();

  /** `maxDelayMs`: what a violation may cost at most; 0: every connection is closed at once. */
  constructor(private readonly maxDelayMs: number) {}

  /** The count of an offender; 0 for everybody else. `now`: milliseconds of a clock that does not jump. */
  countOf(offender: string, now: number): number {
    const known = this.offenders.get(offender);
    return known === undefined || now - known.lastAt > FORGET_MS ? 0 : known.count;
  }

  /** Note one more violation. */
  record(offender: string, now: number): Violation {
    const count = this.countOf(offender, now) + 1;
    this.offenders.delete(offender);
    this.offenders.set(offender, { count, lastAt: now });
    if (this.offenders.size > MAX_OFFENDERS) {
      const [oldest] = this.offenders.keys();
      if (oldest !== undefined) this.offenders.delete(oldest);
    }
    return { count, delayMs: count < 2 ? 0 : Math.min(this.maxDelayMs, FIRST_DELAY_MS * 2 ** (count - 2)) };
  }

  /**
   * Keep `socket`, which nobody may hear any more, and destroy it after `delayMs`. False, and nothing done, if it is gone
   * or has too much on its way to be kept.
   */
  hold(socket: Duplex, delayMs: number): boolean {
    if (socket.destroyed || socket.writableLength > MAX_HELD_UNSENT_BYTES) return false;
    if (this.held.size >= MAX_HELD) {
      const [longest] = this.held.keys();
      if (longest !== undefined) {
        this.forget(longest);
        longest.destroy();
      }
    }
    // Paused, its end is not seen: a client that is gone costs a descriptor for the rest of its time, one of MAX_HELD.
    socket.pause();
    const timer = setTimeout(() => socket.destroy(), delayMs);
    this.held.set(socket, timer);
    socket.once('close', () => this.forget(socket));
    return true;
  }

  /** Close all that wait. */
  release(): void {
    for (const socket of [...this.held.keys()]) socket.destroy();
  }

  private forget(socket: Duplex): void {
    clearTimeout(this.held.get(socket));
    this.held.delete(socket);
  }
}
