/** The shape of a route of the control API, and what routes can call. Requests are matched to routes in control-server.ts. */
import type { Disconnected, ReloadReport, StatusAnswer } from '../../operations/control-protocol.js';
import type { DirectOperations } from '../../operations/direct-operations.js';
import type { Body } from './request-fields.js';

/** What the routes call. */
export interface ControlTarget {
  readonly operations: DirectOperations;
  readonly status: () => StatusAnswer;
  /** Reads TLS keys and access rules again. */
  readonly reload: () => Promise<ReloadReport>;
  /** Cut an NBD connection off, and keep its client from opening the same disk to write for `keepOutMs`. Errors: NO_CLIENT. */
  readonly disconnect: (id: number, keepOutMs: number) => Promise<Disconnected>;
  /** Resolves when the NBD connection that came through the control socket as `session` is over. */
  readonly sessionEnd: (session: string) => Promise<void>;
}

/** One request, with the functions that its route may call. */
export interface Call extends ControlTarget {
  /** The decoded path segments at the places of "*". */
  readonly names: readonly string[];
  readonly query: URLSearchParams;
  readonly body: Body;
}

export interface Route {
  readonly method: 'GET' | 'POST' | 'DELETE';
  /** Segments; "*" matches any one. */
  readonly path: readonly string[];
  /** The answer, sent as JSON; a list is streamed. */
  readonly answer: (call: Call) => unknown;
}
