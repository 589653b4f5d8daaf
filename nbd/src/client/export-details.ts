/** What a server announces about an export, with defaults for what it leaves out. */

import { MAX_PAYLOAD, TRANSMISSION_FLAG } from '../protocol/wire.js';

/** What a server announces about an export. Sizes in bytes. */
export interface ExportDetails {
  readonly size: number;
  readonly readOnly: boolean;
  readonly canFlush: boolean;
  readonly canFua: boolean;
  readonly canTrim: boolean;
  readonly canZero: boolean;
  readonly canFastZero: boolean;
  readonly canCache: boolean;
  /** Reads may request their data in one piece. */
  readonly canDf: boolean;
  readonly multiConn: boolean;
  readonly rotational: boolean;
  readonly minimumBlockSize: number;
  readonly preferredBlockSize: number;
  readonly maximumPayload: number;
  /** The server's own name for the export, if it sent one. */
  readonly name: string | undefined;
  readonly description: string | undefined;
}

/** The details with the default sizes of "Size constraints", for a server that announces no others. */
export function makeDetails(size: number, flags: number): ExportDetails {
  const has = (flag: number): boolean => (flags & flag) !== 0;
  return {
    size,
    readOnly: has(TRANSMISSION_FLAG.READ_ONLY),
    canFlush: has(TRANSMISSION_FLAG.SEND_FLUSH),
    canFua: has(TRANSMISSION_FLAG.SEND_FUA),
    canTrim: has(TRANSMISSION_FLAG.SEND_TRIM),
    canZero: has(TRANSMISSION_FLAG.SEND_WRITE_ZEROES),
    canFastZero: has(TRANSMISSION_FLAG.SEND_FAST_ZERO),
    canCache: has(TRANSMISSION_FLAG.SEND_CACHE),
    canDf: has(TRANSMISSION_FLAG.SEND_DF),
    multiConn: has(TRANSMISSION_FLAG.CAN_MULTI_CONN),
    rotational: has(TRANSMISSION_FLAG.ROTATIONAL),
    minimumBlockSize: 1,
    preferredBlockSize: 4096,
    maximumPayload: MAX_PAYLOAD,
    name: undefined,
    description: undefined,
  };
}
