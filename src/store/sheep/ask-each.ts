/**
 * Sends each of several nodes a request of its own, about what only that node knows. While a node still owes an earlier answer,
 * it is not waited for. Owns that rule; connections are the pool's.
 */
import { StoreError } from '../store-error.js';
import { ConnectionLost, type Answer, type NodeConnection, type WireRequest } from './connection.js';
import { NODE_REST_MS, type PoolNode } from './pool-node.js';

/** A node that takes longer counts as silent until it answers. */
const LATE_MS = 2_000;
const LATE = Symbol('late');

/** How nodes are asked. */
export interface AskedPool {
  readonly isClosed: boolean;
  /** For one request. */
  readonly attemptMs: number;
  /** Errors: ConnectionLost, StoreError CLOSED. */
  open(node: PoolNode): Promise<NodeConnection>;
}

/** The answer; undefined if the node does not answer soon, or cannot be reached. */
export async function askSoon(pool: AskedPool, node: PoolNode, request: WireRequest): Promise<Answer | undefined> {
  if (pool.isClosed) return undefined;
  if (node.isLate) {
    if (performance.now() >= node.askAgainAt) awaitLate(node, ask(pool, node, request));
    return undefined;
  }
  const asked = ask(pool, node, request);
  const answer = await withinMs(LATE_MS, asked);
  if (answer !== LATE) return answer;
  awaitLate(node, asked);
  return undefined;
}

/** The late answer has the deadline of any request: other requests use the same connection. */
function awaitLate(node: PoolNode, asked: Promise<Answer | undefined>): void {
  node.isLate = true;
  node.askAgainAt = Infinity;
  void asked.then((answer) => {
    node.isLate = answer === undefined;
    node.askAgainAt = performance.now() + NODE_REST_MS;
  });
}

async function ask(pool: AskedPool, node: PoolNode, request: WireRequest): Promise<Answer | undefined> {
  try {
    const connection = node.connections[0] ?? (await pool.open(node));
    return await connection.send(request, pool.attemptMs);
  } catch (error) {
    if (!(error instanceof ConnectionLost || error instanceof StoreError)) throw error;
    return undefined;
  }
}

async function withinMs<T>(ms: number, work: Promise<T>): Promise<T | typeof LATE> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<typeof LATE>((resolve) => (timer = setTimeout(() => resolve(LATE), ms).unref()));
  try {
    return await Promise.race([work, late]);
  } finally {
    clearTimeout(timer);
  }
}
