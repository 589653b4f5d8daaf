/**
 * The index of a hyper volume: a B-tree in place of the table (lib/sd_inode.c). The inode holds either a leaf, or a root that
 * points to leaves in objects of their own. Owns the layout of the tree's nodes, and reads them.
 */
import { struct, u16, u32 } from 'buffer-layout';
import { FormatError } from './format-error.js';
import { TABLE_OFFSET } from './inode-table.js';
import { inodeHigh } from './object-ids.js';

/** INODE_BTREE_MAGIC. */
const MAGIC = 0x6274;
/** SD_INODE_DATA_INDEX_SIZE: most bytes of a node of the tree. */
export const INDEX_NODE_BYTES = 2 ** 20 * 4;
/** struct sd_index_header. */
const header = struct<{ magic: number; depth: number; entries: number }>([u16('magic'), u16('depth'), u32('entries')]);
export const NODE_HEADER_BYTES = 8;
/** struct sd_index: idx, vid. */
export const LEAF_ENTRY_BYTES = 8;
/** struct sd_indirect_idx: the highest idx in the leaf, four bytes of padding, the leaf's oid. */
const ROOT_ENTRY_BYTES = 16;
const LEAF = 1;
const ROOT = 2;

/** Reads from the object whose oid has these halves. */
export type ReadObject = (high: number, low: number, offset: number, into: Buffer) => Promise<void>;

/** A leaf in an object of its own. */
export interface LeafPointer {
  /** The highest idx that an entry of the leaf may have. */
  readonly lastIdx: number;
  readonly high: number;
  readonly low: number;
}

/** What the inode holds: entries (struct sd_index), or pointers to leaves with entries. */
export type IndexRoot =
  | { readonly entries: Buffer; readonly leaves?: undefined }
  | { readonly entries?: undefined; readonly leaves: readonly LeafPointer[] };

/** Errors: FormatError, and those of `read`. */
export async function readRoot(read: ReadObject, vid: number): Promise<IndexRoot> {
  const high = inodeHigh(vid);
  const root = await readHeader(read, vid, high, 0, TABLE_OFFSET);
  if (root === undefined) return { entries: Buffer.alloc(0) }; // nothing was ever written
  if (root.depth !== LEAF && root.depth !== ROOT) throw damaged(vid, `its index has a depth of ${root.depth}`);
  const entryBytes = root.depth === LEAF ? LEAF_ENTRY_BYTES : ROOT_ENTRY_BYTES;
  const entries = Buffer.alloc(checkedLength(vid, root.entries, entryBytes));
  if (entries.length > 0) await read(high, 0, TABLE_OFFSET + NODE_HEADER_BYTES, entries);
  if (root.depth === LEAF) return { entries };
  const leaves: LeafPointer[] = [];
  for (let at = 0; at < entries.length; at += ROOT_ENTRY_BYTES) {
    leaves.push({
      lastIdx: entries.readUInt32LE(at),
      low: entries.readUInt32LE(at + 8),
      high: entries.readUInt32LE(at + 12),
    });
  }
  return { leaves };
}

/** The leaf's entries, of struct sd_index. Errors: FormatError, and those of `read`. */
export async function readLeaf(read: ReadObject, vid: number, { high, low }: LeafPointer): Promise<Buffer> {
  const leaf = await readHeader(read, vid, high, low, 0);
  if (leaf === undefined) return Buffer.alloc(0);
  if (leaf.depth !== LEAF) throw damaged(vid, `a leaf of its index has a depth of ${leaf.depth}`);
  const entries = Buffer.alloc(checkedLength(vid, leaf.entries, LEAF_ENTRY_BYTES));
  if (entries.length > 0) await read(high, low, NODE_HEADER_BYTES, entries);
  return entries;
}

/** Owners of the first `count` objects of the hyper volume, as a table. Errors: as readRoot. */
export async function readIndex(read: ReadObject, vid: number, count: number): Promise<Uint32Array> {
  const owners = new Uint32Array(count);
  const add = (entries: Buffer): void => {
    eachEntry(entries, (idx, owner) => {
      // Entries behind the end of the disk are not read.
      if (idx < count) owners[idx] = owner;
    });
  };
  const root = await readRoot(read, vid);
  if (root.entries) add(root.entries);
  else for (const leaf of root.leaves) add(await readLeaf(read, vid, leaf));
  return owners;
}

export function eachEntry(entries: Buffer, visit: (idx: number, owner: number) => void): void {
  for (let at = 0; at < entries.length; at += LEAF_ENTRY_BYTES) {
    visit(entries.readUInt32LE(at), entries.readUInt32LE(at + 4));
  }
}

/** A leaf with one entry for each idx from `first` on. */
export function encodeLeaf(first: number, owners: ArrayLike<number>): Buffer {
  const node = encodeHeader(LEAF, owners.length, LEAF_ENTRY_BYTES);
  encodeEntries(first, owners).copy(node, NODE_HEADER_BYTES);
  return node;
}

export function encodeEntries(first: number, owners: ArrayLike<number>): Buffer {
  const entries = Buffer.allocUnsafe(owners.length * LEAF_ENTRY_BYTES);
  for (let n = 0; n < owners.length; n++) {
    entries.writeUInt32LE(first + n, n * LEAF_ENTRY_BYTES);
    entries.writeUInt32LE(owners[n] as number, n * LEAF_ENTRY_BYTES + 4);
  }
  return entries;
}

/** `leaves`: in the order of their idx. */
export function encodeRoot(leaves: readonly LeafPointer[]): Buffer {
  const node = encodeHeader(ROOT, leaves.length, ROOT_ENTRY_BYTES);
  for (const [n, { lastIdx, high, low }] of leaves.entries()) {
    const at = NODE_HEADER_BYTES + n * ROOT_ENTRY_BYTES;
    node.writeUInt32LE(lastIdx, at);
    node.writeUInt32LE(low, at + 8);
    node.writeUInt32LE(high, at + 12);
  }
  return node;
}

function encodeHeader(depth: number, entries: number, entryBytes: number): Buffer {
  const node = Buffer.alloc(NODE_HEADER_BYTES + entries * entryBytes);
  if (node.length > INDEX_NODE_BYTES) throw new Error('invariant: a node of a hyper volume is too large');
  header.encode({ magic: MAGIC, depth, entries }, node);
  return node;
}

async function readHeader(
  read: ReadObject,
  vid: number,
  high: number,
  low: number,
  offset: number,
): Promise<{ depth: number; entries: number } | undefined> {
  const bytes = Buffer.alloc(NODE_HEADER_BYTES);
  await read(high, low, offset, bytes);
  if (bytes.readUInt32LE(0) === 0) return undefined;
  const { magic, depth, entries } = header.decode(bytes);
  if (magic !== MAGIC) throw damaged(vid, 'what should be its index is something else');
  return { depth, entries };
}

function checkedLength(vid: number, entries: number, entryBytes: number): number {
  const length = entries * entryBytes;
  if (NODE_HEADER_BYTES + length > INDEX_NODE_BYTES) throw damaged(vid, `its index claims ${entries} entries`);
  return length;
}

function damaged(vid: number, what: string): FormatError {
  return new FormatError(`the hyper volume with vid ${vid.toString(16)} is damaged: ${what}`);
}
