/** What the pool knows of one node: how to reach it, its connections, and how it has behaved. Holds state, decides nothing. */
import type { NodeAddress } from '../../sheepdog/node-address.js';
import type { NodeConnection, Peer } from './connection.js';

/** A node that could not be reached, or was left, is not tried before the others for this long. */
export const NODE_REST_MS = 2_000;

export interface PoolNode {
  readonly address: NodeAddress;
  readonly connections: NodeConnection[];
  opening: number;
  restUntil: number;
  readonly peer: Peer;
  /** It carries out requests: its cluster is formatted, and it has joined it. As of its first connection. */
  isServing: boolean;
  /** The reason for leaving it in the latest log line, and when that was. */
  told: string;
  toldAt: number;
  /** It is late with its answer to askSoon (ask-each.ts), or could not be asked; `askAgainAt`: by performance.now(). */
  isLate: boolean;
  askAgainAt: number;
  /** Failures in a row: it could not be connected to, or closed a connection before any answer. */
  failures: number;
}

export function poolNodeAt(address: NodeAddress): PoolNode {
  return {
    address,
    connections: [],
    opening: 0,
    restUntil: 0,
    peer: { epoch: 0, knowsVids: false },
    isServing: true,
    told: '',
    toldAt: -Infinity,
    isLate: false,
    askAgainAt: 0,
    failures: 0,
  };
}
