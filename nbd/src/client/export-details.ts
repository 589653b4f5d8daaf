/** What a server announces about an export, with defaults for what it leaves out. */

import { CMD, CMD_FLAG, MAX_PAYLOAD, TRANSMISSION_FLAG } from '../protocol/wire.js';

/** What a server announces about an export. Sizes in bytes. */
export interface ExportDetails {
  /** Infinity if it is more than 2^53-1; the bytes up to there can be used. */
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

/**
 * Why a request must not be sent, though its range is one of the export; undefined if it may be. What was not announced must
 * not be used (proto.md, "Transmission flags"): nbdkit may end its process at a FAST_ZERO, others may ignore a FUA.
 */
export function requestProblem(
  type: number,
  flags: number,
  length: number,
  details: ExportDetails,
): string | undefined {
  // Its answer could not be an extent.
  if (type === CMD.BLOCK_STATUS && length === 0) return 'there is no status of nothing';
  const missing = notAnnounced(type, flags, details);
  return missing === undefined ? undefined : `the server has not announced ${missing} for this export`;
}

/** The command or flag that was not announced; undefined if all were. */
function notAnnounced(type: number, flags: number, details: ExportDetails): string | undefined {
  if (type === CMD.FLUSH && !details.canFlush) return 'flush';
  if (type === CMD.TRIM && !details.canTrim) return 'trim';
  if (type === CMD.WRITE_ZEROES && !details.canZero) return 'zero';
  if (type === CMD.CACHE && !details.canCache) return 'cache';
  if (type === CMD.READ && (flags & CMD_FLAG.DF) !== 0 && !details.canDf) return 'df';
  if ((flags & CMD_FLAG.FUA) !== 0 && !details.canFua) return 'fua';
  if ((flags & CMD_FLAG.FAST_ZERO) !== 0 && !details.canFastZero) return 'fastZero';
  return undefined;
}
