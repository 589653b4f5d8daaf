/** How long a NodePool tries requests and over how many connections: the options of a pool and of one request, and their defaults. */
import { WAITING_MS } from './waiting.js';

/** How long requests are repeated while no node can serve them. */
const DEFAULT_RETRY_MS = 60_000;
/**
 * How long one attempt may take; half of the time for repeating if that is less, so that another node can be tried. Long, because
 * a write is repeated only when the node can no longer carry it out.
 */
const DEFAULT_ATTEMPT_MS = 30_000;
const DEFAULT_CONNECTIONS = 4;

export interface NodePoolOptions {
  readonly retryMs?: number;
  readonly attemptMs?: number;
  /** To the node in use. */
  readonly connections?: number;
  readonly log?: (line: string, details?: object) => void;
  /** How long a request must have waited for the log to say so. */
  readonly waitingMs?: number;
}

export interface ExecuteOptions {
  /**
   * Called before a repetition when it is not known whether the last attempt took effect. True: it did, and is not repeated.
   * Without this, requests are simply repeated. `retryMs`: what is left of the time for repeating.
   */
  readonly beforeRetry?: (retryMs: number) => Promise<boolean>;
  /** Fails at once when it is not known whether the attempt took effect. */
  readonly once?: boolean;
  /** How long the request is repeated; default: the pool's `retryMs`. */
  readonly retryMs?: number;
  /**
   * On a connection of its own; each node is tried within `retryMs`. For answers that are needed soon or not at all: a slow node
   * loses only this connection, and no other request fails with it. Only for requests that change nothing.
   */
  readonly isApart?: boolean;
  /** For a slow operation: how long one attempt may take while the node answers other requests. */
  readonly slowMs?: number;
}

export const NO_OPTIONS: ExecuteOptions = {};

export function withDefaults(options: NodePoolOptions): Required<NodePoolOptions> {
  const retryMs = options.retryMs ?? DEFAULT_RETRY_MS;
  return {
    retryMs,
    attemptMs: options.attemptMs ?? Math.min(DEFAULT_ATTEMPT_MS, retryMs / 2),
    connections: options.connections ?? DEFAULT_CONNECTIONS,
    log: options.log ?? (() => undefined),
    waitingMs: options.waitingMs ?? WAITING_MS,
  };
}
