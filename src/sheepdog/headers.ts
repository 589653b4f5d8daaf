/**
 * Headers of requests and responses (sheepdog_proto.h, struct sd_req and sd_rsp). Owns their byte offsets, and how a request
 * is encoded; sends nothing.
 *
 * The accessors at the end are for the data path: they read one field where a header lies, and allocate nothing.
 */
import { nu64, struct, u16, u32, u8, type Layout } from 'buffer-layout';
import {
  HEADER_BYTES,
  INTERNAL_OPCODES,
  OBJECT_OPCODES,
  OLD_SHEEP_PROTO_VER,
  Opcode,
  Flag,
  PROTO_VER,
  SHEEP_PROTO_VER,
  type SheepVersion,
} from './protocol.js';

interface CommonHeader {
  protoVer: number;
  opcode: number;
  flags: number;
  epoch: number;
  id: number;
  dataLength: number;
}

const COMMON: readonly Layout<unknown>[] = [
  u8('protoVer'),
  u8('opcode'),
  u16('flags'),
  u32('epoch'),
  u32('id'),
  u32('dataLength'),
];

/** sheepdog_proto.h, struct sd_req, obj. An oid is two halves (object-ids.ts). */
export interface ObjectRequest extends CommonHeader {
  oidLow: number;
  oidHigh: number;
  cowLow: number;
  cowHigh: number;
  copies: number;
  copyPolicy: number;
  ecIndex: number;
  reserved: number;
  tgtEpoch: number;
  offset: number;
  pad: number;
}

export const objectRequest = struct<ObjectRequest>([
  ...COMMON,
  u32('oidLow'),
  u32('oidHigh'),
  u32('cowLow'),
  u32('cowHigh'),
  u8('copies'),
  u8('copyPolicy'),
  u8('ecIndex'),
  u8('reserved'),
  u32('tgtEpoch'),
  u32('offset'),
  u32('pad'),
]);

/** sheepdog_proto.h, struct sd_req, vdi. */
export interface VdiRequest extends CommonHeader {
  vdiSize: number;
  baseVid: number;
  copies: number;
  copyPolicy: number;
  storePolicy: number;
  blockSizeShift: number;
  snapId: number;
  type: number;
  pad: number;
}

export const vdiRequest = struct<VdiRequest>([
  ...COMMON,
  nu64('vdiSize'),
  u32('baseVid'),
  u8('copies'),
  u8('copyPolicy'),
  u8('storePolicy'),
  u8('blockSizeShift'),
  u32('snapId'),
  u32('type'),
  nu64('pad'),
]);

/** struct sd_rsp, vdi. */
export interface VdiResponse extends CommonHeader {
  result: number;
  rsvd: number;
  vid: number;
  attrId: number;
  copies: number;
  blockSizeShift: number;
}

export const vdiResponse = struct<VdiResponse>([
  ...COMMON,
  u32('result'),
  u32('rsvd'),
  u32('vid'),
  u32('attrId'),
  u8('copies'),
  u8('blockSizeShift'),
]);

/** struct sd_rsp, node. */
export interface NodeResponse extends CommonHeader {
  result: number;
  nrNodes: number;
  storeSize: number;
  storeFree: number;
}

export const nodeResponse = struct<NodeResponse>([
  ...COMMON,
  u32('result'),
  u32('nrNodes'),
  nu64('reserved'),
  nu64('storeSize'),
  nu64('storeFree'),
]);

const OPCODE_OFFSET = 1;
const FLAGS_OFFSET = 2;
const EPOCH_OFFSET = 4;
const ID_OFFSET = 8;
const DATA_LENGTH_OFFSET = 12;
/** Of a response. */
const RESULT_OFFSET = 16;
const PAYLOAD_OFFSET_OFFSET = 24;
/** Of a request on an object. */
const OID_OFFSET = 16;
const COW_OID_OFFSET = 24;
const EC_INDEX_OFFSET = 34;
const TARGET_EPOCH_OFFSET = 36;
const OBJECT_OFFSET_OFFSET = 40;
/** Of a request for the logs of epochs (cluster.nodes_nr). */
const NODES_NR_OFFSET = 40;

/** A request on an object, as objectRequest has it, but written field by field: this is the data path. */
export function encodeObjectRequest(
  opcode: number,
  flags: number,
  oidHigh: number,
  oidLow: number,
  offset: number,
  length: number,
  cowHigh = 0,
  cowLow = 0,
): Buffer {
  const header = Buffer.allocUnsafe(HEADER_BYTES);
  header.fill(0);
  header[0] = opcode < INTERNAL_OPCODES ? PROTO_VER : SHEEP_PROTO_VER;
  header[OPCODE_OFFSET] = opcode;
  header.writeUInt16LE(flags, FLAGS_OFFSET);
  header.writeUInt32LE(length, DATA_LENGTH_OFFSET);
  header.writeUInt32LE(oidLow, OID_OFFSET);
  header.writeUInt32LE(oidHigh, OID_OFFSET + 4);
  header.writeUInt32LE(cowLow, COW_OID_OFFSET);
  header.writeUInt32LE(cowHigh, COW_OID_OFFSET + 4);
  header.writeUInt32LE(offset, OBJECT_OFFSET_OFFSET);
  return header;
}

export function encodeVdiRequest(
  opcode: number,
  flags: number,
  dataLength: number,
  fields: Partial<Omit<VdiRequest, keyof CommonHeader>> = {},
): Buffer {
  const header = Buffer.alloc(HEADER_BYTES);
  vdiRequest.encode(
    {
      protoVer: opcode < INTERNAL_OPCODES ? PROTO_VER : SHEEP_PROTO_VER,
      opcode,
      flags,
      epoch: 0,
      id: 0,
      dataLength,
      vdiSize: 0,
      baseVid: 0,
      copies: 0,
      copyPolicy: 0,
      storePolicy: 0,
      blockSizeShift: 0,
      snapId: 0,
      type: 0,
      pad: 0,
      ...fields,
    },
    header,
  );
  return header;
}

/**
 * READ_PEER, a read of what one node has of an object: its copy, or the strip of this number. Nodes of another epoch refuse it.
 * It waits for no recovery, and starts none (Flag.RECOVERY).
 */
export function encodePeerRead(
  epoch: number,
  oidHigh: number,
  oidLow: number,
  strip: number,
  offset: number,
  length: number,
): Buffer {
  const header = encodeObjectRequest(Opcode.READ_PEER, Flag.RECOVERY, oidHigh, oidLow, offset, length);
  header.writeUInt32LE(epoch, EPOCH_OFFSET);
  header[EC_INDEX_OFFSET] = strip;
  header.writeUInt32LE(epoch, TARGET_EPOCH_OFFSET);
  return header;
}

/** STAT_CLUSTER for the logs of epochs; each log has room for `nodes` nodes. */
export function encodeEpochLogRequest(dataLength: number, nodes: number): Buffer {
  const header = encodeVdiRequest(Opcode.STAT_CLUSTER, 0, dataLength);
  header.writeUInt32LE(nodes, NODES_NR_OFFSET);
  return header;
}

/** The request as nodes of that version take it: changed in place, and returned. */
export function inVersion(header: Buffer, version: SheepVersion | undefined): Buffer {
  const isOld = version === '0.8' || version === '0.9';
  if (isOld && opcodeOf(header) >= INTERNAL_OPCODES) header[0] = OLD_SHEEP_PROTO_VER;
  return header;
}

/** The request with this protocol version: changed in place, and returned. */
export function withProtoVer(header: Buffer, protoVer: number): Buffer {
  header[0] = protoVer;
  return header;
}

export function opcodeOf(header: Buffer): number {
  return header[OPCODE_OFFSET] as number;
}

export function setId(header: Buffer, id: number): void {
  header.writeUInt32LE(id, ID_OFFSET);
}

/** The object of a request, by the halves of its oid; undefined for a request that is not on an object. */
export function oidOf(header: Buffer): { readonly high: number; readonly low: number } | undefined {
  if (!OBJECT_OPCODES.has(opcodeOf(header))) return undefined;
  return { low: header.readUInt32LE(OID_OFFSET), high: header.readUInt32LE(OID_OFFSET + 4) };
}

/** Of the response whose header begins at `at`; the same for the next four. */
export function responseId(bytes: Buffer, at: number): number {
  return bytes.readUInt32LE(at + ID_OFFSET);
}

export function responseLength(bytes: Buffer, at: number): number {
  return bytes.readUInt32LE(at + DATA_LENGTH_OFFSET);
}

export function responseEpoch(bytes: Buffer, at: number): number {
  return bytes.readUInt32LE(at + EPOCH_OFFSET);
}

export function responseResult(bytes: Buffer, at: number): number {
  return bytes.readUInt32LE(at + RESULT_OFFSET);
}

/**
 * Where the payload belongs in what was asked for. Only responses to READ_OBJ say so; elsewhere the field means something else.
 */
export function responsePayloadOffset(bytes: Buffer, at: number): number {
  return Number(bytes.readBigUInt64LE(at + PAYLOAD_OFFSET_OFFSET));
}
