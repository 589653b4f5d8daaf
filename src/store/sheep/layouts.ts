/**
 * The structures that travel: headers of requests and responses, inode headers, node lists, cluster information. Owns
 * every byte offset but those of protocol.ts; nothing else here decides or sends anything.
 */
import { blob, nu64, s16, struct, u16, u32, u8, type Layout } from 'buffer-layout';
import type { VdiRecord } from '../object-store.js';
import { parseUnfinishedTag } from './unfinished-tag.js';
import {
  HEADER_BYTES,
  INODE_HEADER_BYTES,
  INTERNAL_OPCODES,
  MAX_HYPER_OBJECTS,
  NAME_BYTES,
  NODE_BYTES,
  PROTO_VER,
  SHEEP_PROTO_VER,
  TAG_BYTES,
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

/** sheepdog_proto.h, struct sd_req, obj. oids are two halves: a bigint per request would cost more than the request. */
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

/** Offsets in struct sd_req and sd_rsp that are read and written for every request. */
export const EPOCH_OFFSET = 4;
export const ID_OFFSET = 8;
export const DATA_LENGTH_OFFSET = 12;
export const RESULT_OFFSET = 16;
export const PAYLOAD_OFFSET_OFFSET = 24;
/** In a request on an object. */
export const OID_OFFSET = 16;

/** A request on an object, as objectRequest has it, written field by field: this is the data path. */
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
  header[1] = opcode;
  header.writeUInt16LE(flags, 2);
  header.writeUInt32LE(length, DATA_LENGTH_OFFSET);
  header.writeUInt32LE(oidLow, OID_OFFSET);
  header.writeUInt32LE(oidHigh, OID_OFFSET + 4);
  header.writeUInt32LE(cowLow, 24);
  header.writeUInt32LE(cowHigh, 28);
  header.writeUInt32LE(offset, 40);
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

/** name and tag, padded with NULs; what does not fit is cut off, callers check names before. */
export function encodeName(name: string, tag?: string): Buffer {
  const data = Buffer.alloc(tag === undefined ? NAME_BYTES : NAME_BYTES + TAG_BYTES);
  data.write(name, 0, NAME_BYTES - 1);
  if (tag !== undefined) data.write(tag, NAME_BYTES, TAG_BYTES - 1);
  return data;
}

interface InodeLayout {
  name: Buffer;
  tag: Buffer;
  createNsec: number;
  createSec: number;
  snapNsec: number;
  snapSec: number;
  vmClockNsec: Buffer;
  vdiSize: number;
  vmStateSize: number;
  copyPolicy: number;
  storePolicy: number;
  nrCopies: number;
  blockSizeShift: number;
  snapId: number;
  vdiId: number;
  parentVdiId: number;
  btreeCounter: number;
}

/** The first INODE_HEADER_BYTES of struct sd_inode. Times are seconds << 32 | nanoseconds. */
export const inodeLayout = struct<InodeLayout>([
  blob(NAME_BYTES, 'name'),
  blob(TAG_BYTES, 'tag'),
  u32('createNsec'),
  u32('createSec'),
  u32('snapNsec'),
  u32('snapSec'),
  blob(8, 'vmClockNsec'),
  nu64('vdiSize'),
  nu64('vmStateSize'),
  u8('copyPolicy'),
  u8('storePolicy'),
  u8('nrCopies'),
  u8('blockSizeShift'),
  u32('snapId'),
  u32('vdiId'),
  u32('parentVdiId'),
  u32('btreeCounter'),
]);

/** What an inode's header says. */
export interface Inode extends VdiRecord {
  /** As it is stored; snapshots may have none. */
  readonly tag: string;
  /** vm_clock_nsec, which means nothing in a VDI without a machine's state: marks who keeps a temporary snapshot. */
  readonly mark: Buffer;
  readonly copies: number;
  readonly copyPolicy: number;
  /** 0: a table of objects; 1: a B-tree (hyper volume). */
  readonly storePolicy: number;
}

export function decodeInode(bytes: Buffer): Inode {
  if (bytes.length < INODE_HEADER_BYTES) throw new Error('invariant: an inode header is cut off');
  const inode = inodeLayout.decode(bytes);
  return {
    vid: inode.vdiId,
    name: textOf(inode.name),
    tag: textOf(inode.tag),
    isSnapshot: inode.snapSec !== 0 || inode.snapNsec !== 0,
    snapId: inode.snapId,
    size: inode.vdiSize,
    blockSizeShift: inode.blockSizeShift,
    parentVid: inode.parentVdiId,
    createdAt: milliseconds(inode.createSec, inode.createNsec),
    snapshotAt: milliseconds(inode.snapSec, inode.snapNsec),
    mark: Buffer.from(inode.vmClockNsec),
    copies: inode.nrCopies,
    copyPolicy: inode.copyPolicy,
    storePolicy: inode.storePolicy,
  };
}

/** As src/vdi knows it. Snapshots may have no tag in a cluster; people give their id then, as with `dog`. */
export function recordOf(inode: Inode): VdiRecord {
  const unfinished = inode.isSnapshot ? undefined : parseUnfinishedTag(inode.tag);
  return {
    vid: inode.vid,
    name: inode.name,
    tag: inode.isSnapshot ? inode.tag || String(inode.snapId) : '',
    isSnapshot: inode.isSnapshot,
    snapId: inode.snapId,
    size: inode.size,
    blockSizeShift: inode.blockSizeShift,
    parentVid: inode.parentVid,
    createdAt: inode.createdAt,
    snapshotAt: inode.snapshotAt,
    ...(inode.storePolicy === 0 ? {} : { maxObjects: MAX_HYPER_OBJECTS }),
    ...(unfinished && { unfinished }),
  };
}

/** A time as inodes hold it. */
export function encodeTime(timeMs: number): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeUInt32LE((timeMs % 1000) * 1_000_000, 0);
  bytes.writeUInt32LE(Math.floor(timeMs / 1000), 4);
  return bytes;
}

export interface ClusterNode {
  readonly host: string;
  readonly port: number;
  readonly vnodes: number;
  readonly zone: number;
  readonly space: number;
  /** The 16 bytes that stand for it in the hash that places objects. */
  readonly address: Buffer;
}

interface NodeLayout {
  addr: Buffer;
  port: number;
  nrVnodes: number;
  zone: number;
  space: number;
}

/** struct sd_node: a red-black tree's links, which mean nothing on the wire, then struct node_id. */
const nodeLayout = struct<NodeLayout>([
  blob(24, 'rb'),
  blob(16, 'addr'),
  u16('port'),
  blob(16, 'ioAddr'),
  u16('ioPort'),
  blob(4, 'pad'),
  u16('nrVnodes'),
  blob(2, 'pad2'),
  u32('zone'),
  nu64('space'),
]);

export function decodeNodes(bytes: Buffer, count: number): ClusterNode[] {
  const nodes: ClusterNode[] = [];
  // Nodes built with disk vnodes have longer entries; their list cannot be told from this one by its header.
  if (bytes.length !== count * NODE_BYTES) return nodes;
  for (let n = 0; n < count; n++) {
    const { addr, port, nrVnodes, zone, space } = nodeLayout.decode(bytes, n * NODE_BYTES);
    nodes.push({ host: addressText(addr), port, vnodes: nrVnodes, zone, space, address: Buffer.from(addr) });
  }
  return nodes;
}

export interface ClusterInfo {
  readonly epoch: number;
  readonly createdAt: number;
  readonly flags: number;
  readonly copies: number;
  readonly copyPolicy: number;
  /** enum sd_status: 1 running, 2 waiting for nodes or a format, 3 shutting down, 4 killed. */
  readonly status: number;
  readonly blockSizeShift: number;
  readonly store: string;
  readonly nodeCount: number;
}

interface ClusterInfoLayout {
  nrNodes: number;
  epoch: number;
  ctimeNsec: number;
  ctimeSec: number;
  flags: number;
  nrCopies: number;
  copyPolicy: number;
  status: number;
  blockSizeShift: number;
  store: Buffer;
}

/** internal_proto.h, struct cluster_info, up to its nodes. */
const clusterInfoLayout = struct<ClusterInfoLayout>([
  u8('protoVer'),
  u8('disableRecovery'),
  s16('nrNodes'),
  u32('epoch'),
  u32('ctimeNsec'),
  u32('ctimeSec'),
  u16('flags'),
  u8('nrCopies'),
  u8('copyPolicy'),
  u8('status'),
  u8('blockSizeShift'),
  blob(3, 'pad'),
  blob(16, 'store'),
]);

export function decodeClusterInfo(bytes: Buffer): ClusterInfo {
  const info = clusterInfoLayout.decode(bytes);
  return {
    epoch: info.epoch,
    createdAt: milliseconds(info.ctimeSec, info.ctimeNsec),
    flags: info.flags,
    copies: info.nrCopies,
    copyPolicy: info.copyPolicy,
    status: info.status,
    blockSizeShift: info.blockSizeShift,
    store: textOf(info.store),
    nodeCount: info.nrNodes,
  };
}

function milliseconds(seconds: number, nanoseconds: number): number {
  return seconds * 1000 + Math.floor(nanoseconds / 1_000_000);
}

function textOf(bytes: Buffer): string {
  const end = bytes.indexOf(0);
  return bytes.toString('utf8', 0, end < 0 ? bytes.length : end);
}

/** addr of struct node_id: IPv6, or IPv4 in the last four bytes with zeros before. */
function addressText(addr: Buffer): string {
  if (addr.subarray(0, 12).every((byte) => byte === 0)) return addr.subarray(12).join('.');
  const groups: string[] = [];
  for (let at = 0; at < 16; at += 2) groups.push(addr.readUInt16BE(at).toString(16));
  return groups.join(':');
}
