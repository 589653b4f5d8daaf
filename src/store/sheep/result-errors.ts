/** Results of nodes as StoreErrors. Owns what each result means to users of a store. */
import { oidText } from '../../sheepdog/object-ids.js';
import { Result, resultName } from '../../sheepdog/protocol.js';
import { StoreError } from '../store-error.js';
import type { Answer } from './connection.js';

/** An object that a request needs is missing. `high` and `low` are the halves of its oid. */
export class ObjectGone extends StoreError {
  constructor(
    asked: string,
    readonly high: number,
    readonly low: number,
  ) {
    super('GONE', `${asked}: the cluster answers ${resultName(Result.NO_OBJ)}: the object is missing`);
  }
}

/** The answer, if it is a success. `what`: the request, for the message. Errors: as resultError. */
export function succeeded(answer: Answer, what: string): Answer {
  if (answer.result === Result.SUCCESS) return answer;
  throw resultError(answer.result, what);
}

/** For a request on an object, whose oid has these halves. GONE: the object is missing; any other as resultError. */
export function objectError(result: number, what: string, high: number, low: number): StoreError {
  const asked = `${what} object ${oidText(high, low)}`;
  return result === Result.NO_OBJ ? new ObjectGone(asked, high, low) : resultError(result, asked);
}

/** NO_SPACE, READONLY, LIMIT; DAMAGED: an inode is lost that the nodes have to read for a name; any other IO. */
export function resultError(result: number, what: string): StoreError {
  const says = `${what}: the cluster answers ${resultName(result)}`;
  switch (result) {
    case Result.NO_SPACE:
      return new StoreError('NO_SPACE', `${says}: it is full`);
    case Result.NO_OBJ:
      return new StoreError(
        'DAMAGED',
        `${says}: to find a name, nodes read the inodes of VDIs, and one of these inodes is lost; 'sheepgate vdi list' ` +
          'shows its VDI as damaged',
      );
    case Result.READONLY:
      return new StoreError('READONLY', `${says}: the VDI has become a snapshot`);
    case Result.FULL_VDI:
      return new StoreError('LIMIT', `${says}: all VDI ids are in use`);
    default:
      return new StoreError('IO', says);
  }
}
