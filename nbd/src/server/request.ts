/**
 * A request of the transmission phase: decoding its header and validating it completely. `requestError` is the only
 * place that decides whether a request may reach a device; nothing after it checks again, nothing before it acts.
 */

import type { Geometry } from '../block-device.js';
import {
  CMD,
  CMD_FLAG,
  EXTENDED_REQUEST_MAGIC,
  EXTENDED_REQUEST_SIZE,
  MAX_PAYLOAD,
  NBD_ERRNO,
  readUInt64,
  REQUEST_HEADER_SIZE,
  REQUEST_MAGIC,
  writeUInt64,
  type Negotiated,
  type SelectedContext,
} from '../protocol/wire.js';

const TWO_POW_32 = 0x1_0000_0000;
/** In front of the ids in the payload of a block status request: the effect length. */
const STATUS_PAYLOAD_HEAD = 8;

/** One decoded header, reused for every request of a connection. The cookie stays two opaque halves. */
export class Request {
  magic = 0;
  flags = 0;
  type = 0;
  cookieHigh = 0;
  cookieLow = 0;
  /** The offset as received; extended replies repeat it. */
  offsetHigh = 0;
  offsetLow = 0;
  /** Bytes; Infinity if the client sent more than 2^53-1. */
  offset = 0;
  /** Bytes of the export that it concerns ("effect length"); Infinity if the client sent more than 2^53-1. */
  length = 0;
  /** Bytes that follow the header. */
  payloadLength = 0;
  /** The payload of a block status request, once it has arrived (see decodeStatusPayload). */
  statusPayload: Buffer | undefined;
}

/** Decode 28 bytes at `at` into `request` (proto.md, "Request message"). False if the magic is not a request's. */
export function decodeRequest(source: Buffer, at: number, request: Request): boolean {
  decodeCommon(source, at, request);
  request.length = source.readUInt32BE(at + 24);
  // "the only command where length represents payload length instead of effect length is NBD_CMD_WRITE"
  request.payloadLength = request.type === CMD.WRITE ? request.length : 0;
  return request.magic === REQUEST_MAGIC;
}

/** Decode the 32 bytes of an extended request ("Request message" of extension-ext-header). */
export function decodeExtendedRequest(source: Buffer, at: number, request: Request): boolean {
  decodeCommon(source, at, request);
  request.length = readUInt64(source, at + 24);
  // A write without the flag violates a MUST, but qemu sends all its writes so since 8.2: the data follow all the same.
  const hasPayload = request.type === CMD.WRITE || (request.flags & CMD_FLAG.PAYLOAD_LEN) !== 0;
  request.payloadLength = hasPayload ? request.length : 0;
  return request.magic === EXTENDED_REQUEST_MAGIC;
}

/** The header of `request` as received, before any payload was decoded. */
export function encodeHeader(request: Request, isExtended: boolean): Buffer {
  const header = Buffer.alloc(isExtended ? EXTENDED_REQUEST_SIZE : REQUEST_HEADER_SIZE);
  header.writeUInt32BE(request.magic, 0);
  header.writeUInt16BE(request.flags, 4);
  header.writeUInt16BE(request.type, 6);
  header.writeUInt32BE(request.cookieHigh, 8);
  header.writeUInt32BE(request.cookieLow, 12);
  header.writeUInt32BE(request.offsetHigh, 16);
  header.writeUInt32BE(request.offsetLow, 20);
  if (isExtended) writeUInt64(header, request.length, 24);
  else header.writeUInt32BE(request.length, 24);
  return header;
}

function decodeCommon(source: Buffer, at: number, request: Request): void {
  request.magic = source.readUInt32BE(at);
  request.flags = source.readUInt16BE(at + 4);
  request.type = source.readUInt16BE(at + 6);
  request.cookieHigh = source.readUInt32BE(at + 8);
  request.cookieLow = source.readUInt32BE(at + 12);
  request.offsetHigh = source.readUInt32BE(at + 16);
  request.offsetLow = source.readUInt32BE(at + 20);
  request.offset = request.offsetHigh > 0x1f_ffff ? Infinity : request.offsetHigh * TWO_POW_32 + request.offsetLow;
  request.statusPayload = undefined;
}

/** The payload of a block status request has arrived: the length, and the ids of the contexts wanted. */
export function decodeStatusPayload(request: Request, payload: Buffer): void {
  request.length = readUInt64(payload, 0);
  request.statusPayload = payload;
}

/** The contexts that a valid block status request wants an answer for. */
export function wantedContexts(request: Request, selected: readonly SelectedContext[]): readonly SelectedContext[] {
  const payload = request.statusPayload;
  if (payload === undefined) return selected;
  const ids = idsOf(payload);
  return selected.filter(({ id }) => ids.includes(id));
}

/** What the requests of a connection are checked against, fixed when its transmission phase begins. */
export interface RequestRules {
  readonly geometry: Geometry;
  readonly negotiated: Negotiated;
}

/** Why a request is refused: the NBD error value, and a message for clients with chunked replies. */
export interface Refusal {
  readonly errno: number;
  readonly message: string;
}

const refusal = (errno: number, message: string): Refusal => Object.freeze({ errno, message });

const UNKNOWN_COMMAND = refusal(NBD_ERRNO.EINVAL, 'the command is unknown or was not announced');
const UNKNOWN_FLAG = refusal(NBD_ERRNO.EINVAL, 'a command flag does not belong to the command or was not announced');
const NO_CONTEXT = refusal(NBD_ERRNO.EINVAL, 'no meta context was selected for this export');
const READ_ONLY = refusal(NBD_ERRNO.EPERM, 'the export is read-only');
const BAD_STATUS_PAYLOAD = refusal(
  NBD_ERRNO.EINVAL,
  'the payload is not a length followed by ids of selected contexts',
);
const EMPTY_STATUS = refusal(NBD_ERRNO.EINVAL, 'a block status of 0 bytes was requested');
const UNALIGNED = refusal(NBD_ERRNO.EINVAL, 'offset or length is not a multiple of the minimum block size');
const BEYOND_END = refusal(NBD_ERRNO.EINVAL, 'the range reaches beyond the end of the export');
const NO_SPACE_BEYOND_END = refusal(NBD_ERRNO.ENOSPC, 'the range reaches beyond the end of the export');
const TOO_LONG = refusal(NBD_ERRNO.EINVAL, `more than ${MAX_PAYLOAD} bytes in one request`);
const TOO_LONG_TO_SEND = refusal(NBD_ERRNO.EOVERFLOW, `more than ${MAX_PAYLOAD} bytes in one request`);
const TOO_LONG_TO_CACHE = refusal(NBD_ERRNO.EOVERFLOW, 'more than 4 GiB to be cached in one request');

/**
 * Why `request` must not be executed, or undefined if it may be. Checked in this order: command, read-only, flags,
 * payload size, range, alignment (proto.md, "Request types", "Command flags", "Error values"). A length of 0 inside the
 * export is allowed ("unspecified" by proto.md): it succeeds and does nothing; except for a block status, whose answer
 * cannot be empty.
 *
 * A block status request with a payload is checked twice: its header, and again when decodeStatusPayload has seen the
 * rest.
 */
export function requestError(request: Request, rules: RequestRules): Refusal | undefined {
  const { geometry, negotiated } = rules;
  const { flags, offset, length } = request;
  let allowedFlags = geometry.canFua ? CMD_FLAG.FUA : 0;
  let changesData = false;
  let outOfRange = BEYOND_END;

  switch (request.type) {
    case CMD.READ:
      if (negotiated.structuredReplies) allowedFlags |= CMD_FLAG.DF;
      break;
    case CMD.WRITE:
      if (negotiated.extendedHeaders) allowedFlags |= CMD_FLAG.PAYLOAD_LEN;
      changesData = true;
      outOfRange = NO_SPACE_BEYOND_END;
      break;
    case CMD.FLUSH:
      if (!geometry.canFlush) return UNKNOWN_COMMAND;
      if ((flags & ~allowedFlags) !== 0) return UNKNOWN_FLAG;
      // "For a flush request, length and offset are reserved, and MUST be set to all-zero." WNBD, on Windows, puts the range
      // there that it wants flushed. The whole export is flushed, which includes it; an error would cost its durability.
      return undefined;
    case CMD.TRIM:
      // On a read-only export TRIM and WRITE_ZEROES are not announced, but the right answer to them is EPERM.
      if (!geometry.canTrim && !geometry.readOnly) return UNKNOWN_COMMAND;
      changesData = true;
      break;
    case CMD.WRITE_ZEROES:
      if (!geometry.canZero && !geometry.readOnly) return UNKNOWN_COMMAND;
      allowedFlags |= CMD_FLAG.NO_HOLE;
      if (geometry.canFastZero) allowedFlags |= CMD_FLAG.FAST_ZERO;
      changesData = true;
      outOfRange = NO_SPACE_BEYOND_END;
      break;
    case CMD.CACHE:
      if (!geometry.canCache) return UNKNOWN_COMMAND;
      break;
    case CMD.BLOCK_STATUS:
      // "Servers SHOULD reply with EINVAL to clients … without selecting at least one metadata context."
      if (negotiated.metaContexts.length === 0) return NO_CONTEXT;
      allowedFlags |= CMD_FLAG.REQ_ONE;
      if (negotiated.extendedHeaders) allowedFlags |= CMD_FLAG.PAYLOAD_LEN;
      break;
    default:
      return UNKNOWN_COMMAND;
  }

  if (changesData && geometry.readOnly) return READ_ONLY;
  if ((flags & ~allowedFlags) !== 0) return UNKNOWN_FLAG;
  if (request.type === CMD.WRITE) {
    if (length > MAX_PAYLOAD) return TOO_LONG;
  } else if (request.type === CMD.READ && length > MAX_PAYLOAD) {
    // "the server is also permitted to reject large read requests up front with EOVERFLOW": with structured replies
    return negotiated.structuredReplies ? TOO_LONG_TO_SEND : TOO_LONG;
  } else if (request.type === CMD.BLOCK_STATUS) {
    if ((flags & CMD_FLAG.PAYLOAD_LEN) !== 0) {
      if (!isStatusPayloadLength(request.payloadLength, negotiated)) return BAD_STATUS_PAYLOAD;
      // The payload has not arrived yet.
      if (request.statusPayload === undefined) return undefined;
      if (!areSelected(request.statusPayload, negotiated)) return BAD_STATUS_PAYLOAD;
    }
    if (length === 0) return EMPTY_STATUS;
  }
  // Never offset + length: the sum may be larger than a number can hold exactly.
  if (length > geometry.size || offset > geometry.size - length) return outOfRange;
  if (geometry.minimumBlockSize > 1) {
    const mask = geometry.minimumBlockSize - 1;
    // A power of two up to 2^16: the low 32 bits of a length are enough for the mask.
    if ((length & mask) !== 0 || offset % geometry.minimumBlockSize !== 0) return UNALIGNED;
  }
  // "MAY reply with an EOVERFLOW … if the oversize request would require too many server resources": no queue of reads.
  if (request.type === CMD.CACHE && length >= TWO_POW_32) return TOO_LONG_TO_CACHE;
  return undefined;
}

/** "The payload form MUST occupy 8 + n*4 bytes": with at least one id, and no more than can be without repeating one. */
function isStatusPayloadLength(length: number, negotiated: Negotiated): boolean {
  const ids = (length - STATUS_PAYLOAD_HEAD) / 4;
  return Number.isInteger(ids) && ids >= 1 && ids <= negotiated.metaContexts.length;
}

function areSelected(payload: Buffer, { metaContexts }: Negotiated): boolean {
  const ids = idsOf(payload);
  return new Set(ids).size === ids.length && ids.every((id) => metaContexts.some((context) => context.id === id));
}

function idsOf(payload: Buffer): number[] {
  const ids: number[] = [];
  for (let at = STATUS_PAYLOAD_HEAD; at < payload.length; at += 4) ids.push(payload.readUInt32BE(at));
  return ids;
}
