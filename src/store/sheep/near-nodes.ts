/**
 * Where objects lie, for reads that go directly to the node with the first copy. Owns the placement and how old it may be. A
 * hint: without it, or when it is wrong, the node in use serves the read.
 */
import { Placement } from '../../sheepdog/hash-ring.js';
import type { ClusterNode } from '../../sheepdog/nodes.js';
import type { PoolNode } from './pool-node.js';

/** Nodes that reads go to directly. */
const MAX_NEAR_NODES = 64;
/** Maximum age of the list of nodes that decides where reads go. */
const PLACEMENT_AGE_MS = 10_000;

export class NearNodes {
  #placement: Placement | undefined;
  /** The nodes that `#placement` was made from. */
  #nodes: readonly PoolNode[] = [];
  #learntAt = -Infinity;
  #isByDisk = false;

  /** The cluster places objects by the disks of its nodes: the list of nodes is fetched again. */
  placeByDisk(): void {
    this.#isByDisk = true;
    this.#placement = undefined;
    this.#nodes = [];
    this.#learntAt = -Infinity;
  }

  /** Whether the caller must fetch the list of nodes again: true for the first caller only. `now`: performance.now(). */
  takesTurn(now: number): boolean {
    if (now - this.#learntAt <= PLACEMENT_AGE_MS) return false;
    this.#learntAt = now;
    return true;
  }

  /** These are the members; `nodes`: the same, as the pool knows them. */
  learn(members: readonly ClusterNode[], nodes: readonly PoolNode[]): void {
    this.#learntAt = performance.now();
    if (members.length > MAX_NEAR_NODES) return;
    if (!isSame(this.#nodes, nodes)) this.#placement = new Placement(members, this.#isByDisk);
    this.#nodes = nodes;
  }

  /** The node with the first copy of data object (vid, idx), where that is known. */
  nodeFor(vid: number, idx: number): PoolNode | undefined {
    return this.#nodes[this.#placement?.nodeOf(vid, idx) ?? -1];
  }
}

function isSame(before: readonly PoolNode[], after: readonly PoolNode[]): boolean {
  return before.length === after.length && before.every((node, n) => node === after[n]);
}
