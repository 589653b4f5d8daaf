/** The shape of a route of the control API, and how a request is matched to one. */
import type { Disconnected, ReloadReport, StatusAnswer } from '../../operations/control-protocol.js';
import type { DirectOperations } from '../../operations/direct-operations.js';
import type { Body } from './request-fields.js';

/** What the routes call. */
export interface ControlTarget {
  readonly operations: DirectOperations;
  readonly status: () => StatusAnswer;
  /** Reads TLS keys and access rules again. */
  readonly reload: () => Promise<ReloadReport>;
  /** Cut a connection of the NBD server off, and keep its client from writing the same disk for `keepOutMs`. Errors: NO_CLIENT. */
  readonly disconnect: (id: number, keepOutMs: number) => Promise<Disconnected>;
  /** Resolves when the NBD connection that came through the control socket as `session` is over. */
  readonly sessionEnd: (session: string) => Promise<void>;
}

/** One request, and what it may call. */
export interface Call extends ControlTarget {
  /** The decoded path segments that the route leaves open. */
  readonly names: readonly string[];
  readonly query: URLSearchParams;
  readonly body: Body;
}

export interface Route {
  readonly method: 'GET' | 'POST' | 'DELETE';
  /** Segments; "*" stands for any one. */
  readonly path: readonly string[];
  /** What is sent as JSON; a list is streamed. */
  readonly answer: (call: Call) => unknown;
}
