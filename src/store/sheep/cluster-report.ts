/**
 * The state of a cluster and of each of its nodes, for an operator: which nodes are members, since when, how full they are, how
 * far recovery is. Every node is asked about itself, and what it does not answer is reported as unknown: operators read this
 * when something is wrong. Works on clusters that do not serve, too. Changes nothing.
 */
import { StoreError } from '../store-error.js';
import type { Redundancy } from '../vdi-record.js';
import { addressLabel, parseClusterAddress, type NodeAddress } from './cluster-address.js';
import { clusterStateName, type StateName } from './cluster-state.js';
import { decodedOr } from './format-errors.js';
import { ConnectionLost, NoAnswer, NodeConnection, type Answer } from './connection.js';
import { zonesIn } from '../../sheepdog/copy-policy.js';
import { greet } from './greeting.js';
import {
  CLUSTER_INFO_ROOM,
  ClusterFlag,
  MAX_NODES,
  NODE_BYTES,
  Opcode,
  Result,
  resultName,
  type SheepVersion,
} from '../../sheepdog/protocol.js';
import {
  decodeEpochs,
  decodeRecovery,
  epochLogBytes,
  RECOVERY_BYTES,
  type Epoch,
  type Recovery,
} from '../../sheepdog/state-layouts.js';
import { decodeClusterInfo, decodeOldClusterInfo, type ClusterInfo } from '../../sheepdog/cluster-info.js';
import { encodeEpochLogRequest, encodeVdiRequest, inVersion, nodeResponse } from '../../sheepdog/headers.js';
import { decodeNodes, type ClusterNode } from '../../sheepdog/nodes.js';
import { redundancyOf } from './redundancy-of.js';

/** Longer to connect counts as unreachable, longer to answer as silent. */
const CONNECT_MS = 2_000;
const ANSWER_MS = 5_000;
/** Results of nodes of 0.8 that tell the state of their cluster. */
const OLD_STATES: ReadonlySet<number> = new Set([
  Result.SUCCESS,
  Result.WAIT_FOR_FORMAT,
  Result.WAIT_FOR_JOIN,
  Result.SHUTDOWN,
]);
/** Room for members of an epoch, beyond the present number: clusters shrink. */
const SPARE_NODES = 32;
/** Most bytes of epoch logs in one answer: of a large cluster fewer epochs fit. */
const MAX_LOG_BYTES = 32 * 2 ** 20;

export interface NodeState extends Omit<ClusterNode, 'address' | 'disks'> {
  /** HOST:PORT. */
  readonly node: string;
  /**
   * ok; recovering; waiting: the cluster does not serve; silent: it takes connections and does not answer; unreachable: from
   * here, though the other nodes may reach it.
   */
  readonly state: 'ok' | 'recovering' | 'waiting' | 'silent' | 'unreachable';
  /** More words for `state`, if there are any. */
  readonly reason: string | null;
  /** Bytes of its disks; null if unknown, 0 for a node without disks (a gateway). */
  readonly size: number | null;
  readonly free: number | null;
  readonly recovery: Recovery | null;
}

/** A node that was a member and is not one now. */
export interface LeftNode {
  readonly node: string;
  /** The first epoch without it, and when that began. */
  readonly epoch: number;
  readonly since: number;
}

export interface ClusterReport extends ClusterInfo {
  readonly stateName: StateName;
  /** Undefined before the cluster is formatted. */
  readonly redundancy: Redundancy | undefined;
  readonly enforcesLocks: boolean;
  readonly recyclesVids: boolean;
  readonly isStrict: boolean;
  readonly isRecoveryDisabled: boolean;
  readonly zones: number;
  readonly nodes: readonly NodeState[];
  /** The newest first; fewer than requested if there are no more. */
  readonly epochs: readonly Epoch[];
  /** Nodes that left in these epochs. */
  readonly left: readonly LeftNode[];
}

/** `location`: the text of --cluster. Errors: ADDRESS (syntax), IO (no node answers). */
export async function readClusterReport(
  location: string,
  { epochs: epochCount = 1, answerMs = ANSWER_MS }: { readonly epochs?: number; readonly answerMs?: number } = {},
): Promise<ClusterReport> {
  const [connection, info] = await firstToAnswer(parseClusterAddress(location), answerMs);
  try {
    const { version } = info;
    const list = await listNodes(connection, version);
    const stateName = clusterStateName(info);
    const [nodes, { epochs, isRecoveryDisabled }] = await Promise.all([
      Promise.all(list.nodes.map((node) => stateOf(node, { version, isServing: stateName === 'running', answerMs }))),
      readEpochs(connection, version, list, epochCount),
    ]);
    return {
      ...info,
      stateName,
      redundancy: stateName === 'not-formatted' ? undefined : redundancyOf(info),
      enforcesLocks: (info.flags & ClusterFlag.USE_LOCK) !== 0,
      recyclesVids: (info.flags & ClusterFlag.RECYCLE_VID) !== 0,
      isStrict: (info.flags & ClusterFlag.STRICT) !== 0,
      isRecoveryDisabled,
      zones: zonesIn(list.nodes),
      nodes,
      epochs,
      left: leftNodes(list.nodes, epochs),
    };
  } finally {
    connection.destroy();
  }
}

/** Nodes that were members in these epochs and are not members now. `epochs`: the newest first. */
export function leftNodes(members: readonly NodeAddress[], epochs: readonly Epoch[]): LeftNode[] {
  const seen = new Set(members.map(addressLabel));
  const left: LeftNode[] = [];
  for (const [n, { nodes }] of epochs.entries()) {
    for (const label of nodes.map(addressLabel)) {
      if (seen.has(label)) continue;
      seen.add(label);
      const next = epochs[n - 1];
      // Of the newest epoch: it has just left.
      left.push({ node: label, epoch: next?.epoch ?? 0, since: next?.since ?? 0 });
    }
  }
  return left;
}

/** Asks all addresses at the same time; the first node that reports the cluster's state. A silent node costs no time. */
async function firstToAnswer(
  addresses: readonly NodeAddress[],
  answerMs: number,
): Promise<[NodeConnection, ClusterInfo]> {
  const connections = new Set<NodeConnection>();
  let chosen: NodeConnection | undefined;
  const asked = addresses.map(async (address): Promise<[NodeConnection, ClusterInfo]> => {
    const connection = await NodeConnection.connect(address, () => undefined, CONNECT_MS);
    connections.add(connection);
    // Another node was faster.
    if (chosen) connection.destroy();
    const answer: [NodeConnection, ClusterInfo] = [connection, await readClusterInfo(connection, answerMs)];
    chosen ??= connection;
    return answer;
  });
  try {
    return await Promise.any(asked);
  } catch (error) {
    const { errors } = error as { errors: Error[] };
    const other = errors.find((each) => !(each instanceof ConnectionLost) && !(each instanceof StoreError));
    if (other) throw other;
    throw new StoreError(
      'IO',
      `no node reports the state of the cluster: ${errors.map(({ message }) => message).join('; ')}`,
    );
  } finally {
    for (const connection of connections) if (connection !== chosen) connection.destroy();
  }
}

async function readClusterInfo(connection: NodeConnection, answerMs: number): Promise<ClusterInfo> {
  const version = await greet(connection, answerMs);
  const receive = Buffer.alloc(CLUSTER_INFO_ROOM);
  if (version === '0.8') {
    const { result } = await ask(connection, Opcode.STAT_CLUSTER, { version, receive, answerMs });
    if (OLD_STATES.has(result)) return decodeOldClusterInfo(receive, result);
    throw new StoreError('IO', `asked for its state, a node answers ${resultName(result)}`);
  }
  mustSucceed(await ask(connection, Opcode.CLUSTER_INFO, { version, receive, answerMs }), 'its state');
  return decodeClusterInfo(receive, version);
}

interface NodeList {
  readonly nodes: readonly ClusterNode[];
  /** Bytes of an entry: longer if the nodes are built with disk vnodes. */
  readonly nodeBytes: number;
}

async function listNodes(connection: NodeConnection, version: SheepVersion): Promise<NodeList> {
  const receive = Buffer.alloc(MAX_NODES * NODE_BYTES);
  const answer = mustSucceed(await ask(connection, Opcode.GET_NODE_LIST, { version, receive }), 'its nodes');
  const count = nodeResponse.decode(answer.header).nrNodes;
  const nodeBytes = count === 0 ? NODE_BYTES : answer.length / count;
  return { nodes: decodedOr('IO', () => decodeNodes(receive.subarray(0, answer.length), count)), nodeBytes };
}

/** Empty if the node does not list earlier epochs: the rest of the report is still useful. */
async function readEpochs(
  connection: NodeConnection,
  version: SheepVersion,
  { nodes, nodeBytes }: NodeList,
  count: number,
): Promise<ReturnType<typeof decodeEpochs>> {
  // Earlier versions have another structure.
  if (version !== '1.0') return { epochs: [], isRecoveryDisabled: false };
  let room = nodes.length + SPARE_NODES;
  while (room <= MAX_NODES) {
    const stride = epochLogBytes(room, nodeBytes);
    const receive = Buffer.alloc(Math.min(count, Math.floor(MAX_LOG_BYTES / stride)) * stride);
    const header = encodeEpochLogRequest(receive.length, room);
    const { result, length } = await connection.send({ header, receive }, ANSWER_MS);
    // If the cluster does not serve, the result says why, and the logs follow all the same.
    if (result !== Result.BUFFER_SMALL) {
      return decodedOr('IO', () => decodeEpochs(receive.subarray(0, length), room, nodeBytes));
    }
    room *= 2;
  }
  return { epochs: [], isRecoveryDisabled: false };
}

async function stateOf(
  { host, port, vnodes, zone, space }: ClusterNode,
  {
    version,
    isServing,
    answerMs,
  }: { readonly version: SheepVersion; readonly isServing: boolean; readonly answerMs: number },
): Promise<NodeState> {
  const node = addressLabel({ host, port });
  const known = { host, port, node, vnodes, zone, space, reason: null, size: null, free: null, recovery: null };
  let connection: NodeConnection;
  try {
    connection = await NodeConnection.connect({ host, port }, () => undefined, CONNECT_MS);
  } catch (error) {
    const { message, cause } = error as Error;
    return { ...known, state: 'unreachable', reason: cause instanceof Error ? cause.message : message };
  }
  try {
    if (version !== '1.0') {
      // Of earlier versions only this is known: whether the node answers.
      await greet(connection, answerMs, version);
      return { ...known, state: isServing ? 'ok' : 'waiting' };
    }
    const receive = Buffer.alloc(RECOVERY_BYTES);
    const [disks, recovery] = await Promise.all([
      ask(connection, Opcode.STAT_SHEEP, { answerMs }),
      ask(connection, Opcode.STAT_RECOVERY, { receive, answerMs }),
    ]);
    if (disks.result !== Result.SUCCESS || recovery.result !== Result.SUCCESS) {
      const { result } = disks.result === Result.SUCCESS ? recovery : disks;
      return { ...known, state: 'waiting', reason: `it answers ${resultName(result)}` };
    }
    const { storeSize: size, storeFree: free } = nodeResponse.decode(disks.header);
    const progress = decodeRecovery(receive);
    return { ...known, state: progress === null ? 'ok' : 'recovering', size, free, recovery: progress };
  } catch (error) {
    if (!(error instanceof ConnectionLost)) throw error;
    if (error instanceof NoAnswer)
      return { ...known, state: 'silent', reason: `no answer within ${answerMs / 1000} s` };
    return { ...known, state: 'unreachable', reason: error.message };
  } finally {
    connection.destroy();
  }
}

interface Asked {
  readonly receive?: Buffer;
  readonly version?: SheepVersion;
  readonly answerMs?: number;
}

function ask(
  connection: NodeConnection,
  opcode: number,
  { receive, version = '1.0', answerMs = ANSWER_MS }: Asked,
): Promise<Answer> {
  const header = inVersion(encodeVdiRequest(opcode, 0, receive?.length ?? 0), version);
  return connection.send({ header, receive }, answerMs);
}

function mustSucceed(answer: Answer, what: string): Answer {
  if (answer.result === Result.SUCCESS) return answer;
  throw new StoreError('IO', `asked for ${what}, a node answers ${resultName(answer.result)}`);
}
