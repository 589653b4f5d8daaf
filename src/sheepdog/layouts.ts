/**
 * The structures that travel: headers of requests and responses, inode headers, node lists, cluster information. Owns
 * every byte offset but those of protocol.ts and state-layouts.ts; nothing else here decides or sends anything.
 */
import { blob, nu64, s16, struct, u16, u32, u8, type Layout } from 'buffer-layout';
import { bytesOfText, textOfBytes } from '../text/name-bytes.js';
import { DEFAULT_BLOCK_SIZE_SHIFT, StoreError, type VdiRecord } from '../store/object-store.js';
import { canonicalHost } from '../store/sheep/cluster-address.js';
import { redundancyOf } from './copy-policy.js';
import { parseUnfinishedTag } from './unfinished-tag.js';
import {
  HEADER_BYTES,
  INODE_HEADER_BYTES,
  INTERNAL_OPCODES,
  OLD_SHEEP_PROTO_VER,
  MAX_HYPER_OBJECTS,
  NAME_BYTES,
  NODE_BYTES,
  PROTO_VER,
  SHEEP_PROTO_VER,
  Result,
  STATUS_RUNNING,
  STATUS_SHUTTING_DOWN,
  STATUS_WAITING,
  TAG_BYTES,
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
  bytesOfText(name).copy(data, 0, 0, NAME_BYTES - 1);
  if (tag !== undefined) bytesOfText(tag).copy(data, NAME_BYTES, 0, TAG_BYTES - 1);
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
    redundancy: redundancyOf(inode),
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
  /** Of nodes that are built with disk vnodes: what places their objects, if the cluster was formatted so. */
  readonly disks: readonly NodeDisk[];
}

/** struct disk_info. */
export interface NodeDisk {
  readonly id: bigint;
  /** Bytes. */
  readonly space: bigint;
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

/** struct disk_info, and as many of them as follow a node if it is built with --enable-diskvnodes (DISK_MAX). */
const DISK_BYTES = 16;
const MAX_DISKS = 32;
const NODE_WITH_DISKS_BYTES = NODE_BYTES + MAX_DISKS * DISK_BYTES;

/** Errors: StoreError IO if entries have a length that no nodes are known to have. */
export function decodeNodes(bytes: Buffer, count: number): ClusterNode[] {
  const nodes: ClusterNode[] = [];
  // The header says nothing of how the nodes were built.
  const entryBytes = count === 0 ? NODE_BYTES : bytes.length / count;
  if (entryBytes !== NODE_BYTES && entryBytes !== NODE_WITH_DISKS_BYTES) {
    throw new StoreError(
      'IO',
      `the cluster's list of ${count} nodes has ${bytes.length} bytes: entries of ${NODE_BYTES} or ${NODE_WITH_DISKS_BYTES} ` +
        'bytes are known (sheep built without and with --enable-diskvnodes)',
    );
  }
  for (let n = 0; n < count; n++) {
    const entry = bytes.subarray(n * entryBytes, (n + 1) * entryBytes);
    const { addr, port, nrVnodes, zone, space } = nodeLayout.decode(entry);
    const disks = decodeDisks(entry.subarray(NODE_BYTES));
    nodes.push({ host: addressText(addr), port, vnodes: nrVnodes, zone, space, address: Buffer.from(addr), disks });
  }
  return nodes;
}

function decodeDisks(bytes: Buffer): NodeDisk[] {
  const disks: NodeDisk[] = [];
  for (let at = 0; at < bytes.length; at += DISK_BYTES) {
    const id = bytes.readBigUInt64LE(at);
    if (id !== 0n) disks.push({ id, space: bytes.readBigUInt64LE(at + 8) });
  }
  return disks;
}

export interface ClusterInfo {
  readonly epoch: number;
  readonly createdAt: number;
  readonly flags: number;
  readonly copies: number;
  readonly copyPolicy: number;
  /** enum sd_status. */
  readonly status: number;
  readonly blockSizeShift: number;
  readonly store: string;
  readonly nodeCount: number;
  readonly version: SheepVersion;
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

/** internal_proto.h of 0.8, struct epoch_log: what there is in place of struct cluster_info. */
const oldEpochLogLayout = struct<OldEpochLogLayout>([
  u32('ctimeNsec'),
  u32('ctimeSec'),
  nu64('time'),
  u32('epoch'),
  u32('nrNodes'),
  u8('disableRecovery'),
  u8('nrCopies'),
  u8('copyPolicy'),
  u8('pad'),
  blob(16, 'store'),
]);

/** Of a time that a node does not say. */
export const UNKNOWN_TIME = -1;
/** By the result of STAT_CLUSTER. */
const OLD_STATUS: ReadonlyMap<number, number> = new Map([
  [Result.SUCCESS, STATUS_RUNNING],
  [Result.WAIT_FOR_FORMAT, STATUS_WAITING],
  [Result.WAIT_FOR_JOIN, STATUS_WAITING],
]);

interface OldEpochLogLayout {
  ctimeNsec: number;
  ctimeSec: number;
  epoch: number;
  nrNodes: number;
  nrCopies: number;
  copyPolicy: number;
  store: Buffer;
}

/**
 * What a node of 0.8 answers to STAT_CLUSTER: its result says whether the cluster serves. Before that there may be nothing else:
 * then `createdAt` is UNKNOWN_TIME of one that was formatted.
 */
export function decodeOldClusterInfo(bytes: Buffer, result: number = Result.SUCCESS): ClusterInfo {
  const log = oldEpochLogLayout.decode(bytes);
  const createdAt = milliseconds(log.ctimeSec, log.ctimeNsec);
  return {
    epoch: log.epoch,
    createdAt: result === Result.WAIT_FOR_FORMAT ? 0 : createdAt || UNKNOWN_TIME,
    flags: 0,
    copies: log.nrCopies,
    copyPolicy: log.copyPolicy,
    status: OLD_STATUS.get(result) ?? STATUS_SHUTTING_DOWN,
    blockSizeShift: DEFAULT_BLOCK_SIZE_SHIFT,
    store: textOf(log.store),
    nodeCount: log.nrNodes,
    version: '0.8',
  };
}

/** In 0.9, which knows objects of one size only, the name of the store stands further on. */
const OLD_STORE_OFFSET = 28;

/** A request as nodes of that version take it: changed in place, and returned. */
export function inVersion(header: Buffer, version: SheepVersion | undefined): Buffer {
  const isOld = version === '0.8' || version === '0.9';
  if (isOld && (header[1] as number) >= INTERNAL_OPCODES) header[0] = OLD_SHEEP_PROTO_VER;
  return header;
}

export function decodeClusterInfo(bytes: Buffer, version: SheepVersion = '1.0'): ClusterInfo {
  const info = clusterInfoLayout.decode(bytes);
  const isOld = version === '0.9';
  return {
    epoch: info.epoch,
    createdAt: milliseconds(info.ctimeSec, info.ctimeNsec),
    flags: info.flags,
    copies: info.nrCopies,
    copyPolicy: info.copyPolicy,
    status: info.status,
    blockSizeShift: isOld ? DEFAULT_BLOCK_SIZE_SHIFT : info.blockSizeShift,
    store: textOf(isOld ? bytes.subarray(OLD_STORE_OFFSET, OLD_STORE_OFFSET + info.store.length) : info.store),
    nodeCount: info.nrNodes,
    version,
  };
}

function milliseconds(seconds: number, nanoseconds: number): number {
  return seconds * 1000 + Math.floor(nanoseconds / 1_000_000);
}

function textOf(bytes: Buffer): string {
  const end = bytes.indexOf(0);
  return textOfBytes(end < 0 ? bytes : bytes.subarray(0, end));
}

/**
 * addr of struct node_id: IPv6, or IPv4 in the last four bytes with zeros before. As the nodes tell one from the other
 * (lib/net.c, addr_to_str): ::1 begins with as many zeros, but no IPv4 address begins with one more.
 */
export function addressText(addr: Buffer): string {
  if (addr[12] !== 0 && addr.subarray(0, 12).every((byte) => byte === 0)) return addr.subarray(12).join('.');
  const groups: string[] = [];
  for (let at = 0; at < 16; at += 2) groups.push(addr.readUInt16BE(at).toString(16));
  return canonicalHost(groups.join(':'));
}
