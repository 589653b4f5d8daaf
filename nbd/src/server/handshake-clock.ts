/**
 * The time that a handshake may take, the client's part and the server's each: a client is cut off for being silent or slow,
 * never for waiting for us; and nobody waits for us for ever. It owns one timer. By a clock that nobody sets, and that stands
 * still while the server could not hear anybody.
 */
import type { Limits } from './limits.js';
import type { LoopTime } from './loop-time.js';

export class HandshakeClock {
  readonly #limits: Limits;
  readonly #time: LoopTime;
  readonly #onOver: (reason: string) => void;
  readonly #startedAt: number;
  #heardAt: number;
  /** What the client was told takes time to ask about. */
  #moreMs = 0;
  /** What the server took so far, milliseconds ... */
  #servedMs = 0;
  /** Of short answers: what more of them may be the server's. */
  #shortLeftMs: number;
  /** ... and what it is doing now, and since when. */
  #doing: string | undefined;
  #doingSince = 0;
  #timer: NodeJS.Timeout | undefined;
  #isStopped = false;

  /** `onOver` is called once, with the reason, unless it is stopped before. */
  constructor(limits: Limits, time: LoopTime, onOver: (reason: string) => void) {
    this.#limits = limits;
    this.#time = time;
    this.#onOver = onOver;
    this.#startedAt = time.now();
    this.#heardAt = this.#startedAt;
    this.#shortLeftMs = limits.openTimeoutMs;
    this.#wait();
  }

  /** The client has said something. */
  heard(): void {
    this.#heardAt = this.#time.now();
  }

  /** The client was told of so many exports, and may ask about each. */
  listed(count: number): void {
    this.#moreMs = Math.max(this.#moreMs, count * this.#limits.handshakeMsPerListedExport);
    this.#shortLeftMs = Math.max(this.#shortLeftMs, count * SHORT_MS);
  }

  /** What `work` takes is the server's time; `doing` says in the reason what was not done. */
  async during<T>(doing: string, work: T | Promise<T>): Promise<T> {
    if (!(work instanceof Promise)) return work;
    this.#doing = doing;
    this.#doingSince = this.#time.now();
    this.#wait();
    try {
      return await work;
    } finally {
      this.#doing = undefined;
      const took = this.#time.now() - this.#doingSince;
      // Of short ones only so much is not the client's: however many it asks for, its time passes.
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
    this.#timer = setTimeout(() => this.#look(), Math.max(1, Math.ceil(this.#left())));
  }

  #look(): void {
    if (this.#left() > 0) {
      this.#wait();
      return;
    }
    this.#isStopped = true;
    const { handshakeTimeoutMs, openTimeoutMs } = this.#limits;
    if (this.#doing !== undefined) {
      this.#onOver(`the server has not ${this.#doing} within ${openTimeoutMs} ms`);
      return;
    }
    // Of silence, since it was last heard; else since it came, but for what the server took.
    const isSilent = this.#time.now() - this.#heardAt >= handshakeTimeoutMs;
    const allowed = isSilent ? handshakeTimeoutMs : Math.round(handshakeTimeoutMs + this.#moreMs);
    this.#onOver(`no export chosen within ${allowed} ms`);
  }

  #left(): number {
    const now = this.#time.now();
    const { handshakeTimeoutMs, openTimeoutMs } = this.#limits;
    if (this.#doing !== undefined) return this.#doingSince + openTimeoutMs - now;
    const silence = this.#heardAt + handshakeTimeoutMs - now;
    const whole = this.#startedAt + handshakeTimeoutMs + this.#moreMs + this.#servedMs - now;
    return Math.min(silence, whole);
  }
}

/** Of the server's answers: longer ones are its own however many they are. */
const SHORT_MS = 1000;
