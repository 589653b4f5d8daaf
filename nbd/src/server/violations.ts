/**
 * What one connection's violations of the protocol cost it. It owns the key that they are counted by (peer and export) and the
 * state "condemned": the connection is over, and only its socket waits for its end (see held-sockets.ts).
 */

import type { OffenderCounts } from './offenders.js';

export class Violations {
  /** How often in a row this peer has violated the protocol on this export, this connection included; 0: this one has not. */
  count = 0;
  isCondemned = false;
  /** Resolves when the connection is condemned. */
  readonly condemned: Promise<void>;

  readonly #offender: string | undefined;
  readonly #offenders: OffenderCounts;
  #resolveCondemned: () => void = () => undefined;

  /** @param offender the peer's key; undefined: its violations are not counted */
  constructor(offender: string | undefined, offenders: OffenderCounts) {
    this.#offender = offender;
    this.#offenders = offenders;
    this.condemned = new Promise((resolve) => {
      this.#resolveCondemned = resolve;
    });
  }

  /** Violations of this peer on an export so far; see ExportInfo.countedAs. */
  countOf(countedAs: string | undefined): number {
    const key = this.#key(countedAs);
    return key === undefined ? 0 : this.#offenders.countOf(key, performance.now());
  }

  /** Count one. Returns how long the socket is to be kept before it is closed, milliseconds; 0: it is closed at once. */
  record(countedAs: string | undefined): number {
    this.count = 1;
    const key = this.#key(countedAs);
    if (key === undefined) return 0;
    const { count, delayMs } = this.#offenders.record(key, performance.now());
    this.count = count;
    return delayMs;
  }

  condemn(): void {
    this.isCondemned = true;
    this.#resolveCondemned();
  }

  #key(countedAs: string | undefined): string | undefined {
    return this.#offender === undefined ? undefined : `${this.#offender} ${countedAs ?? ''}`;
  }
}
