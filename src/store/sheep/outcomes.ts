/**
 * What the outcome of an attempt says: whether the request is to be repeated, and whether it may have been carried out. Owns
 * these rules; repeats nothing.
 */
import { opcodeOf } from '../../sheepdog/headers.js';
import { addressLabel } from '../../sheepdog/node-address.js';
import { Opcode, Result } from '../../sheepdog/protocol.js';
import { ConnectionLost, type Answer, type NodeConnection, type WireRequest } from './connection.js';

/** "Not now": the cluster is not serving, or its members are changing; the request has not been carried out. */
const NOT_NOW: ReadonlySet<number> = new Set([
  Result.STARTUP,
  Result.WAIT_FOR_FORMAT,
  Result.WAIT_FOR_JOIN,
  Result.HALT,
  Result.SHUTDOWN,
  Result.KILLED,
  Result.COLLECTING_CINFO,
  Result.OLD_COLLECTING_CINFO,
  Result.OLD_NODE_VER,
  Result.NEW_NODE_VER,
  Result.AGAIN,
  Result.NODE_IN_RECOVERY,
]);
/** "Trouble": of the node with its disk or its peers. */
const TROUBLE: ReadonlySet<number> = new Set([Result.EIO, Result.SYSTEM_ERROR, Result.NETWORK_ERROR]);

/** The answer is for the caller to judge: neither "not now" nor trouble of the node. */
export function isFinal({ result }: Answer): boolean {
  return !NOT_NOW.has(result) && !TROUBLE.has(result);
}

/** The node had trouble, and may have carried out a part of the request. */
export function isTrouble({ result }: Answer): boolean {
  return TROUBLE.has(result);
}

/** No node could be reached: nothing was sent. */
export class NotConnected extends ConnectionLost {}

/** The node has answered, but is at an earlier epoch than is known. */
export class Outdated extends ConnectionLost {
  constructor({ address, peer }: NodeConnection, known: number) {
    super(
      `${addressLabel(address)} does not know the latest change of members (it is at epoch ${peer.epoch}, and the cluster ` +
        `at ${known})`,
    );
  }
}

/** Whether it changes an object. */
export function isWrite({ header, data }: WireRequest): boolean {
  const opcode = opcodeOf(header);
  if (opcode === Opcode.WRITE_OBJ) return data !== undefined && data.length > 0;
  return opcode === Opcode.CREATE_AND_WRITE_OBJ || opcode === Opcode.REMOVE_OBJ;
}
