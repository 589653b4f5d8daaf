/**
 * The connections of one client to one disk or temporary snapshot: how many there are, and how many were cut off and have not
 * come back. A client may come back before the end of its old connection is seen here (a dead TCP connection ends minutes
 * later), so either order counts as coming back. Owns the counts; the caller decides what follows from them.
 */

/** When a connection was opened, and when it made its last request: both as the number of devices opened so far. */
export interface ConnectionSpan {
  readonly opened: number;
  readonly lastRequest: number;
}

/** Connections of one client that are remembered after they have left; earlier ones do not count as a return any more. */
const MAX_LEFT = 1024;

export class ClientConnections {
  live = 0;
  /** The last requests of the connections that were cut off, in the order they were cut off. */
  readonly #lost: number[] = [];
  /** Of connections that took over from none and have left in order: when each was opened. Emptied when no connection is left. */
  readonly #left: number[] = [];

  get lost(): number {
    return this.#lost.length;
  }

  /** A new connection takes the place of one that was cut off. Returns whether there was one. */
  takeOver(): boolean {
    return this.#lost.shift() !== undefined;
  }

  /** `count` connections were cut off. Without a `span`, only a connection that takes over counts as their return. */
  loseAll(count: number, span?: ConnectionSpan): void {
    for (let n = 0; n < count; n++) this.#lost.push(span?.lastRequest ?? Infinity);
  }

  /** A connection has left in order. */
  leave({ opened }: ConnectionSpan): void {
    if (this.#left.length === MAX_LEFT) this.#left.shift();
    this.#left.push(opened);
  }

  /**
   * Once no connection is left: a connection that was opened after the last request of one that was cut off, and has left in
   * order, was its return.
   */
  settle(): void {
    if (this.live > 0) return;
    const left = this.#left.splice(0).sort((a, b) => a - b);
    // Each lost connection gets one return at most, the earliest possible. Connections that were open side by side to the end do
    // not count as returns.
    const lost = this.#lost.splice(0).sort((a, b) => a - b);
    for (const lastRequest of lost) {
      const at = left.findIndex((opened) => opened > lastRequest);
      if (at < 0) this.#lost.push(lastRequest);
      else left.splice(at, 1);
    }
  }

  /** The connections that were cut off do not come back. */
  forget(): void {
    this.#lost.length = 0;
  }
}
