/**
 * The greeting: a small request that a node must answer before its connection is used. A proxy takes connections for a node
 * that is gone, and any program may listen on the port. Real requests sent there would be in doubt, and the next node would be
 * tried much later or never.
 */
import { addressLabel } from './cluster-address.js';
import { ConnectionLost, NoAnswer, type NodeConnection } from './connection.js';
import {
  CLUSTER_INFO_ROOM,
  OLD_SHEEP_PROTO_VER,
  Opcode,
  Result,
  SHEEP_PROTO_VER,
  type SheepVersion,
} from '../../sheepdog/protocol.js';
import { encodeVdiRequest, withProtoVer } from '../../sheepdog/headers.js';
import { RECOVERY_BYTES } from '../../sheepdog/state-layouts.js';

/** Receives the answers, which are not read; shared by all. */
const ANSWER = Buffer.allocUnsafeSlow(CLUSTER_INFO_ROOM);
/** Results by which a node says that it does not carry out requests. */
export const NOT_SERVING: ReadonlySet<number> = new Set([
  Result.STARTUP,
  Result.WAIT_FOR_FORMAT,
  Result.WAIT_FOR_JOIN,
  Result.SHUTDOWN,
  Result.KILLED,
]);
/** Time for an answer, if the connection has less time left. */
const LEAST_GREETING_MS = 50;

/**
 * Makes the node answer within `timeoutMs`; nodes do so in every state of their cluster. `known`: the version of another node
 * of the cluster, or of this one before. Returns its version. Errors: ConnectionLost (no answer, or no node); the connection is
 * closed then, and no request on it has changed anything.
 */
export async function greet(
  connection: NodeConnection,
  timeoutMs: number,
  known?: SheepVersion,
): Promise<SheepVersion> {
  const deadline = performance.now() + timeoutMs;
  const ask = (opcode: number, version: number): Promise<number> => resultOf(connection, opcode, version, deadline);
  if (known !== '0.8' && known !== '0.9') {
    if ((await ask(Opcode.GET_NODE_LIST, SHEEP_PROTO_VER)) !== Result.VER_MISMATCH) return '1.0';
  }
  if (known !== '1.0' && (await ask(Opcode.GET_NODE_LIST, OLD_SHEEP_PROTO_VER)) !== Result.VER_MISMATCH) {
    if (known !== undefined) return known;
    // 0.8 calls itself the same and does not know this request.
    return (await ask(Opcode.CLUSTER_INFO, OLD_SHEEP_PROTO_VER)) === Result.SUCCESS ? '0.9' : '0.8';
  }
  connection.destroy();
  throw new ConnectionLost(otherVersion(addressLabel(connection.address), known));
}

/**
 * Whether the node carries out requests: false if it has not joined its cluster, or the cluster is not formatted. Sends the
 * request with the smallest answer among those that it refuses then (sheep/ops.c, operations without `force`). Errors:
 * ConnectionLost.
 */
export async function serves(
  connection: NodeConnection,
  timeoutMs: number,
  version: SheepVersion | undefined,
): Promise<boolean> {
  if (version !== '1.0') return true;
  const deadline = performance.now() + timeoutMs;
  const result = await resultOf(connection, Opcode.STAT_RECOVERY, SHEEP_PROTO_VER, deadline, RECOVERY_BYTES);
  return !NOT_SERVING.has(result);
}

function otherVersion(label: string, known: SheepVersion | undefined): string {
  if (known !== undefined) return `${label} is a Sheepdog node of another version than the cluster had, ${known}`;
  return (
    `${label} is a Sheepdog node of an unsupported version: 0.8 and 0.9 can be read, 1.0 can be read and written; from an ` +
    "older version copy each disk with 'collie vdi read NAME > FILE' and 'sheepgate import FILE NAME'"
  );
}

async function resultOf(
  connection: NodeConnection,
  opcode: number,
  version: number,
  deadline: number,
  room = ANSWER.length,
): Promise<number> {
  const header = withProtoVer(encodeVdiRequest(opcode, 0, room), version);
  try {
    const timeoutMs = Math.max(LEAST_GREETING_MS, deadline - performance.now());
    return (
      await connection.send({ header, receive: room === ANSWER.length ? ANSWER : ANSWER.subarray(0, room) }, timeoutMs)
    ).result;
  } catch (error) {
    if (!(error instanceof ConnectionLost)) throw error;
    const label = addressLabel(connection.address);
    const found = error instanceof NoAnswer ? `${label} answers nothing` : error.message;
    throw new ConnectionLost(`${found}; it takes connections, but no Sheepdog node answers there`, { cause: error });
  }
}
