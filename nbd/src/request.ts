/**
 * A request of the transmission phase: decoding its header and validating it completely. `requestError` is the only
 * place that decides whether a request may reach a device; nothing after it checks again, nothing before it acts.
 */

import type { Geometry } from './block-device.js';
import { CMD, CMD_FLAG, MAX_PAYLOAD, NBD_ERRNO, readUInt64, REQUEST_MAGIC, type Negotiated } from './protocol.js';

/** One decoded header, reused for every request of a connection. The cookie stays two opaque halves. */
export class Request {
  magic = 0;
  flags = 0;
  type = 0;
  cookieHigh = 0;
  cookieLow = 0;
  /** Bytes; Infinity if the client sent more than 2^53-1. */
  offset = 0;
  length = 0;
}

/** Decode 28 bytes at `at` into `request` (proto.md, "Request message"). False if the magic is not a request's. */
export function decodeRequest(source: Buffer, at: number, request: Request): boolean {
  request.magic = source.readUInt32BE(at);
  request.flags = source.readUInt16BE(at + 4);
  request.type = source.readUInt16BE(at + 6);
  request.cookieHigh = source.readUInt32BE(at + 8);
  request.cookieLow = source.readUInt32BE(at + 12);
  request.offset = readUInt64(source, at + 16);
  request.length = source.readUInt32BE(at + 24);
  return request.magic === REQUEST_MAGIC;
}

/** What a connection may ask, fixed when its transmission phase begins. */
export interface RequestRules {
  readonly geometry: Geometry;
  readonly negotiated: Negotiated;
}

/**
 * The NBD error value that `request` must be answered with, or 0 if it may be executed. Checked in this order: command,
 * flags, read-only, payload size, range, alignment (proto.md, "Request types", "Command flags", "Error values").
 * A length of 0 inside the export is allowed ("unspecified" by proto.md): it succeeds and does nothing.
 */
export function requestError(request: Request, rules: RequestRules): number {
  const { geometry } = rules;
  const { flags, offset, length } = request;
  let allowedFlags = geometry.canFua ? CMD_FLAG.FUA : 0;
  let changesData = false;
  let outOfRange = NBD_ERRNO.EINVAL;

  switch (request.type) {
    case CMD.READ:
      if (rules.negotiated.structuredReplies) allowedFlags |= CMD_FLAG.DF;
      break;
    case CMD.WRITE:
      changesData = true;
      outOfRange = NBD_ERRNO.ENOSPC;
      break;
    case CMD.FLUSH:
      if (!geometry.canFlush || (flags & ~allowedFlags) !== 0) return NBD_ERRNO.EINVAL;
      // "For a flush request, length and offset are reserved, and MUST be set to all-zero."
      return offset === 0 && length === 0 ? 0 : NBD_ERRNO.EINVAL;
    case CMD.TRIM:
      // On a read-only export TRIM and WRITE_ZEROES are not announced, yet the right answer to them is EPERM.
      if (!geometry.canTrim && !geometry.readOnly) return NBD_ERRNO.EINVAL;
      changesData = true;
      break;
    case CMD.WRITE_ZEROES:
      if (!geometry.canZero && !geometry.readOnly) return NBD_ERRNO.EINVAL;
      allowedFlags |= CMD_FLAG.NO_HOLE;
      if (geometry.canFastZero) allowedFlags |= CMD_FLAG.FAST_ZERO;
      changesData = true;
      outOfRange = NBD_ERRNO.ENOSPC;
      break;
    case CMD.CACHE:
      if (!geometry.canCache) return NBD_ERRNO.EINVAL;
      break;
    default:
      // BLOCK_STATUS too: "Servers SHOULD reply with EINVAL to clients … without selecting a metadata context".
      return NBD_ERRNO.EINVAL;
  }

  if ((flags & ~allowedFlags) !== 0) return NBD_ERRNO.EINVAL;
  if (changesData && geometry.readOnly) return NBD_ERRNO.EPERM;
  if (length > MAX_PAYLOAD && (request.type === CMD.READ || request.type === CMD.WRITE)) return NBD_ERRNO.EINVAL;
  // Never offset + length: that sum may be more than a number holds exactly.
  if (length > geometry.size || offset > geometry.size - length) return outOfRange;
  if (geometry.minimumBlockSize > 1) {
    const mask = geometry.minimumBlockSize - 1;
    // A power of two up to 2^16 shows in the low 32 bits alone.
    if ((length & mask) !== 0 || offset % geometry.minimumBlockSize !== 0) return NBD_ERRNO.EINVAL;
  }
  return 0;
}
