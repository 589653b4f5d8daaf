/**
 * Requests that found an object missing, sent again. While nodes leave and join, a node that has not recovered an object yet may
 * say that there is none; an object that is missing with all nodes in their places is lost. Owns what is known of the cluster's
 * epoch, which every change of its members raises.
 */
import type { StoreError } from '../store-error.js';
import type { ClusterClient } from './cluster-client.js';
import { ObjectGone } from './result-errors.js';
import { setTimeout as sleep } from 'node:timers/promises';

/** A missing object is asked for again this many times at least, and for as long as members have changed lately. */
const GONE_TRIES = 2;
/** Before the first of them; it doubles up to MAX_BACKOFF_MS. */
const GONE_BACKOFF_MS = 10;
const MAX_BACKOFF_MS = 1000;
/** How long after a change of members nodes may still be without objects. */
const SETTLING_MS = 60_000;

export class GoneRetries {
  readonly #cluster: ClusterClient;
  /** The disks that are open here and have the object with these halves of an oid; undefined if none has. */
  readonly #diskOf: (high: number, low: number) => string | undefined;
  #epoch: number;
  #epochChangedAt = -Infinity;

  constructor(cluster: ClusterClient, epoch: number, diskOf: (high: number, low: number) => string | undefined) {
    this.#cluster = cluster;
    this.#epoch = epoch;
    this.#diskOf = diskOf;
  }

  /** The cluster's epoch when it was last read. */
  get knownEpoch(): number {
    return this.#epoch;
  }

  async readEpoch(retryMs?: number): Promise<number> {
    const { epoch } = await this.#cluster.info(retryMs === undefined ? {} : { retryMs, isApart: true });
    if (epoch !== this.#epoch) {
      this.#epoch = epoch;
      this.#epochChangedAt = performance.now();
    }
    return epoch;
  }

  /** Errors: those of `request`; GONE only if the object is lost. */
  async unlessGone(request: () => Promise<void>): Promise<void> {
    try {
      await request();
    } catch (error) {
      if ((error as StoreError).code !== 'GONE') throw error;
      await this.retry(error as StoreError, request);
    }
  }

  /** Do `request`, which has failed with `first`, again. Errors: as `unlessGone`. */
  retry(first: StoreError, request: () => Promise<void>): Promise<void> {
    const disk = first instanceof ObjectGone ? this.#diskOf(first.high, first.low) : undefined;
    const { pool } = this.#cluster;
    return pool.whileAwaited(disk ?? 'a disk', first.message, () => this.#askAgain(first, request));
  }

  async #askAgain(first: StoreError, request: () => Promise<void>): Promise<void> {
    const deadline = performance.now() + this.#cluster.pool.retryMs;
    let backoff = GONE_BACKOFF_MS;
    let failure = first;
    for (let tries = 0; tries < GONE_TRIES || (await this.#isUnsettled(deadline)); tries++) {
      if (performance.now() >= deadline) break;
      await sleep(backoff);
      backoff = Math.min(backoff * 2, MAX_BACKOFF_MS);
      try {
        await request();
        return;
      } catch (error) {
        if ((error as StoreError).code !== 'GONE') throw error;
        failure = error as StoreError;
      }
    }
    throw failure;
  }

  /** Whether members have changed lately. */
  async #isUnsettled(deadline: number): Promise<boolean> {
    await this.readEpoch(Math.max(0, deadline - performance.now()));
    return performance.now() - this.#epochChangedAt < SETTLING_MS;
  }
}
