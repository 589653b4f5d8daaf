/**
 * Stalled clients: they do not read their replies, or do not send the rest of a payload. It owns the timer that checks them
 * and the decision which are closed: any of them after `stallTimeoutMs`, and while others wait for memory those that hold
 * most of it after `memoryStallMs`.
 */

import type { BufferPool } from './buffer-pool.js';
import { MIN_MOVED_BYTES, orNever, type Limits } from './limits.js';
import type { LoopTime } from './loop-time.js';

const MIB = 1024 * 1024;
/** Time between two checks, milliseconds. */
const LOOK_MS = 500;

/** What is checked of a connection. Bytes moved are those of payloads received and replies sent; they only grow. */
export interface Watched {
  readonly movedBytes: number;
  readonly waitsForClient: boolean;
  /** Bytes of the memory budget that it holds. */
  readonly memoryBytes: number;
  abort(reason: string): void;
}

/** Since when a connection has moved fewer than `leastBytes` bytes, though its client should act. */
class Stall {
  #movedBytes = 0;
  #movedAt: number;

  readonly #leastBytes: number;

  constructor(leastBytes: number, now: number) {
    this.#leastBytes = leastBytes;
    this.#movedAt = now;
  }

  lasts({ movedBytes, waitsForClient }: Watched, now: number): number {
    if (!waitsForClient || movedBytes - this.#movedBytes >= this.#leastBytes) {
      this.#movedBytes = movedBytes;
      this.#movedAt = now;
    }
    return now - this.#movedAt;
  }
}

interface Stalls {
  /** Any bytes at all; and enough to keep memory that others wait for. */
  readonly any: Stall;
  readonly enough: Stall;
}

export class StallWatch {
  readonly #stalls = new WeakMap<Watched, Stalls>();
  readonly #timer: NodeJS.Timeout;

  readonly #connections: () => Iterable<Watched>;
  readonly #pool: BufferPool;
  readonly #limits: Limits;
  readonly #time: LoopTime;

  /** @param connections those open now; iterated at each check */
  constructor(connections: () => Iterable<Watched>, pool: BufferPool, limits: Limits, time: LoopTime) {
    this.#connections = connections;
    this.#pool = pool;
    this.#limits = limits;
    this.#time = time;
    this.#timer = setInterval(this.#look, LOOK_MS).unref();
  }

  stop(): void {
    clearInterval(this.#timer);
  }

  readonly #look = (): void => {
    const { memoryStallMs, stallTimeoutMs } = this.#limits;
    const { missingBytes } = this.#pool;
    const now = this.#time.now();
    const holders: Watched[] = [];
    for (const connection of this.#connections()) {
      const { any, enough } = this.#stallsOf(connection, now);
      const enoughMs = enough.lasts(connection, now);
      if (any.lasts(connection, now) >= stallTimeoutMs && stallTimeoutMs > 0) {
        connection.abort(`the client has read no replies, and sent nothing, for ${stallTimeoutMs} ms`);
      } else if (enoughMs >= orNever(memoryStallMs) && connection.memoryBytes > 0) {
        holders.push(connection);
      }
    }
    // As few connections as possible.
    holders.sort((a, b) => b.memoryBytes - a.memoryBytes);
    let missing = missingBytes;
    for (const connection of holders) {
      if (missing <= 0) return;
      const { memoryBytes } = connection;
      missing -= memoryBytes;
      connection.abort(
        `others wait for memory, and this client held ${Math.ceil(memoryBytes / MIB)} MiB for ${memoryStallMs} ms: it reads no ` +
          'replies, or does not send the rest of a request',
      );
    }
  };

  #stallsOf(connection: Watched, now: number): Stalls {
    let stalls = this.#stalls.get(connection);
    if (stalls === undefined) {
      stalls = { any: new Stall(1, now), enough: new Stall(MIN_MOVED_BYTES, now) };
      this.#stalls.set(connection, stalls);
    }
    return stalls;
  }
}
