/**
 * Requests that wait for nodes, for the log (waiting.ts): those that are repeated, those that a node has not answered, and
 * objects that are waited for by asking again and again. Owns which requests count; the lines are waiting.ts's.
 */
import { oidOf, opcodeOf } from '../../sheepdog/headers.js';
import { addressLabel } from '../../sheepdog/node-address.js';
import { vidOf } from '../../sheepdog/object-ids.js';
import { Opcode } from '../../sheepdog/protocol.js';
import type { WireRequest } from './connection.js';
import type { PoolNode } from './pool-node.js';
import { WAITING_CHECK_MS, WaitingLog, type Waiter } from './waiting.js';

/** Requests that one check looks at: if there are more, they wait for the same nodes. */
const MAX_WAITERS = 1024;

/** A request that is repeated, or waits until it may be. */
export interface Repeated extends Waiter {
  readonly request: WireRequest;
  why: string;
}

export class AwaitedRequests {
  readonly #nodes: readonly PoolNode[];
  readonly #repeated = new Set<Repeated>();
  readonly #objects = new Set<Waiter & { readonly disk: string }>();
  readonly #checking: NodeJS.Timeout | undefined;
  /** The disk that an object belongs to, by the halves of its oid. */
  diskOf: (high: number, low: number) => string | undefined = () => undefined;

  /** `waitingMs`: how long a request must have waited for the log to say so. Without a log nothing is looked at. */
  constructor(
    nodes: readonly PoolNode[],
    log: ((line: string, details?: object) => void) | undefined,
    waitingMs: number,
  ) {
    this.#nodes = nodes;
    if (log === undefined) return;
    const waiting = new WaitingLog(log);
    this.#checking = setInterval(() => {
      const now = performance.now();
      waiting.check(firstOf(this.#waiting(now - waitingMs), MAX_WAITERS), now);
    }, WAITING_CHECK_MS).unref();
  }

  close(): void {
    clearInterval(this.#checking);
  }

  /** While `work` repeats the request, it waits. */
  async whileRepeated<T>(waiter: Repeated, work: () => Promise<T>): Promise<T> {
    this.#repeated.add(waiter);
    try {
      return await work();
    } finally {
      this.#repeated.delete(waiter);
    }
  }

  /** While `work` asks again and again for an object of `disk`, it counts as one request that waits for `why`. */
  async whileAwaited<T>(disk: string, why: string, work: () => Promise<T>): Promise<T> {
    const waiter = { disk, why, since: performance.now() };
    this.#objects.add(waiter);
    try {
      return await work();
    } finally {
      this.#objects.delete(waiter);
    }
  }

  /** All requests that have waited since `time`, each with its disk. */
  *#waiting(time: number): Generator<readonly [disk: string, waiter: Waiter]> {
    const repeated = new Set<WireRequest>();
    for (const waiter of this.#objects) if (waiter.since <= time) yield [waiter.disk, waiter];
    for (const waiter of this.#repeated) {
      repeated.add(waiter.request);
      if (waiter.since <= time) yield* this.#named(waiter.request, waiter);
    }
    for (const { address, connections } of this.#nodes) {
      for (const connection of connections) {
        for (const { request, sentAt } of connection.unansweredSince(time)) {
          if (repeated.has(request)) continue;
          yield* this.#named(request, { since: sentAt, why: `${addressLabel(address)} has not answered` });
        }
      }
    }
  }

  *#named({ header }: WireRequest, waiter: Waiter): Generator<readonly [disk: string, waiter: Waiter]> {
    // A hint: no request of a client waits for it.
    if (opcodeOf(header) === Opcode.GET_NODE_LIST) return;
    const oid = oidOf(header);
    yield [oid === undefined ? 'the catalog' : (this.diskOf(oid.high, oid.low) ?? vidLabel(oid.high)), waiter];
  }
}

function* firstOf<T>(all: Iterable<T>, count: number): Generator<T> {
  let left = count;
  for (const each of all) {
    if (left-- === 0) return;
    yield each;
  }
}

function vidLabel(high: number): string {
  return `vid ${vidOf(high).toString(16)}`;
}
