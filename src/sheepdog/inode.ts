/**
 * The header of an inode (sheepdog_proto.h, struct sd_inode, before its table). Owns its byte offsets, and how the fields that
 * are written by themselves are encoded. The table and the counts behind it are in inode-table.ts, the tree that a hyper volume
 * has there in btree.ts. Between header and table own-name.ts uses some unused bytes.
 */
import { blob, nu64, struct, u32, u8 } from 'buffer-layout';
import { NAME_BYTES, TAG_BYTES } from './protocol.js';
import { decodeText } from './text-fields.js';
import { milliseconds } from './times.js';

export const INODE_HEADER_BYTES = 572;
/** Offsets of the fields that are written by themselves. */
export const INODE_NAME_OFFSET = 0;
export const INODE_TAG_OFFSET = 256;
export const INODE_SNAP_CTIME_OFFSET = 520;
export const INODE_VDI_SIZE_OFFSET = 536;
export const INODE_BTREE_COUNTER_OFFSET = 568;

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

/** What an inode's header says. Sizes are bytes, times milliseconds since 1970. */
export interface Inode {
  readonly vid: number;
  readonly name: string;
  /** As it is stored; snapshots may have none. */
  readonly tag: string;
  readonly isSnapshot: boolean;
  /** Counts the snapshots of a name from 1; the working VDI has the next number. */
  readonly snapId: number;
  readonly size: number;
  readonly blockSizeShift: number;
  /** The snapshot that this VDI continues or was cloned from; 0 for none. */
  readonly parentVid: number;
  readonly createdAt: number;
  /** 0 for a working VDI. */
  readonly snapshotAt: number;
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
    name: decodeText(inode.name),
    tag: decodeText(inode.tag),
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

/** A time as inodes hold it. */
export function encodeTime(timeMs: number): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeUInt32LE((timeMs % 1000) * 1_000_000, 0);
  bytes.writeUInt32LE(Math.floor(timeMs / 1000), 4);
  return bytes;
}

/** vdi_size. */
export function encodeSize(size: number): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(BigInt(size));
  return bytes;
}

/** btree_counter, which counts the leaves of a hyper volume that were ever made. */
export function encodeBtreeCounter(count: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(count);
  return bytes;
}

export function decodeBtreeCounter(bytes: Buffer): number {
  return bytes.readUInt32LE();
}

export const BTREE_COUNTER_BYTES = 4;
