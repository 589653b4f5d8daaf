/**
 * What follows the header of an inode (sheepdog_proto.h, struct sd_inode): the table, data_vdi_id, which says who owns each
 * object, 0 for none; and for each entry of the table its reference (gref): how many tables were derived from it (count), and
 * how far it is derived itself (generation). Owns their byte offsets.
 */
import { MAX_DATA_OBJECTS } from './protocol.js';

export const TABLE_OFFSET = 4664;
export const ENTRY_BYTES = 4;
const REFERENCES_OFFSET = 4_198_968;
/** struct generation_reference: generation, then count. */
export const REFERENCE_BYTES = 8;
/** SD_INODE_SIZE. */
export const INODE_BYTES = REFERENCES_OFFSET + REFERENCE_BYTES * MAX_DATA_OBJECTS;
const COUNT_OFFSET = 4;
const IS_LITTLE_ENDIAN = new Uint8Array(new Uint16Array([1]).buffer)[0] === 1;

/** Objects of a disk of `size` bytes. */
export function objectCount(size: number, blockSizeShift: number): number {
  return Math.ceil(size / 2 ** blockSizeShift);
}

/** Where the entry of an object is in the inode. */
export function entryOffset(idx: number): number {
  return TABLE_OFFSET + idx * ENTRY_BYTES;
}

/** Where its reference is. */
export function referenceOffset(idx: number): number {
  return REFERENCES_OFFSET + idx * REFERENCE_BYTES;
}

/** The memory of a table, for entries to be read into; `decodeTable` makes them numbers then. */
export function bytesOfTable(table: Uint32Array): Buffer {
  return Buffer.from(table.buffer, table.byteOffset, table.byteLength);
}

/** In place. */
export function decodeTable(bytes: Buffer): void {
  if (!IS_LITTLE_ENDIAN) bytes.swap32();
}

export function encodeTable(owners: ArrayLike<number>): Buffer {
  const data = Buffer.allocUnsafe(owners.length * ENTRY_BYTES);
  for (let n = 0; n < owners.length; n++) data.writeUInt32LE(owners[n] as number, n * ENTRY_BYTES);
  return data;
}

export function decodeEntry(bytes: Buffer): number {
  return bytes.readUInt32LE();
}

export function encodeReference(generation: number, count: number): Buffer {
  const bytes = Buffer.alloc(REFERENCE_BYTES);
  bytes.writeInt32LE(generation, 0);
  bytes.writeInt32LE(count, COUNT_OFFSET);
  return bytes;
}

/** References [from, to) of `references`, which begin with that of idx 0. */
export function sliceReferences(references: Buffer, from: number, to: number): Buffer {
  return references.subarray(from * REFERENCE_BYTES, to * REFERENCE_BYTES);
}

/**
 * What a snapshot makes of references. `source`: those of the snapshot's table, with 1 added to each count. `derived`: those of
 * the table that continues from it, with the next generation and a count of 0. Entries without an object stay as they are in
 * `source`, and are 0 in `derived`.
 */
export function deriveReferences(
  references: Buffer,
  table: Uint32Array,
): { readonly source: Buffer; readonly derived: Buffer } {
  const source = Buffer.from(references);
  const derived = Buffer.alloc(references.length);
  for (let idx = 0; idx < table.length; idx++) {
    if (table[idx] === 0) continue;
    const at = idx * REFERENCE_BYTES;
    derived.writeInt32LE(references.readInt32LE(at) + 1, at);
    source.writeInt32LE(references.readInt32LE(at + COUNT_OFFSET) + 1, at + COUNT_OFFSET);
  }
  return { source, derived };
}
