/**
 * The bytes of overlays in meta.mdb (FORMAT.md, `overlays`): one record for each group of neighbouring objects of a vid, with
 * the base of each overlay and the bitmap of its blocks. Owns this layout. Stores nothing, and decides nothing.
 */
import zlib from 'node:zlib';
import { StoreError } from '../store-error.js';

/** The unit of overlays, bytes: smaller writes are filled up from below. */
export const OVERLAY_BLOCK = 4096;
/** Objects of one record: few enough that a record of usual objects fits a page of LMDB, many enough that few are written. */
export const GROUP_OBJECTS = 16;
export const GROUP_SHIFT = 4;

const WORD_BYTES = 4;
const WORD_BITS = 32;
/** The number of blocks of an object, and the bases. */
const HEAD_WORDS = 1 + GROUP_OBJECTS;

/** An overlay as a record has it. */
export interface StoredOverlay {
  /** The vid of the object below; the overlay's own if nothing is below. */
  readonly base: number;
  /** The words of its bitmap from the first to the last that is not 0. */
  readonly words: Uint32Array;
  /** The index of the first of these words. */
  readonly first: number;
}

/** An overlay, to be stored. */
export interface OverlayWrite extends StoredOverlay {
  /** Blocks of an object of its vid. */
  readonly blocks: number;
}

/** Blocks of an object of `size` bytes. */
export function blocksOf(size: number): number {
  return size / OVERLAY_BLOCK;
}

/** Words of the bitmap of an object with so many blocks. */
export function wordsOf(blocks: number): number {
  return Math.ceil(blocks / WORD_BITS);
}

/** The overlay with the `count` words at `at`, copied. */
export function storedOverlay(base: number, words: Uint32Array, at: number, count: number): StoredOverlay {
  let first = 0;
  let end = count;
  while (first < end && words[at + first] === 0) first++;
  while (end > first && words[at + end - 1] === 0) end--;
  return { base, words: words.slice(at + first, at + end), first };
}

/** The record of a group; undefined if it has no overlay and need not be stored. `members`: one for each object of the group. */
export function encodeGroup(blocks: number, members: readonly (StoredOverlay | undefined)[]): Buffer | undefined {
  let words = HEAD_WORDS + 1;
  let isEmpty = true;
  for (const member of members) {
    if (member === undefined) continue;
    isEmpty = false;
    words += 1 + member.words.length;
  }
  if (isEmpty) return undefined;
  const record = new Uint32Array(words);
  record[0] = blocks;
  let at = HEAD_WORDS;
  for (const [n, member] of members.entries()) {
    if (member === undefined) continue;
    record[1 + n] = member.base;
    record[at++] = member.first | (member.words.length << 16);
    record.set(member.words, at);
    at += member.words.length;
  }
  const bytes = Buffer.from(record.buffer);
  record[at] = zlib.crc32(bytes.subarray(0, at * WORD_BYTES));
  return bytes;
}

/** A record as it was stored. */
export interface StoredGroup {
  readonly blocks: number;
  readonly members: readonly (StoredOverlay | undefined)[];
}

/** Undefined if the record is damaged. */
export function decodeGroup(bytes: Uint8Array): StoredGroup | undefined {
  const words = wordsIn(bytes);
  const end = words.length - 1;
  if (bytes.length % WORD_BYTES !== 0 || end < HEAD_WORDS) return undefined;
  if (zlib.crc32(bytes.subarray(0, end * WORD_BYTES)) !== words[end]) return undefined;
  const blocks = words[0] as number;
  const members: (StoredOverlay | undefined)[] = [];
  let at = HEAD_WORDS;
  for (let n = 0; n < GROUP_OBJECTS; n++) {
    const base = words[1 + n] as number;
    if (base === 0) {
      members.push(undefined);
      continue;
    }
    const head = words[at++] ?? 0;
    const first = head & 0xffff;
    const count = head >>> 16;
    if (at + count > end || first + count > wordsOf(blocks)) return undefined;
    members.push({ base, first, words: words.slice(at, at + count) });
    at += count;
  }
  return at === end ? { blocks, members } : undefined;
}

/** The bases of a record, one for each object, 0 where there is no overlay; and the blocks of an object. Undefined: damaged. */
export function basesOf(bytes: Uint8Array): { readonly blocks: number; readonly bases: Uint32Array } | undefined {
  const words = wordsIn(bytes);
  const end = words.length - 1;
  if (bytes.length % WORD_BYTES !== 0 || end < HEAD_WORDS) return undefined;
  if (zlib.crc32(bytes.subarray(0, end * WORD_BYTES)) !== words[end]) return undefined;
  return { blocks: words[0] as number, bases: words.subarray(1, HEAD_WORDS) };
}

/** LMDB's values have any alignment. */
function wordsIn(bytes: Uint8Array): Uint32Array {
  const words = new Uint32Array(Math.floor(bytes.length / WORD_BYTES));
  new Uint8Array(words.buffer).set(bytes.subarray(0, words.length * WORD_BYTES));
  return words;
}

export function damagedGroup(vid: number, group: number): StoreError {
  const first = group * GROUP_OBJECTS;
  return new StoreError(
    'DAMAGED',
    `meta.mdb is damaged: the record of the overlays ${first} to ${first + GROUP_OBJECTS - 1} of vid ${vid.toString(16)} ` +
      'is not as it was written; restore it from a backup',
  );
}
