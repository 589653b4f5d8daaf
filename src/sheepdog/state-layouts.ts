/**
 * The structures in which nodes report their own state and the cluster's: locks of VDIs, recovery, the members of earlier epochs
 * (internal_proto.h). Owns their byte offsets.
 */
import { blob, nu64, struct, u32, u8 } from 'buffer-layout';
import { addressLabel } from './node-address.js';
import { addressText, decodeNodes, type ClusterNode } from './nodes.js';

/** SD_MAX_COPIES: also the most nodes that share a lock. */
const MAX_PARTICIPANTS = 31;
/** struct node_id; only its address for clients is read. */
const NODE_ID_BYTES = 40;
const NODE_ID_PORT = 16;

/** struct vdi_state. */
export const VDI_STATE_BYTES = 64 + MAX_PARTICIPANTS * (4 + NODE_ID_BYTES);
const PARTICIPANTS_OFFSET = 64 + MAX_PARTICIPANTS * 4;

/** enum lock_state. */
export const LockState = { UNLOCKED: 1, LOCKED: 2, SHARED: 3 } as const;

interface VdiStateLayout {
  vid: number;
  nrCopies: number;
  isSnapshot: number;
  isDeleted: number;
  lockState: number;
  owner: Buffer;
  nrParticipants: number;
}

const vdiStateLayout = struct<VdiStateLayout>([
  u32('vid'),
  u8('nrCopies'),
  u8('isSnapshot'),
  u8('isDeleted'),
  blob(5, 'copyPolicy, shift and padding'),
  u32('parentVid'),
  u32('lockState'),
  blob(NODE_ID_BYTES, 'owner'),
  u32('nrParticipants'),
]);

/** The lock of a VDI. */
export interface VdiState {
  readonly vid: number;
  /** LockState. */
  readonly lockState: number;
  /** HOST:PORT of the nodes that were asked for the lock. */
  readonly owners: readonly string[];
}

/** Undefined if the bytes are no such structures: the nodes are of an unknown kind. */
export function decodeVdiStates(bytes: Buffer): VdiState[] | undefined {
  if (bytes.length % VDI_STATE_BYTES !== 0) return undefined;
  const states: VdiState[] = [];
  for (let at = 0; at < bytes.length; at += VDI_STATE_BYTES) {
    const { vid, lockState, owner, nrParticipants } = vdiStateLayout.decode(bytes, at);
    if (lockState < LockState.UNLOCKED || lockState > LockState.SHARED) return undefined;
    if (nrParticipants > MAX_PARTICIPANTS) return undefined;
    const owners: string[] = [];
    if (lockState === LockState.LOCKED) owners.push(nodeLabel(owner));
    for (let n = 0; lockState === LockState.SHARED && n < nrParticipants; n++) {
      const from = at + PARTICIPANTS_OFFSET + n * NODE_ID_BYTES;
      owners.push(nodeLabel(bytes.subarray(from, from + NODE_ID_BYTES)));
    }
    states.push({ vid, lockState, owners });
  }
  return states;
}

function nodeLabel(id: Buffer): string {
  return addressLabel({ host: addressText(id.subarray(0, 16)), port: id.readUInt16LE(NODE_ID_PORT) });
}

/** struct recovery_state. Nodes write all of it, however little room the request gives: never ask with less. */
export const RECOVERY_BYTES = 24;

interface RecoveryLayout {
  inRecovery: number;
  state: number;
  finished: number;
  total: number;
}

const recoveryLayout = struct<RecoveryLayout>([
  u8('inRecovery'),
  blob(3, 'pad'),
  u32('state'),
  nu64('finished'),
  nu64('total'),
]);

/** enum rw_state. */
const PHASES = ['preparing', 'copying', 'finishing'] as const;

/** The recovery of a node: since the members changed, it fetches the objects that are its own now. */
export interface Recovery {
  /** preparing: it asks the other nodes for their objects; finishing: it tells them that it is done. */
  readonly phase: (typeof PHASES)[number];
  /** Objects done, of all that it should have; both 0 while it prepares. */
  readonly done: number;
  readonly total: number;
}

/** Null if the node recovers nothing. */
export function decodeRecovery(bytes: Buffer): Recovery | null {
  const { inRecovery, state, finished, total } = recoveryLayout.decode(bytes);
  if (inRecovery === 0) return null;
  return { phase: PHASES[state] ?? 'copying', done: finished, total };
}

/** struct epoch_log without its nodes. */
const EPOCH_LOG_BYTES = 48;

interface EpochLogLayout {
  timeSec: number;
  epoch: number;
  nrNodes: number;
  disableRecovery: number;
}

const epochLogLayout = struct<EpochLogLayout>([
  nu64('ctime'),
  nu64('timeSec'),
  u32('epoch'),
  u32('nrNodes'),
  u8('disableRecovery'),
  blob(EPOCH_LOG_BYTES - 25, 'what the cluster says of itself'),
]);

/** Bytes of a log with room for that many nodes, each of `nodeBytes`. */
export function epochLogBytes(roomForNodes: number, nodeBytes: number): number {
  return EPOCH_LOG_BYTES + roomForNodes * nodeBytes;
}

/** An epoch: the members from one change to the next. */
export interface Epoch {
  readonly epoch: number;
  /** Milliseconds since 1970; 0 if the node does not know it any more. */
  readonly since: number;
  readonly nodes: readonly ClusterNode[];
}

/** `logs`: the newest first, each with room for `roomForNodes` entries of `nodeBytes`. */
export function decodeEpochs(
  logs: Buffer,
  roomForNodes: number,
  nodeBytes: number,
): { readonly epochs: Epoch[]; readonly isRecoveryDisabled: boolean } {
  const stride = epochLogBytes(roomForNodes, nodeBytes);
  const epochs: Epoch[] = [];
  let isRecoveryDisabled = false;
  for (let at = 0; at + stride <= logs.length; at += stride) {
    const { epoch, timeSec, nrNodes, disableRecovery } = epochLogLayout.decode(logs, at);
    // Only the first log has it.
    if (at === 0) isRecoveryDisabled = disableRecovery !== 0;
    const from = at + EPOCH_LOG_BYTES;
    const nodes = decodeNodes(logs.subarray(from, from + Math.min(nrNodes, roomForNodes) * nodeBytes), nrNodes);
    epochs.push({ epoch, since: timeSec * 1000, nodes });
  }
  return { epochs, isRecoveryDisabled };
}
