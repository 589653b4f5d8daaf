/**
 * The time limits of a handshake, for the client's part and the server's: a client is closed for being silent or slow,
 * never for waiting for the server; and the server's own work is limited too. It owns one timer, by a clock that nobody
 * sets and that stands still while the server cannot receive (LoopTime).
 */
import { ExportError } from '../block-device.js';
import { MAX_TIMER_MS, orNever, type Limits } from './limits.js';
import type { LoopTime } from './loop-time.js';
import { promiseOf } from '../promised.js';

export class HandshakeClock {
  readonly #limits: Limits;
  readonly #time: LoopTime;
  readonly #onOver: (reason: string) => void;
  readonly #startedAt: number;
  #heardAt: number;
  /** Added for the exports that were listed to the client, milliseconds. */
  #moreMs = 0;
  /** Time of the server so far, milliseconds ... */
  #servedMs = 0;
  /** How much more time of short answers counts as the server's, milliseconds. */
  #shortLeftMs: number;
  /** ... and what it does now, and since when. */
  #doing: string | undefined;
  #doingSince = 0;
  /** Called when it takes too long. */
  #giveUp: (error: Error) => void = () => undefined;
  #timer: NodeJS.Timeout | undefined;
  #isStopped = false;

  /** `onOver` is called once, with the reason, unless stop() is called before. */
  constructor(limits: Limits, time: LoopTime, onOver: (reason: string) => void) {
    this.#limits = limits;
    this.#time = time;
    this.#onOver = onOver;
    this.#startedAt = time.now();
    this.#heardAt = this.#startedAt;
    this.#shortLeftMs = orNever(limits.openTimeoutMs);
    this.#wait();
  }

  /** The client has sent an option. */
  heard(): void {
    this.#heardAt = this.#time.now();
  }

  /** `count` exports were listed to the client, which may query each. */
  listed(count: number): void {
    this.#moreMs = Math.max(this.#moreMs, count * this.#limits.handshakeMsPerListedExport);
    this.#shortLeftMs = Math.max(this.#shortLeftMs, count * SHORT_MS);
  }

  /**
   * The time of `work` is the server's; `doing` names it in the reason if it takes too long. Then it is not waited for any more,
   * and its result is discarded. Errors: those of the work; ExportError FAILED: it takes too long.
   */
  async during<T>(doing: string, work: T | Promise<T>): Promise<T> {
    const later = promiseOf(work) as Promise<T> | undefined;
    if (later === undefined) return work;
    this.#doing = doing;
    this.#doingSince = this.#time.now();
    this.#wait();
    const timeUp = new Promise<never>((_, reject) => {
      this.#giveUp = reject;
    });
    try {
      return await Promise.race([later, timeUp]);
    } finally {
      this.#doing = undefined;
      const took = this.#time.now() - this.#doingSince;
      // Short answers count as the server's time only up to a limit: else a client could extend its time with ever more
      // options.
      const ours = took >= SHORT_MS ? took : Math.min(took, this.#shortLeftMs);
      if (took < SHORT_MS) this.#shortLeftMs -= ours;
      this.#servedMs += ours;
      this.#heardAt += ours;
      this.#wait();
    }
  }

  stop(): void {
    this.#isStopped = true;
    clearTimeout(this.#timer);
  }

  #wait(): void {
    // It looks again when it is due, instead of being restarted by every option.
    if (this.#isStopped) return;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#look(), Math.min(MAX_TIMER_MS, Math.max(1, Math.ceil(this.#left()))));
  }

  #look(): void {
    if (this.#left() > 0) {
      this.#wait();
      return;
    }
    this.#isStopped = true;
    const { handshakeTimeoutMs, openTimeoutMs } = this.#limits;
    if (this.#doing !== undefined) {
      const reason = `the server has not ${this.#doing} within ${openTimeoutMs} ms`;
      this.#onOver(reason);
      this.#giveUp(new ExportError('FAILED', reason));
      return;
    }
    // Silence counts since the last option; the whole handshake since accept, without the server's time.
    const isSilent = this.#time.now() - this.#heardAt >= handshakeTimeoutMs;
    const allowed = isSilent ? handshakeTimeoutMs : Math.round(handshakeTimeoutMs + this.#moreMs);
    this.#onOver(`no export chosen within ${allowed} ms`);
  }

  #left(): number {
    const now = this.#time.now();
    const handshakeTimeoutMs = orNever(this.#limits.handshakeTimeoutMs);
    if (this.#doing !== undefined) return this.#doingSince + orNever(this.#limits.openTimeoutMs) - now;
    const silence = this.#heardAt + handshakeTimeoutMs - now;
    const whole = this.#startedAt + handshakeTimeoutMs + this.#moreMs + this.#servedMs - now;
    return Math.min(silence, whole);
  }
}

/** Answers that take longer are always the server's time, milliseconds. */
const SHORT_MS = 1000;
