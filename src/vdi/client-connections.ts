/**
 * The connections of one client to one thing: how many there are, and how many were cut off and have not come back. A client
 * may come back before the end of its old connection is seen here (a dead TCP connection ends minutes later), so both orders
 * count as coming back. Owns the counts; what follows from them, its users know.
 */

/** When a connection was opened, and how far things were at its last request: both count the devices opened so far. */
export interface ConnectionSpan {
  readonly opened: number;
  readonly lastRequest: number;
}

/** More that have left beside others of the same client are of no use: earlier ones are forgotten, and nobody has come back by them. */
const MAX_LEFT = 1024;

export class ClientConnections {
  live = 0;
  /** Last requests of those that were cut off, in the order of that. */
  readonly #lost: number[] = [];
  /** When those were opened that have left in order since there was none, and did not take over. */
  readonly #left: number[] = [];

  get lost(): number {
    return this.#lost.length;
  }

  /** A new connection: one of those that were cut off may have come back. Returns whether. */
  takeOver(): boolean {
    return this.#lost.shift() !== undefined;
  }

  /** `count` connections were cut off. Without a `span` only a connection that takes over can be one of them. */
  loseAll(count: number, span?: ConnectionSpan): void {
    for (let n = 0; n < count; n++) this.#lost.push(span?.lastRequest ?? Infinity);
  }

  /** A connection has left in order. */
  leave({ opened }: ConnectionSpan): void {
    if (this.#left.length === MAX_LEFT) this.#left.shift();
    this.#left.push(opened);
  }

  /**
   * If none is there any more: one that was opened after the last request of one that was cut off, and has left in order, was
   * that one come back.
   */
  settle(): void {
    if (this.live > 0) return;
    const left = this.#left.splice(0).sort((a, b) => a - b);
    // Each for one: the earliest that may be meant, for those that worked to the end side by side are nobody's return.
    const lost = this.#lost.splice(0).sort((a, b) => a - b);
    for (const lastRequest of lost) {
      const at = left.findIndex((opened) => opened > lastRequest);
      if (at < 0) this.#lost.push(lastRequest);
      else left.splice(at, 1);
    }
  }

  /** Those that were cut off do not come back. */
  forget(): void {
    this.#lost.length = 0;
  }
}
