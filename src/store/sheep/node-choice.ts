/**
 * Which node requests go to: the one in use, and in which order the others are tried when it is left. Owns the list of nodes,
 * named and learnt, and the reasons for leaving one. Connects to none.
 */
import { addressLabel, type NodeAddress } from '../../sheepdog/node-address.js';
import { NODE_REST_MS, poolNodeAt, type PoolNode } from './pool-node.js';

/** Connections that a node may end, one after the other, without having answered anything on them, before it is left. */
const MAX_USELESS = 3;
/** A node that cannot be reached directly (clusters may have a network of their own) is not asked again for this long. */
export const NEAR_REST_MS = 30_000;
/** The log repeats the same reason for leaving a node only after this long. */
const TELL_AGAIN_MS = 60_000;

export class NodeChoice {
  readonly nodes: PoolNode[];
  /** The first ones, as many as this, were named to us; the others are learnt. */
  readonly #namedCount: number;
  readonly #log: (line: string, details?: object) => void;
  #current: PoolNode;

  /** `addresses`: at least one; the first is tried first. */
  constructor(addresses: readonly NodeAddress[], log: (line: string, details?: object) => void) {
    const [first, ...rest] = addresses.map(poolNodeAt);
    if (!first) throw new Error('invariant: a pool of nodes needs an address');
    this.nodes = [first, ...rest];
    this.#namedCount = this.nodes.length;
    this.#current = first;
    this.#log = log;
  }

  /** The node in use. */
  get current(): PoolNode {
    return this.#current;
  }

  isNamed(node: PoolNode): boolean {
    return this.nodes.indexOf(node) < this.#namedCount;
  }

  /** From now on this is the node in use. `failure`: why the one before is not, if that is known. */
  use(node: PoolNode, failure: Error | undefined): void {
    if (this.#current === node) return;
    const label = addressLabel(node.address);
    const why = failure === undefined ? '' : ` (${failure.message})`;
    this.#log(`now using the Sheepdog node ${label}${why}`, { node: label });
    this.#current = node;
  }

  /** The order in which nodes are tried: the one in use first, those that could not be reached lately last. */
  inOrder(): PoolNode[] {
    const now = performance.now();
    const start = this.nodes.indexOf(this.#current);
    const order = this.nodes.map((_, n) => this.nodes[(start + n) % this.nodes.length] as PoolNode);
    return order.sort((a, b) => Number(a.restUntil > now) - Number(b.restUntil > now) || a.failures - b.failures);
  }

  nodeOf({ host, port }: NodeAddress): PoolNode {
    const label = addressLabel({ host, port });
    const known = this.nodes.find(({ address }) => addressLabel(address) === label);
    if (known) return known;
    const node = poolNodeAt({ host, port });
    this.nodes.push(node);
    return node;
  }

  /** The node answers a greeting, and closes the connection on further requests. */
  wasUseless(node: PoolNode): void {
    if (++node.failures < MAX_USELESS) return;
    if (node === this.#current) this.leaveCurrent('it ends connections and answers nothing', node.address);
    else node.restUntil = performance.now() + NEAR_REST_MS;
  }

  /** Leaves the node in use if it is `from`: new requests go to the next node. Its requests in flight stay. */
  leaveCurrent(why: string, from: NodeAddress): void {
    if (this.nodes.length < 2 || this.#current.address !== from) return;
    const left = this.#current;
    left.restUntil = performance.now() + NODE_REST_MS;
    const next = this.nodes[(this.nodes.indexOf(left) + 1) % this.nodes.length] as PoolNode;
    this.#current = next;
    if (left.told === why && performance.now() - left.toldAt < TELL_AGAIN_MS) return;
    left.told = why;
    left.toldAt = performance.now();
    const label = addressLabel(left.address);
    this.#log(`leaving the Sheepdog node ${label}: ${why}`, { node: label });
  }

  /** A node with trouble with its disk or its peers: the one in use is left, any other gets no direct reads for a while. */
  leaveTroubled(address: NodeAddress | undefined, why: string): void {
    const node = this.nodes.find((other) => other.address === address);
    if (node === this.#current) this.leaveCurrent(why, node.address);
    else if (node) node.restUntil = performance.now() + NEAR_REST_MS;
  }

  /** A silent node gets no new requests for a while. Those in flight on its other connections keep their deadlines. */
  leaveSilent(address: NodeAddress): void {
    this.leaveCurrent('it does not answer', address);
    const node = this.nodes.find((other) => other.address === address);
    if (!node || node === this.#current) return;
    node.restUntil = performance.now() + NEAR_REST_MS;
    for (const connection of [...node.connections]) if (connection.inFlight === 0) connection.destroy();
  }

  triedLabel(): string {
    return this.nodes.map(({ address }) => addressLabel(address)).join(', ');
  }
}
