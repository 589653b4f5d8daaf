/**
 * Whether who takes a connection is a node that works: it is asked something small, and in use only when it has answered.
 * A proxy takes connections for a node that is gone, and a port may be anybody's. What is sent to such a one would be in
 * doubt, and the node that is named next would have its chance much later or never.
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

/** What is answered, which nobody reads: one for all. */
const ANSWER = Buffer.allocUnsafeSlow(CLUSTER_INFO_ROOM);
/** What a node says of itself instead of an answer. */
export const NOT_SERVING: ReadonlySet<number> = new Set([
  Result.STARTUP,
  Result.WAIT_FOR_FORMAT,
  Result.WAIT_FOR_JOIN,
  Result.SHUTDOWN,
  Result.KILLED,
]);
/** A connection that has nothing more than this is asked at least so long. */
const LEAST_GREETING_MS = 50;

/**
 * Have the node answer within `timeoutMs`: nodes do so in every state of their cluster. `known`: what another node of the
 * cluster, or this one before, has turned out to be. Returns what it is. Errors: ConnectionLost; the connection is gone,
 * and nothing has been asked on it that changes something.
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
 * Whether it carries out requests, or says that it does not (yet): it has not joined its cluster, or that is not formatted. Told
 * by the smallest of its answers about itself that it refuses then (sheep/ops.c, those without `force`). Errors: ConnectionLost.
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
  if (known !== undefined)
    return `${label} is a Sheepdog node of another version than ${known}, which the cluster was of`;
  return (
    `${label} is a Sheepdog node of a version that is not known here: 0.8 and 0.9 are read, 1.0 is read and written. From an ` +
    "older one 'collie vdi read NAME > FILE' brings a disk out, and 'sheepgate import FILE NAME' takes it in"
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
