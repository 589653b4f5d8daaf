/**
 * The NBD wire: every number that may appear on it and every byte layout that server and client share. It owns magics,
 * option, reply, command and error values, and their encoders; it uses no socket, device or policy.
 * Source: proto.md of the NetworkBlockDevice project, and its branch extension-ext-header for the extended headers;
 * section names are given where a value comes from.
 */

import type { DeviceErrorCode, Geometry } from '../block-device.js';

const TWO_POW_32 = 0x1_0000_0000;

// --- Handshake: "Newstyle negotiation", "Fixed newstyle negotiation" ---

/** ASCII 'NBDMAGIC', as two 32-bit halves: no BigInt. */
export const NBD_MAGIC_HIGH = 0x4e42444d;
export const NBD_MAGIC_LOW = 0x41474943;
/** ASCII 'IHAVEOPT'. */
export const OPTION_MAGIC_HIGH = 0x49484156;
export const OPTION_MAGIC_LOW = 0x454f5054;
/** 0x3e889045565a9, before every option reply. */
export const OPTION_REPLY_MAGIC_HIGH = 0x0003e889;
export const OPTION_REPLY_MAGIC_LOW = 0x045565a9;

export const GREETING_SIZE = 18;
export const CLIENT_FLAGS_SIZE = 4;
export const OPTION_HEADER_SIZE = 16;
export const OPTION_REPLY_HEADER_SIZE = 20;
/** The reserved zeros after the answer to NBD_OPT_EXPORT_NAME, unless NO_ZEROES was negotiated. */
export const EXPORT_NAME_PADDING = 124;
/** "Conventions": a string MUST be no longer than 4096 bytes. */
export const MAX_STRING_BYTES = 4096;

/** "Handshake flags" (server) and "Client flags"; both directions use the same two bits. */
export const HANDSHAKE_FLAG = { FIXED_NEWSTYLE: 1 << 0, NO_ZEROES: 1 << 1 } as const;

/** "Transmission flags". */
export const TRANSMISSION_FLAG = {
  HAS_FLAGS: 1 << 0,
  READ_ONLY: 1 << 1,
  SEND_FLUSH: 1 << 2,
  SEND_FUA: 1 << 3,
  ROTATIONAL: 1 << 4,
  SEND_TRIM: 1 << 5,
  SEND_WRITE_ZEROES: 1 << 6,
  SEND_DF: 1 << 7,
  CAN_MULTI_CONN: 1 << 8,
  SEND_RESIZE: 1 << 9,
  SEND_CACHE: 1 << 10,
  SEND_FAST_ZERO: 1 << 11,
  BLOCK_STATUS_PAYLOAD: 1 << 12,
} as const;

/** "Option types". */
export const OPT = {
  EXPORT_NAME: 1,
  ABORT: 2,
  LIST: 3,
  PEEK_EXPORT: 4,
  STARTTLS: 5,
  INFO: 6,
  GO: 7,
  STRUCTURED_REPLY: 8,
  LIST_META_CONTEXT: 9,
  SET_META_CONTEXT: 10,
  EXTENDED_HEADERS: 11,
} as const;

/** "Option reply types"; errors have bit 31 set. */
export const REP = {
  ACK: 1,
  SERVER: 2,
  INFO: 3,
  META_CONTEXT: 4,
  ERR_UNSUP: 0x80000001,
  ERR_POLICY: 0x80000002,
  ERR_INVALID: 0x80000003,
  ERR_PLATFORM: 0x80000004,
  ERR_TLS_REQD: 0x80000005,
  ERR_UNKNOWN: 0x80000006,
  ERR_SHUTDOWN: 0x80000007,
  ERR_BLOCK_SIZE_REQD: 0x80000008,
  ERR_TOO_BIG: 0x80000009,
  ERR_EXT_HEADER_REQD: 0x8000000a,
} as const;

export const REP_ERROR_BIT = 0x80000000;

/** "Option reply types", NBD_REP_INFO. */
export const INFO = { EXPORT: 0, NAME: 1, DESCRIPTION: 2, BLOCK_SIZE: 3 } as const;

// --- Transmission: "Request message", "Simple reply message", "Structured reply chunk message", and the extended ones ---

export const REQUEST_MAGIC = 0x25609513;
export const SIMPLE_REPLY_MAGIC = 0x67446698;
export const REQUEST_HEADER_SIZE = 28;
export const SIMPLE_REPLY_SIZE = 16;
export const STRUCTURED_REPLY_MAGIC = 0x668e33ef;
export const STRUCTURED_REPLY_SIZE = 20;
export const EXTENDED_REQUEST_MAGIC = 0x21e41c71;
export const EXTENDED_REQUEST_SIZE = 32;
export const EXTENDED_REPLY_MAGIC = 0x6e8a278c;
export const EXTENDED_REPLY_SIZE = 32;

/** "Structured reply flags". */
export const REPLY_FLAG_DONE = 1 << 0;

/** "Structured reply types"; errors have bit 15 set. */
export const REPLY_TYPE = {
  NONE: 0,
  OFFSET_DATA: 1,
  OFFSET_HOLE: 2,
  BLOCK_STATUS: 5,
  BLOCK_STATUS_EXT: 6,
  ERROR: 0x8001,
  ERROR_OFFSET: 0x8002,
} as const;

export const REPLY_TYPE_ERROR_BIT = 0x8000;

/** "Servers SHOULD NOT send more than 2^20 extents in a single reply chunk." */
export const MAX_CHUNK_EXTENTS = 2 ** 20;

/** "Request types". */
export const CMD = {
  READ: 0,
  WRITE: 1,
  DISC: 2,
  FLUSH: 3,
  TRIM: 4,
  CACHE: 5,
  WRITE_ZEROES: 6,
  BLOCK_STATUS: 7,
} as const;

/** The name of a command, as in NBD_CMD_READ. */
export type CommandName = keyof typeof CMD;

/** The names of the commands, by their numbers on the wire. */
export const COMMAND_NAMES: readonly CommandName[] = Object.freeze(
  (Object.keys(CMD) as CommandName[]).sort((a, b) => CMD[a] - CMD[b]),
);

/** The name of the command with the number `type`; "command 9" if NBD has none. */
export function commandName(type: number): CommandName | `command ${number}` {
  return COMMAND_NAMES[type] ?? `command ${type}`;
}

/** "Command flags". */
export const CMD_FLAG = {
  FUA: 1 << 0,
  NO_HOLE: 1 << 1,
  DF: 1 << 2,
  REQ_ONE: 1 << 3,
  FAST_ZERO: 1 << 4,
  PAYLOAD_LEN: 1 << 5,
} as const;

/** "Error values". The only table from a cause to the number on the wire. */
export const NBD_ERRNO: Readonly<Record<DeviceErrorCode, number>> = {
  EPERM: 1,
  EIO: 5,
  ENOMEM: 12,
  EINVAL: 22,
  ENOSPC: 28,
  EOVERFLOW: 75,
  ENOTSUP: 95,
  ESHUTDOWN: 108,
};

const ERROR_NAME: ReadonlyMap<number, DeviceErrorCode> = new Map(
  Object.entries(NBD_ERRNO).map(([name, value]) => [value, name as DeviceErrorCode]),
);

/** The name of an error value; "a client SHOULD treat an unexpected error value as if it had been EINVAL". */
export function errorName(errno: number): DeviceErrorCode {
  return ERROR_NAME.get(errno) ?? 'EINVAL';
}

/** The largest READ or WRITE payload accepted and advertised, in bytes: the default of "Size constraints", 2^25. */
export const MAX_PAYLOAD = 32 * 1024 * 1024;
/** "Size constraints": no minimum block size may be larger. */
export const MAX_MINIMUM_BLOCK_SIZE = 65536;
/** "Size constraints": the preferred block size is at least this. */
export const LEAST_PREFERRED_BLOCK_SIZE = 512;

// --- What was negotiated ---

/** A meta context that the client selected; `id` identifies it on the wire. */
export interface SelectedContext {
  readonly id: number;
  readonly name: string;
}

/** What client and server agreed on in the handshake; the transmission phase depends on nothing else of it. */
export interface Negotiated {
  readonly fixedNewstyle: boolean;
  readonly noZeroes: boolean;
  /** Replies come in chunks: structured ones, or, with `extendedHeaders`, extended ones. */
  readonly structuredReplies: boolean;
  /** Requests and replies have headers of 32 bytes and lengths of 64 bits. Implies `structuredReplies`. */
  readonly extendedHeaders: boolean;
  /** The contexts that a block status request is answered for. */
  readonly metaContexts: readonly SelectedContext[];
  readonly tls: boolean;
}

/** The transmission flags an export is announced with. A read-only export announces no command that would change it. */
export function transmissionFlags(geometry: Geometry, negotiated: Negotiated): number {
  const writable = !geometry.readOnly;
  let flags: number = TRANSMISSION_FLAG.HAS_FLAGS;
  if (geometry.readOnly) flags |= TRANSMISSION_FLAG.READ_ONLY;
  if (geometry.canFlush) flags |= TRANSMISSION_FLAG.SEND_FLUSH;
  if (geometry.canFua) flags |= TRANSMISSION_FLAG.SEND_FUA;
  if (geometry.rotational) flags |= TRANSMISSION_FLAG.ROTATIONAL;
  if (writable && geometry.canTrim) flags |= TRANSMISSION_FLAG.SEND_TRIM;
  if (writable && geometry.canZero) flags |= TRANSMISSION_FLAG.SEND_WRITE_ZEROES;
  if (writable && geometry.canZero && geometry.canFastZero) flags |= TRANSMISSION_FLAG.SEND_FAST_ZERO;
  if (negotiated.structuredReplies) flags |= TRANSMISSION_FLAG.SEND_DF;
  if (geometry.multiConn) flags |= TRANSMISSION_FLAG.CAN_MULTI_CONN;
  if (geometry.canCache) flags |= TRANSMISSION_FLAG.SEND_CACHE;
  if (negotiated.extendedHeaders && negotiated.metaContexts.length > 0) flags |= TRANSMISSION_FLAG.BLOCK_STATUS_PAYLOAD;
  return flags;
}

// --- Layouts ---

/** A size or offset up to 2^53-1 as 64 bits, big-endian. */
export function writeUInt64(target: Buffer, value: number, at: number): void {
  target.writeUInt32BE(Math.floor(value / TWO_POW_32), at);
  target.writeUInt32BE(value % TWO_POW_32, at + 4);
}

/** 64 bits as a number; Infinity if it is more than 2^53-1, so that every range check refuses it. */
export function readUInt64(source: Buffer, at: number): number {
  const high = source.readUInt32BE(at);
  return high > 0x1f_ffff ? Infinity : high * TWO_POW_32 + source.readUInt32BE(at + 4);
}

/** "Newstyle negotiation": the server's greeting. */
export function encodeGreeting(handshakeFlags: number): Buffer {
  const greeting = Buffer.allocUnsafe(GREETING_SIZE);
  greeting.writeUInt32BE(NBD_MAGIC_HIGH, 0);
  greeting.writeUInt32BE(NBD_MAGIC_LOW, 4);
  greeting.writeUInt32BE(OPTION_MAGIC_HIGH, 8);
  greeting.writeUInt32BE(OPTION_MAGIC_LOW, 12);
  greeting.writeUInt16BE(handshakeFlags, 16);
  return greeting;
}

/** An option as the client sends it: header and data. */
export function encodeOption(option: number, data: Buffer): Buffer {
  const message = Buffer.allocUnsafe(OPTION_HEADER_SIZE + data.length);
  message.writeUInt32BE(OPTION_MAGIC_HIGH, 0);
  message.writeUInt32BE(OPTION_MAGIC_LOW, 4);
  message.writeUInt32BE(option, 8);
  message.writeUInt32BE(data.length, 12);
  data.copy(message, OPTION_HEADER_SIZE);
  return message;
}

/** One reply to an option: header and data. `option` is repeated as the client sent it. */
export function encodeOptionReply(option: number, type: number, data?: Buffer): Buffer {
  const length = data?.length ?? 0;
  const message = Buffer.allocUnsafe(OPTION_REPLY_HEADER_SIZE + length);
  message.writeUInt32BE(OPTION_REPLY_MAGIC_HIGH, 0);
  message.writeUInt32BE(OPTION_REPLY_MAGIC_LOW, 4);
  message.writeUInt32BE(option, 8);
  message.writeUInt32BE(type, 12);
  message.writeUInt32BE(length, 16);
  data?.copy(message, OPTION_REPLY_HEADER_SIZE);
  return message;
}

/** Data of NBD_REP_SERVER: the name with its length, then the description for people. */
export function encodeServerEntry(name: string, description: string): Buffer {
  const nameBytes = Buffer.from(name);
  const length = Buffer.allocUnsafe(4);
  length.writeUInt32BE(nameBytes.length, 0);
  return Buffer.concat([length, nameBytes, Buffer.from(description)]);
}

/** Data of NBD_OPT_INFO and NBD_OPT_GO. */
export function encodeInfoRequest(name: string, infos: readonly number[]): Buffer {
  const nameBytes = Buffer.from(name);
  const data = Buffer.allocUnsafe(4 + nameBytes.length + 2 + 2 * infos.length);
  data.writeUInt32BE(nameBytes.length, 0);
  nameBytes.copy(data, 4);
  let at = 4 + nameBytes.length;
  data.writeUInt16BE(infos.length, at);
  for (const info of infos) data.writeUInt16BE(info, (at += 2));
  return data;
}

/** Data of NBD_REP_INFO with NBD_INFO_EXPORT. */
export function encodeInfoExport(size: number, flags: number): Buffer {
  const data = Buffer.allocUnsafe(12);
  data.writeUInt16BE(INFO.EXPORT, 0);
  writeUInt64(data, size, 2);
  data.writeUInt16BE(flags, 10);
  return data;
}

/** Data of NBD_REP_INFO with NBD_INFO_BLOCK_SIZE. */
export function encodeInfoBlockSize(minimum: number, preferred: number, maximumPayload: number): Buffer {
  const data = Buffer.allocUnsafe(14);
  data.writeUInt16BE(INFO.BLOCK_SIZE, 0);
  data.writeUInt32BE(minimum, 2);
  data.writeUInt32BE(preferred, 6);
  data.writeUInt32BE(maximumPayload, 10);
  return data;
}

/** Data of NBD_REP_INFO with NBD_INFO_NAME or NBD_INFO_DESCRIPTION. */
export function encodeInfoText(info: number, text: string): Buffer {
  const bytes = Buffer.from(text);
  const data = Buffer.allocUnsafe(2 + bytes.length);
  data.writeUInt16BE(info, 0);
  bytes.copy(data, 2);
  return data;
}

/** The whole answer to NBD_OPT_EXPORT_NAME. */
export function encodeExportNameReply(size: number, flags: number, noZeroes: boolean): Buffer {
  const reply = Buffer.alloc(10 + (noZeroes ? 0 : EXPORT_NAME_PADDING));
  writeUInt64(reply, size, 0);
  reply.writeUInt16BE(flags, 8);
  return reply;
}

/** "Request message", the header only. `cookie` is 32 bits, enough for one connection's pipeline. */
export function encodeRequest(type: number, flags: number, cookie: number, offset: number, length: number): Buffer {
  const message = Buffer.allocUnsafe(REQUEST_HEADER_SIZE);
  message.writeUInt32BE(REQUEST_MAGIC, 0);
  message.writeUInt16BE(flags, 4);
  message.writeUInt16BE(type, 6);
  message.writeUInt32BE(0, 8);
  message.writeUInt32BE(cookie, 12);
  writeUInt64(message, offset, 16);
  message.writeUInt32BE(length, 24);
  return message;
}

/** Data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT. */
export function encodeMetaQueries(exportName: string, queries: readonly string[]): Buffer {
  const parts: Buffer[] = [];
  const addNumber = (value: number): void => {
    const bytes = Buffer.allocUnsafe(4);
    bytes.writeUInt32BE(value, 0);
    parts.push(bytes);
  };
  const nameBytes = Buffer.from(exportName);
  addNumber(nameBytes.length);
  parts.push(nameBytes);
  addNumber(queries.length);
  for (const query of queries) {
    const bytes = Buffer.from(query);
    addNumber(bytes.length);
    parts.push(bytes);
  }
  return Buffer.concat(parts);
}

/** Data of NBD_REP_META_CONTEXT. */
export function encodeMetaContext(id: number, name: string): Buffer {
  const nameBytes = Buffer.from(name);
  const data = Buffer.allocUnsafe(4 + nameBytes.length);
  data.writeUInt32BE(id, 0);
  nameBytes.copy(data, 4);
  return data;
}

/** "Extended request", the header only; see encodeRequest. */
export function encodeExtendedRequest(
  type: number,
  flags: number,
  cookie: number,
  offset: number,
  length: number,
): Buffer {
  const message = Buffer.allocUnsafe(EXTENDED_REQUEST_SIZE);
  message.writeUInt32BE(EXTENDED_REQUEST_MAGIC, 0);
  message.writeUInt16BE(flags, 4);
  message.writeUInt16BE(type, 6);
  message.writeUInt32BE(0, 8);
  message.writeUInt32BE(cookie, 12);
  writeUInt64(message, offset, 16);
  writeUInt64(message, length, 24);
  return message;
}

const strictUtf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

/** A string of the wire ("Conventions"): UTF-8, no NUL, at most 4096 bytes. Undefined if `bytes` is not one. */
export function decodeString(bytes: Buffer): string | undefined {
  if (bytes.length > MAX_STRING_BYTES || bytes.includes(0)) return undefined;
  try {
    return strictUtf8.decode(bytes);
  } catch {
    return undefined;
  }
}

/** `text` as at most `most` bytes of UTF-8, cut between characters. */
export function encodeString(text: string, most = MAX_STRING_BYTES): Buffer {
  const bytes = Buffer.from(text.includes('\0') ? text.replaceAll('\0', ' ') : text);
  if (bytes.length <= most) return bytes;
  let end = most;
  while (end > 0 && ((bytes[end] ?? 0) & 0xc0) === 0x80) end--;
  return bytes.subarray(0, end);
}
