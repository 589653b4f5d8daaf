/**
 * The signal of one connection, which its device and `open` get: aborted once, when the client is gone or is closed. It owns the
 * controller, made when the signal is first asked for, and the moment of the abort; the connection decides why.
 *
 * Listeners of an AbortSignal run inside abort(), and may do anything: close this connection, or the server. So they must
 * never run inside a request, or in the middle of a step of the connection.
 */

import { setMaxListeners } from 'node:events';

export class ClientSignal {
  #controller: AbortController | undefined;
  /** Why it is aborted; undefined: it is not. */
  #reason: string | undefined;
  #isFired = false;
  #timer: NodeJS.Timeout | undefined;

  get signal(): AbortSignal {
    let controller = this.#controller;
    if (controller === undefined) {
      this.#controller = controller = new AbortController();
      // A device that passes it on has a listener for each request in flight: that is no leak.
      setMaxListeners(0, controller.signal);
      if (this.#isFired) controller.abort(abortError(this.#reason));
    }
    return controller.signal;
  }

  /** The client is gone; the listeners may learn it a moment later. */
  get isAborted(): boolean {
    return this.#reason !== undefined;
  }

  /** Abort it, with an AbortError of this message; its listeners are called when the present work of the loop is done. */
  abort(reason: string): void {
    if (this.#reason !== undefined) return;
    this.#reason = reason;
    clearTimeout(this.#timer);
    process.nextTick(this.#fire);
  }

  /** The same, at once: for the loop's own steps, between which anything may happen. */
  abortNow(reason: string): void {
    this.abort(reason);
    this.#fire();
  }

  /** Abort it after `ms` milliseconds, unless it is aborted before. */
  abortAfter(ms: number, reason: string): void {
    if (this.#reason !== undefined || this.#timer !== undefined) return;
    this.#timer = setTimeout(() => this.abort(reason), ms);
  }

  /**
   * Whether `error` says that work was given up because this signal was aborted: it is the signal's reason, or an AbortError,
   * or was caused by one. Never throws, whatever `error` is.
   */
  isCauseOf(error: unknown): boolean {
    if (this.#reason === undefined) return false;
    try {
      let at = error;
      for (let depth = 0; depth < MAX_CAUSES && at instanceof Error; depth++, at = at.cause) {
        if (at.name === 'AbortError') return true;
      }
    } catch {
      // A getter or a proxy of the program has thrown.
    }
    return false;
  }

  readonly #fire = (): void => {
    if (this.#isFired) return;
    this.#isFired = true;
    this.#controller?.abort(abortError(this.#reason));
  };
}

/** An error that wraps an error that wraps … */
const MAX_CAUSES = 4;

/** As Node makes it: fetch and streams that are given the signal reject with it. */
function abortError(reason: string | undefined): Error {
  const error = new Error(reason);
  error.name = 'AbortError';
  return Object.assign(error, { code: 'ABORT_ERR' });
}
