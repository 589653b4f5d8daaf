/**
 * Sends requests to a cluster: over several connections to one node at a time, to another node when that one goes away, and
 * again, for a bounded time, while the cluster answers "not now". Owns connections, deadlines and back-off. A request that it
 * repeats must be safe to repeat, or tell through `beforeRetry` whether it has already taken effect.
 */
import { encodeVdiRequest, inVersion, nodeResponse, opcodeOf } from '../../sheepdog/headers.js';
import { addressLabel, type NodeAddress } from '../../sheepdog/node-address.js';
import { decodeNodes, type ClusterNode } from '../../sheepdog/nodes.js';
import {
  HEADER_BYTES,
  MAX_NODES,
  NODE_BYTES,
  Opcode,
  Result,
  resultName,
  type SheepVersion,
} from '../../sheepdog/protocol.js';
import { Pauses } from '../../system/pauses.js';
import { StoreError } from '../store-error.js';
import { askSoon } from './ask-each.js';
import { AwaitedRequests, type Repeated } from './awaited-requests.js';
import {
  CONNECT_TIMEOUT_MS,
  ConnectionLost,
  NoAnswer,
  NodeConnection,
  NotSheepdog,
  type Answer,
  type Peer,
  type WireRequest,
} from './connection.js';
import { decodedOr } from './format-errors.js';
import { greet, NOT_SERVING, serves } from './greeting.js';
import { NearNodes } from './near-nodes.js';
import { NEAR_REST_MS, NodeChoice } from './node-choice.js';
import { isFinal, isTrouble, isWrite, NotConnected, Outdated } from './outcomes.js';
import { NODE_REST_MS, type PoolNode } from './pool-node.js';
import { NO_OPTIONS, withDefaults, type ExecuteOptions, type NodePoolOptions } from './pool-options.js';
import { InDoubt, probe, StalledNodes } from './stalled-nodes.js';

/** For the list of members while a node is silent. */
const MEMBERS_MS = 2_000;
/** To connect to a node that is slow with one request, and find out whether it answers others. */
const SLOW_PROBE_CONNECT_MS = 2_000;
/**
 * Least time for an attempt, however little is left of the time for repeating: a late answer closes the connection, and other
 * requests on it fail.
 */
const LEAST_ATTEMPT_MS = 5_000;
/** Least time for connecting, however little is left. */
const LEAST_CONNECT_MS = 250;
/** The same for an attempt on a connection of its own. */
const LEAST_APART_MS = 250;
/** A node that is at an earlier epoch, or does not serve, is left after this long, if there is another one. */
const LAGGING_MS = 1_000;
/** Least time for connecting to a named node, when the nodes named before it have used up the time. */
const LATE_CONNECT_MS = 500;
const FIRST_BACKOFF_MS = 20;
const LONGEST_BACKOFF_MS = 1_000;
/** Retries after trouble of a node with its disk or its peers: enough to try another node, not for a minute. */
const MAX_TROUBLE_RETRIES = 8;
/** Connections for reads, to each node but the one in use. */
const NEAR_CONNECTIONS = 2;

/** In place of an answer that was lost: the request has taken effect. */
const DONE: Answer = { result: Result.SUCCESS, epoch: 0, length: 0, header: Buffer.alloc(HEADER_BYTES) };

export class NodePool {
  readonly #choice: NodeChoice;
  readonly #near = new NearNodes();
  readonly #awaited: AwaitedRequests;
  readonly #options: Required<NodePoolOptions>;
  #turn = 0;
  #closed = false;
  #learning = false;
  readonly #stalled = new StalledNodes(
    () => this.listNodes({ retryMs: MEMBERS_MS, isApart: true }),
    () => this.#closed,
  );
  /** Connections that are not shared: the node has not answered its greeting yet, or they are for one request. */
  readonly #apart = new Set<NodeConnection>();
  /** Back-offs. */
  readonly #pauses = new Pauses();
  /** Of all nodes of the cluster; the first node that answers decides. */
  #version: SheepVersion | undefined;
  /** Called with the epoch in answers. */
  onEpoch: (epoch: number) => void = () => undefined;
  /** The known epoch of the cluster: answers of nodes at an earlier epoch may be outdated. */
  knownEpoch: () => number = () => 0;
  onClose: () => void = () => undefined;

  /** `addresses`: at least one; the first is tried first. */
  constructor(addresses: readonly NodeAddress[], options: NodePoolOptions = {}) {
    this.#options = withDefaults(options);
    this.#choice = new NodeChoice(addresses, this.#options.log);
    this.#awaited = new AwaitedRequests(this.#choice.nodes, options.log, this.#options.waitingMs);
  }

  /** The disk that an object belongs to, by the halves of its oid: for the log. */
  set diskOf(diskOf: (high: number, low: number) => string | undefined) {
    this.#awaited.diskOf = diskOf;
  }

  get diskOf(): (high: number, low: number) => string | undefined {
    return this.#awaited.diskOf;
  }

  get isClosed(): boolean {
    return this.#closed;
  }

  get attemptMs(): number {
    return this.#options.attemptMs;
  }

  /** The version of the nodes; undefined until one has answered. */
  get version(): SheepVersion | undefined {
    return this.#version;
  }

  get retryMs(): number {
    return this.#options.retryMs;
  }

  /** The node in use. */
  get peer(): Peer {
    return this.#choice.current.peer;
  }

  /** Errors: IO (no node can be connected to in the time for repeating). */
  async whenConnected({ retryMs = this.#options.retryMs }: ExecuteOptions): Promise<void> {
    if (this.#version !== undefined) return;
    // Any answer will do.
    await this.listNodes({ retryMs });
  }

  /**
   * Sends the request until a node carries it out, or the time for repeating is over. Any result but "not now" and "trouble"
   * (outcomes.ts) is returned. Errors: IO (given up), InDoubt (given up, and may still take effect), CLOSED.
   */
  execute(request: WireRequest, options: ExecuteOptions = NO_OPTIONS): Promise<Answer> {
    if (options.isApart) return this.#executeApart(request, options);
    return this.#executeOn(this.#idleConnection(), request, options);
  }

  /**
   * The same for a read of data object (vid, idx), sent to the node with the first copy where it is known and can be reached.
   * Not for writes: nodes learn one after the other that a snapshot was taken, and of two writes through different nodes the
   * later one could be in the snapshot and the earlier one not.
   *
   * The node must not be at an earlier epoch than is known, when it is asked and when it answers: it may have been stopped, and
   * dropped meanwhile, and have read its stale copy before it learnt of that. Then the read is repeated through the node in
   * use.
   */
  executeNear(request: WireRequest, vid: number, idx: number): Promise<Answer> {
    return this.#executeOn(this.#nearConnection(vid, idx) ?? this.#idleConnection(), request, NO_OPTIONS);
  }

  /** One answer from every member of the cluster. Errors: IO (also if one of them cannot be asked). */
  async executeOnAll(encode: () => Buffer): Promise<Answer[]> {
    const nodes = (await this.listNodes()).map((member) => this.#choice.nodeOf(member));
    return Promise.all(
      nodes.map(async (node) => {
        try {
          const [open] = node.connections;
          if (!open && node.restUntil > performance.now())
            throw new NotConnected('it could not be reached a moment ago');
          const connection = open ?? (await this.open(node));
          const ask = (): Promise<Answer> =>
            connection.send({ header: inVersion(encode(), this.#version) }, this.#options.attemptMs);
          const wasBehind = this.#isBehind(connection);
          let answer = await ask();
          // It was not asked since members changed, so only now its epoch is known, and with it what its answers are worth.
          if (wasBehind) answer = await ask();
          if (answer.epoch < this.knownEpoch()) throw new Outdated(connection, this.knownEpoch());
          return answer;
        } catch (error) {
          if (!(error instanceof ConnectionLost)) throw error;
          node.restUntil = Math.max(node.restUntil, performance.now() + NODE_REST_MS);
          const label = addressLabel(node.address);
          throw new StoreError('IO', `the node ${label} cannot be asked: ${error.message}`, { cause: error });
        }
      }),
    );
  }

  /**
   * Sends each node its own request, once. The answer is undefined for a node that does not answer soon, or cannot be reached.
   * While a node still owes an earlier answer, it is not waited for.
   */
  askEach(nodes: readonly ClusterNode[], requests: readonly WireRequest[]): Promise<(Answer | undefined)[]> {
    return Promise.all(
      nodes.map((member, n) => askSoon(this, this.#choice.nodeOf(member), requests[n] as WireRequest)),
    );
  }

  async #executeOn(open: NodeConnection | undefined, request: WireRequest, options: ExecuteOptions): Promise<Answer> {
    const retryMs = options.retryMs ?? this.#options.retryMs;
    const deadline = performance.now() + retryMs;
    if (open) {
      const wasBehind = this.#isBehind(open);
      try {
        const answer = await this.#attempt(open, request, options, retryMs);
        if (this.#isOutdated(wasBehind, answer, request, options)) throw new Outdated(open, this.knownEpoch());
        if (isFinal(answer)) return answer;
        return await this.#repeat(request, options, deadline, answer, open.address);
      } catch (error) {
        if (!(error instanceof ConnectionLost)) throw error;
        return this.#repeat(request, options, deadline, error, open.address);
      }
    }
    return this.#repeat(request, options, deadline, undefined, undefined);
  }

  #isBehind({ peer }: NodeConnection): boolean {
    return peer.epoch < this.knownEpoch();
  }

  /**
   * Whether the answer comes from a node that does not know the latest change of members: it may no longer be a member, and its
   * data may be stale. `wasBehind`: it was at an earlier epoch when it was asked; its answer has the epoch of the answer, and
   * it may have carried out the request before. The list of members is accepted from any node: it shows when the known epoch is
   * wrong.
   */
  #isOutdated(wasBehind: boolean, { epoch }: Answer, { header }: WireRequest, { once }: ExecuteOptions): boolean {
    return (wasBehind || epoch < this.knownEpoch()) && !once && opcodeOf(header) !== Opcode.GET_NODE_LIST;
  }

  /** Sends the request once. `leftMs`: what is left of the time for repeating. Errors: ConnectionLost. */
  #attempt(
    connection: NodeConnection,
    request: WireRequest,
    { slowMs, retryMs }: ExecuteOptions,
    leftMs: number,
  ): Promise<Answer> {
    inVersion(request.header, this.#version);
    if (slowMs !== undefined) return this.#attemptSlowly(connection, request, slowMs);
    const { attemptMs } = this.#options;
    // With less time than usual, half of it, so that another node can be tried.
    const longest = retryMs === undefined ? attemptMs : Math.min(attemptMs, retryMs / 2);
    return connection.send(request, Math.min(longest, Math.max(leftMs, LEAST_ATTEMPT_MS)));
  }

  /** Waits up to `slowMs` while the node answers other requests; a silent node is given up. */
  async #attemptSlowly(connection: NodeConnection, request: WireRequest, slowMs: number): Promise<Answer> {
    let isOver = false;
    const giveUpIfSilent = async (): Promise<void> => {
      const state = await probe(connection.address, SLOW_PROBE_CONNECT_MS);
      if (state !== 'answers' && !isOver) connection.giveUp();
    };
    const timer = setInterval(() => void giveUpIfSilent(), this.#options.attemptMs);
    try {
      return await connection.send(request, slowMs);
    } finally {
      isOver = true;
      clearInterval(timer);
    }
  }

  /** Closes all connections; requests in flight fail. */
  close(): void {
    this.#closed = true;
    this.onClose();
    this.#awaited.close();
    for (const node of this.#choice.nodes) for (const connection of [...node.connections]) connection.destroy();
    for (const connection of [...this.#apart]) connection.destroy();
    this.#pauses.end();
  }

  /** While `work` asks again and again for an object of `disk`, the log counts it as one request that waits for `why`. */
  whileAwaited<T>(disk: string, why: string, work: () => Promise<T>): Promise<T> {
    return this.#awaited.whileAwaited(disk, why, work);
  }

  #repeat(
    request: WireRequest,
    options: ExecuteOptions,
    deadline: number,
    first: Answer | ConnectionLost | undefined,
    asked: NodeAddress | undefined,
  ): Promise<Answer> {
    const since = deadline - (options.retryMs ?? this.#options.retryMs);
    const waiter = { request, since, why: `no connection to ${this.#choice.triedLabel()} yet` };
    return this.#awaited.whileRepeated(waiter, () => this.#repeatAs(waiter, options, deadline, first, asked));
  }

  async #repeatAs(
    waiter: Repeated,
    options: ExecuteOptions,
    deadline: number,
    first: Answer | ConnectionLost | undefined,
    askedFirst: NodeAddress | undefined,
  ): Promise<Answer> {
    const { request } = waiter;
    let backoff = FIRST_BACKOFF_MS;
    let trouble = 0;
    let laggingSince: number | undefined;
    let last = first;
    let asked = askedFirst;
    let isAmbiguous = first instanceof ConnectionLost || (first !== undefined && isTrouble(first));
    for (;;) {
      if (last !== undefined) {
        if (this.#closed) throw closedError();
        const reason = last instanceof Error ? last.message : `the cluster answers ${resultName(last.result)}`;
        waiter.why = last instanceof Error || !asked ? reason : `${reason} (${addressLabel(asked)})`;
        if (!(last instanceof Error) && isTrouble(last)) {
          trouble++;
          this.#choice.leaveTroubled(asked, `it answers ${resultName(last.result)}`);
        }
        if (last instanceof Outdated || (!(last instanceof Error) && NOT_SERVING.has(last.result))) {
          laggingSince ??= performance.now();
          if (asked && performance.now() - laggingSince >= LAGGING_MS) {
            this.#choice.leaveCurrent(
              last instanceof Error ? 'it does not know the latest change of members' : reason,
              asked,
            );
            laggingSince = undefined;
          }
        } else laggingSince = undefined;
        if (last instanceof NotSheepdog && asked)
          this.#choice.leaveCurrent('its answers are not those of a node', asked);
        if (last instanceof NoAnswer) {
          this.#choice.leaveSilent(last.address);
          if (isWrite(request) && !options.once) {
            waiter.why = `${reason}, and may still carry out the request, which is not repeated before the node has answered or left`;
            await this.#waitUntilHarmless(last, deadline);
          }
        }
        if (isAmbiguous && options.once) {
          throw new StoreError(
            'IO',
            `${reason}; it is not known whether the request was carried out: see 'sheepgate vdi list'`,
          );
        }
        if (performance.now() >= deadline || trouble > MAX_TROUBLE_RETRIES) {
          throw new StoreError('IO', `${reason}; given up after trying ${this.#choice.triedLabel()}`, {
            cause: last instanceof Error ? last : undefined,
          });
        }
        await this.#sleep(backoff);
        backoff = Math.min(backoff * 2, LONGEST_BACKOFF_MS);
        if (isAmbiguous && options.beforeRetry) {
          const left = Math.max(LEAST_APART_MS, deadline - performance.now());
          if (await options.beforeRetry(left)) return DONE;
        }
      }
      try {
        const connection = this.#idleConnection() ?? (await this.#connect(deadline));
        asked = connection.address;
        const wasBehind = this.#isBehind(connection);
        // From here on the node may have received it.
        const answer = await this.#attempt(connection, request, options, deadline - performance.now());
        if (this.#isOutdated(wasBehind, answer, request, options)) throw new Outdated(connection, this.knownEpoch());
        if (isFinal(answer)) return answer;
        if (isTrouble(answer)) isAmbiguous = true;
        last = answer;
      } catch (error) {
        if (!(error instanceof ConnectionLost)) throw error;
        if (!(error instanceof NotConnected)) isAmbiguous = true;
        last = error;
      }
    }
  }

  /** An open connection to the node with the first copy of the object; opens one in the background if there is none. */
  #nearConnection(vid: number, idx: number): NodeConnection | undefined {
    if (this.#closed) throw closedError();
    const now = performance.now();
    if (this.#near.takesTurn(now)) void this.#learnNodes();
    const node = this.#near.nodeFor(vid, idx);
    if (!node || node === this.#choice.current || node.restUntil > now) return undefined;
    // Epoch 0: never asked; its greeting will tell.
    if (node.peer.epoch !== 0 && node.peer.epoch < this.knownEpoch()) return undefined;
    const { connections } = node;
    if (connections.length + node.opening < NEAR_CONNECTIONS) {
      this.open(node).catch(() => (node.restUntil = performance.now() + NEAR_REST_MS));
    }
    this.#turn++;
    return connections[this.#turn % connections.length];
  }

  /** The cluster places objects by the disks of its nodes. */
  placeByDisk(): void {
    this.#near.placeByDisk();
  }

  /** Waits for a stalled node. Errors: InDoubt (the time for repeating is over first). */
  async #waitUntilHarmless(lost: NoAnswer, deadline: number): Promise<void> {
    const settled = this.#stalled.whenHarmless(lost.remote);
    const isSettled = settled.then(() => true);
    if (await Promise.race([isSettled, this.#sleep(deadline - performance.now()).then(() => false)])) return;
    if (this.#closed) throw closedError();
    throw new InDoubt(
      `${lost.message}, and may still carry out the request, because it is a member of the cluster; ` +
        "the request is not repeated before this node has answered or left; 'sheepgate node list' shows its state",
      settled,
    );
  }

  /** An open connection to the node in use; opens one more in the background while there are too few. */
  #idleConnection(): NodeConnection | undefined {
    if (this.#closed) throw closedError();
    const { connections } = this.#choice.current;
    if (connections.length === 0) return undefined;
    if (connections.length + this.#choice.current.opening < this.#options.connections) {
      this.open(this.#choice.current).catch(() => undefined);
    }
    this.#turn = (this.#turn + 1) % connections.length;
    return connections[this.#turn];
  }

  /**
   * A connection to the first node that can be reached before `deadline`; the one in use is tried first. A node that does not
   * serve is taken only if none does. Errors: NotConnected.
   */
  async #connect(deadline: number): Promise<NodeConnection> {
    const order = this.#choice.inOrder();
    let failure: Error | undefined;
    let idle: { readonly node: PoolNode; readonly connection: NodeConnection } | undefined;
    for (const node of order) {
      if (this.#closed) throw closedError();
      try {
        const left = deadline - performance.now();
        const isNamed = this.#choice.isNamed(node);
        if (failure !== undefined && left <= 0 && !isNamed) continue;
        // Half of what is left, so that another node can be tried.
        const share = node === order.at(-1) ? left : left / 2;
        const least = isNamed && failure !== undefined ? LATE_CONNECT_MS : LEAST_CONNECT_MS;
        const connectMs = Math.min(CONNECT_TIMEOUT_MS, Math.max(least, share));
        const connection = node.connections[0] ?? (await this.open(node, connectMs));
        if (node.isServing) return this.#use(node, connection, failure);
        failure = new Error(`${addressLabel(node.address)} does not serve yet`);
        idle ??= { node, connection };
      } catch (error) {
        failure = error as Error;
        node.restUntil = performance.now() + NODE_REST_MS;
      }
    }
    if (idle) return this.#use(idle.node, idle.connection, failure);
    throw new NotConnected(failure?.message ?? 'no node', { cause: failure });
  }

  #use(node: PoolNode, connection: NodeConnection, failure: Error | undefined): NodeConnection {
    this.#choice.use(node, failure);
    void this.#learnNodes();
    return connection;
  }

  /** Errors: IO, CLOSED. */
  async #executeApart(request: WireRequest, options: ExecuteOptions): Promise<Answer> {
    const deadline = performance.now() + (options.retryMs ?? this.#options.retryMs);
    let backoff = FIRST_BACKOFF_MS;
    let reason = 'no node';
    for (;;) {
      const order = this.#choice.inOrder();
      for (const node of order) {
        if (this.#closed) throw closedError();
        const left = deadline - performance.now();
        const timeoutMs = Math.max(LEAST_APART_MS, node === order.at(-1) ? left : left / 2);
        try {
          const answer = await this.#askApart(node, request, options, timeoutMs);
          if (isFinal(answer)) return answer;
          reason = `the cluster answers ${resultName(answer.result)}`;
        } catch (error) {
          if (!(error instanceof ConnectionLost)) throw error;
          reason = error.message;
        }
        if (performance.now() >= deadline) {
          throw new StoreError('IO', `${reason}; given up after trying ${this.#choice.triedLabel()}`);
        }
      }
      await this.#sleep(Math.min(backoff, deadline - performance.now()));
      backoff = Math.min(backoff * 2, LONGEST_BACKOFF_MS);
    }
  }

  async #askApart(node: PoolNode, request: WireRequest, options: ExecuteOptions, timeoutMs: number): Promise<Answer> {
    const deadline = performance.now() + timeoutMs;
    const connection = await NodeConnection.connect(node.address, () => undefined, timeoutMs);
    this.#apart.add(connection);
    try {
      if (this.#closed) throw closedError();
      const leftMs = (): number => Math.max(LEAST_APART_MS, deadline - performance.now());
      this.#version = await greet(connection, leftMs(), this.#version);
      connection.watchEpoch(node.peer, this.onEpoch);
      const wasBehind = this.#isBehind(connection);
      inVersion(request.header, this.#version);
      const answer = await connection.send(request, leftMs());
      if (this.#isOutdated(wasBehind, answer, request, options)) throw new Outdated(connection, this.knownEpoch());
      return answer;
    } finally {
      this.#apart.delete(connection);
      connection.destroy();
    }
  }

  /** Connects and greets the node, within `timeoutMs` altogether. Errors: ConnectionLost, CLOSED. */
  async open(node: PoolNode, timeoutMs = CONNECT_TIMEOUT_MS): Promise<NodeConnection> {
    const deadline = performance.now() + timeoutMs;
    node.opening++;
    let greetings = 0;
    try {
      const onClose = (): void => {
        const at = node.connections.indexOf(connection);
        if (at < 0) return;
        node.connections.splice(at, 1);
        // The node may have been restarted.
        if (node.connections.length === 0) node.peer.knowsVids = false;
        if (connection.answers > greetings) node.failures = 0;
        else if (connection.sent > greetings && !this.#closed) this.#choice.wasUseless(node);
      };
      const connection: NodeConnection = await NodeConnection.connect(node.address, onClose, timeoutMs);
      this.#apart.add(connection);
      try {
        if (!this.#closed) {
          this.#version = await greet(connection, deadline - performance.now(), this.#version);
          const isFirst = node.connections.length === 0;
          if (isFirst) node.isServing = await serves(connection, deadline - performance.now(), this.#version);
        }
        greetings = connection.answers;
      } finally {
        this.#apart.delete(connection);
      }
      if (this.#closed) {
        connection.destroy();
        throw closedError();
      }
      connection.watchEpoch(node.peer, this.onEpoch);
      node.connections.push(connection);
      return connection;
    } catch (error) {
      node.failures++;
      throw error;
    } finally {
      node.opening--;
    }
  }

  /** Learns the other nodes of the cluster, to try them later. A hint: failures change nothing. */
  async #learnNodes(): Promise<void> {
    if (this.#learning || this.#closed) return;
    this.#learning = true;
    try {
      const members = await this.listNodes();
      const nodes = members.map((member) => this.#choice.nodeOf(member));
      this.#near.learn(members, nodes);
    } catch (error) {
      this.#couldNotLearn(error as Error);
    } finally {
      this.#learning = false;
    }
  }

  #couldNotLearn({ message }: Error): void {
    if (!this.#closed) this.#options.log(`cannot list the nodes of the cluster: ${message}`);
  }

  /** The members of the cluster. Errors: IO, CLOSED. */
  async listNodes(options: ExecuteOptions = NO_OPTIONS): Promise<ClusterNode[]> {
    return (await this.members(options)).nodes;
  }

  /** The same, with the epoch of the node that lists them. */
  async members(
    options: ExecuteOptions = NO_OPTIONS,
  ): Promise<{ readonly epoch: number; readonly nodes: ClusterNode[] }> {
    const receive = Buffer.alloc(MAX_NODES * NODE_BYTES);
    const header = encodeVdiRequest(Opcode.GET_NODE_LIST, 0, receive.length);
    const answer = await this.execute({ header, receive }, options);
    if (answer.result !== Result.SUCCESS) {
      throw new StoreError('IO', `the cluster does not list its nodes: ${resultName(answer.result)}`);
    }
    const { nrNodes } = nodeResponse.decode(answer.header);
    const nodes = decodedOr('IO', () => decodeNodes(receive.subarray(0, answer.length), nrNodes));
    this.#stalled.saw(nodes);
    return { epoch: answer.epoch, nodes };
  }

  #sleep(ms: number): Promise<void> {
    return this.#pauses.wait(ms);
  }
}

function closedError(): StoreError {
  return new StoreError('CLOSED', 'the connection to the cluster is closed');
}
