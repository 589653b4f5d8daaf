/**
 * The index of a hyper volume, which has a B-tree where other VDIs have their table (lib/sd_inode.c): a leaf in the inode,
 * or a root there that points to leaves in objects of their own. Only reads it: changing it is not one request but
 * several, and nothing counts who refers to what it drops. Owns the layout of its nodes.
 */
import { struct, u16, u32 } from 'buffer-layout';
import { StoreError } from '../object-store.js';
import { INODE_TABLE_OFFSET, inodeHigh } from './protocol.js';

/** INODE_BTREE_MAGIC. */
const MAGIC = 0x6274;
/** SD_INODE_DATA_INDEX_SIZE: a node of the tree, wherever it is. */
const NODE_BYTES = 2 ** 20 * 4;
/** struct sd_index_header. */
const header = struct<{ magic: number; depth: number; entries: number }>([u16('magic'), u16('depth'), u32('entries')]);
const HEADER_BYTES = 8;
/** struct sd_index: idx, vid. */
const LEAF_ENTRY_BYTES = 8;
/** struct sd_indirect_idx: the highest idx in the leaf, four bytes of padding, the leaf's oid. */
const ROOT_ENTRY_BYTES = 16;
const LEAF = 1;
const ROOT = 2;

/** Reads from the object whose oid has these halves. */
export type ReadObject = (high: number, low: number, offset: number, into: Buffer) => Promise<void>;

/**
 * Owners of the first `count` objects of the hyper volume, as a table would have them. Errors: StoreError DAMAGED, and
 * those of `read`.
 */
export async function readIndex(read: ReadObject, vid: number, count: number): Promise<Uint32Array> {
  const owners = new Uint32Array(count);
  const high = inodeHigh(vid);
  const root = await readHeader(read, vid, high, 0, INODE_TABLE_OFFSET);
  if (root === undefined) return owners; // nothing was ever written
  if (root.depth === LEAF) {
    await readLeaf(read, high, 0, INODE_TABLE_OFFSET, root.entries, owners);
    return owners;
  }
  if (root.depth !== ROOT) throw damaged(vid, `its index has a depth of ${root.depth}`);
  const entries = Buffer.alloc(checkedLength(vid, root.entries, ROOT_ENTRY_BYTES));
  if (entries.length > 0) await read(high, 0, INODE_TABLE_OFFSET + HEADER_BYTES, entries);
  for (let at = 0; at < entries.length; at += ROOT_ENTRY_BYTES) {
    const leafLow = entries.readUInt32LE(at + 8);
    const leafHigh = entries.readUInt32LE(at + 12);
    const leaf = await readHeader(read, vid, leafHigh, leafLow, 0);
    if (leaf === undefined) continue;
    if (leaf.depth !== LEAF) throw damaged(vid, `a leaf of its index has a depth of ${leaf.depth}`);
    await readLeaf(read, leafHigh, leafLow, 0, leaf.entries, owners);
  }
  return owners;
}

async function readHeader(
  read: ReadObject,
  vid: number,
  high: number,
  low: number,
  offset: number,
): Promise<{ depth: number; entries: number } | undefined> {
  const bytes = Buffer.alloc(HEADER_BYTES);
  await read(high, low, offset, bytes);
  if (bytes.readUInt32LE(0) === 0) return undefined;
  const { magic, depth, entries } = header.decode(bytes);
  if (magic !== MAGIC) throw damaged(vid, 'what should be its index is something else');
  if (depth === LEAF) checkedLength(vid, entries, LEAF_ENTRY_BYTES);
  return { depth, entries };
}

async function readLeaf(
  read: ReadObject,
  high: number,
  low: number,
  offset: number,
  count: number,
  owners: Uint32Array,
): Promise<void> {
  const entries = Buffer.alloc(count * LEAF_ENTRY_BYTES);
  if (count === 0) return;
  await read(high, low, offset + HEADER_BYTES, entries);
  for (let at = 0; at < entries.length; at += LEAF_ENTRY_BYTES) {
    const idx = entries.readUInt32LE(at);
    // Behind the end of the disk is nothing to be read.
    if (idx < owners.length) owners[idx] = entries.readUInt32LE(at + 4);
  }
}

function checkedLength(vid: number, entries: number, entryBytes: number): number {
  const length = entries * entryBytes;
  if (HEADER_BYTES + length > NODE_BYTES) throw damaged(vid, `its index claims ${entries} entries`);
  return length;
}

function damaged(vid: number, what: string): StoreError {
  return new StoreError('DAMAGED', `the hyper volume with vid ${vid.toString(16)} is damaged: ${what}`);
}
