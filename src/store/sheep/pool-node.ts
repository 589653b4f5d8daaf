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
  /** It carries out requests: its cluster is formatted, and it has joined it. As of when it was connected to. */
  isServing: boolean;
  /** The reason for which it was left the last time that this was told, and when. */
  told: string;
  toldAt: number;
  /** It has not answered what each node was asked in time, nor since; and it is asked again then, by performance.now(). */
  isLate: boolean;
  askAgainAt: number;
  /** Times in a row that it could not be connected to, or that a connection ended before it was of any use. */
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
