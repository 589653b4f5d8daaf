/**
 * Detects a server that does not answer. The oldest request in flight is watched: when neither a part of its reply has arrived
 * nor any byte of it has left for the time-out, the server counts as silent. A request behind others is watched when it is
 * the oldest, so that large replies to earlier requests do not count against it.
 *
 * It counts turns of one timer and reads no clock: a process that was stopped, or a suspended machine, does not take its
 * own pause for the server's.
 */

/** A request as this sees it. */
export interface Watched {
  /** Parts of its reply that have arrived. */
  readonly parts: number;
  /** The number of bytes sent on the connection, once the last byte of the request has left. */
  readonly sentEnd: number;
}

/** The time-out is met with this precision: late by up to two turns, never early. */
const TURNS = 8;

export class SilenceWatch {
  readonly #timeoutMs: number;
  readonly #turnMs: number;
  readonly #oldest: () => Watched | undefined;
  readonly #bytesLeft: () => number;
  readonly #onSilence: () => void;
  #timer: NodeJS.Timeout | undefined;
  #watched: Watched | undefined;
  #parts = 0;
  #left = 0;
  #quietTurns = 0;

  /**
   * @param oldest the oldest request in flight
   * @param bytesLeft how many bytes have left this process on the connection
   */
  constructor(timeoutMs: number, oldest: () => Watched | undefined, bytesLeft: () => number, onSilence: () => void) {
    this.#timeoutMs = timeoutMs;
    this.#turnMs = Math.max(1, Math.ceil(timeoutMs / TURNS));
    this.#oldest = oldest;
    this.#bytesLeft = bytesLeft;
    this.#onSilence = onSilence;
  }

  /** A request was sent. */
  begin(): void {
    this.#timer ??= setTimeout(this.#turn, this.#turnMs);
  }

  stop(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#watched = undefined;
  }

  readonly #turn = (): void => {
    const oldest = this.#oldest();
    if (oldest === undefined) {
      this.stop();
      return;
    }
    const left = this.#bytesLeft();
    const hasMoved = left > this.#left && oldest.sentEnd > this.#left;
    if (oldest !== this.#watched || oldest.parts !== this.#parts || hasMoved) this.#quietTurns = 0;
    else this.#quietTurns++;
    this.#watched = oldest;
    this.#parts = oldest.parts;
    this.#left = left;
    if (this.#quietTurns * this.#turnMs >= this.#timeoutMs) {
      this.stop();
      this.#onSilence();
    } else {
      this.#timer = setTimeout(this.#turn, this.#turnMs);
    }
  };
}
