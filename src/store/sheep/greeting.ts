/**
 * Whether who takes a connection is a node that works: it is asked something small, and in use only when it has answered.
 * A proxy takes connections for a node that is gone, and a port may be anybody's. What is sent to such a one would be in
 * doubt, and the node that is named next would have its chance much later or never.
 */
import { addressLabel } from './cluster-address.js';
import { ConnectionLost, NoAnswer, type NodeConnection } from './connection.js';
import { encodeVdiRequest } from './layouts.js';
import { MAX_NODES, NODE_BYTES, Opcode } from './protocol.js';

/** The answer, which nobody reads: one for all. */
const ANSWER = Buffer.allocUnsafeSlow(MAX_NODES * NODE_BYTES);
/** Answers that a connection has had when it is handed over. */
export const GREETING_ANSWERS = 1;
/** A connection that has nothing more than this is asked at least so long. */
const LEAST_GREETING_MS = 50;

/**
 * Have the node answer within `timeoutMs`: nodes do so in every state of their cluster, and whatever their version. Errors:
 * ConnectionLost; the connection is gone, and nothing has been asked on it that changes something.
 */
export async function greet(connection: NodeConnection, timeoutMs: number): Promise<void> {
  const header = encodeVdiRequest(Opcode.GET_NODE_LIST, 0, ANSWER.length);
  const ms = Math.max(LEAST_GREETING_MS, timeoutMs);
  try {
    await connection.send({ header, receive: ANSWER }, ms);
  } catch (error) {
    if (!(error instanceof ConnectionLost)) throw error;
    const label = addressLabel(connection.address);
    const found = error instanceof NoAnswer ? `${label} answers nothing` : error.message;
    throw new ConnectionLost(`${found}; it takes connections, but no Sheepdog node answers there`, { cause: error });
  }
}
