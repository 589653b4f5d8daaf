/**
 * The bytes of a map log (FORMAT.md, recent/): the header, which says where and in which session a log was written, the
 * entries, and their checksums. Owns these layouts. Does not decide which logs are applied: map-log-reading.ts does.
 */
import { randomUUID } from 'node:crypto';
import zlib from 'node:zlib';
import type { HostDisk } from '../../system/disk.js';
import { isPlanted } from './planted-faults.js';

/** Kind, two numbers, the generation in two halves, and the CRC-32 of these; u32 little-endian each. */
export const ENTRY_BYTES = 24;
const CHECK_AT = 20;
export const HEADER_BYTES = 512;
const MAGIC = 'sheepgate map log 2\n';
/** [vid, 0]: the next entries belong to this VDI. First in every file. */
export const VDI = 1;
/** [idx, owner]: the map entry of idx is now `owner`. */
export const OWNER = 2;
/** [vid, 0]: a snapshot was taken, and the VDI continues under this vid. */
export const MOVED = 3;

/** [idx, owner]: the same as OWNER; the object is an overlay over the object that idx had, without any block. */
export const OVERLAID = 4;
/** [idx, base]: the overlay of idx lies over the object of the vid `base`; over nothing if that is the overlay's own. */
export const BASED = 5;
/** [idx, blocks]: the overlay of idx has these blocks; `packBlocks`. */
export const HAS_BLOCKS = 6;
/** The same; the overlay has them not. */
export const LACKS_BLOCKS = 7;
/** [idx, owner]: the same as OWNER; the object is a whole file, and an overlay of its name is gone. */
export const MADE_WHOLE = 8;

/** [idx, vid]: the next entry (BASED, HAS_BLOCKS, LACKS_BLOCKS) is about the overlay (vid, idx), which is below the map's object. */
export const BELOW = 9;

/** Blocks in one entry at most: 13 bits for their number, 19 bits for the first one. */
const MAX_BLOCKS = 2 ** 13;

/** The blocks [first, end) as one number, or the first MAX_BLOCKS of them. */
export function packBlocks(first: number, end: number): number {
  return first * MAX_BLOCKS + Math.min(end - first, MAX_BLOCKS) - 1;
}

export function unpackBlocks(packed: number): { readonly first: number; readonly end: number } {
  const first = Math.floor(packed / MAX_BLOCKS);
  return { first, end: first + (packed % MAX_BLOCKS) + 1 };
}

export interface Entry {
  readonly kind: number;
  readonly first: number;
  readonly second: number;
  readonly generation: number;
}

export function isLog(bytes: Buffer): boolean {
  return bytes.toString('latin1', 0, MAGIC.length) === MAGIC;
}

/** The first entry of a file. */
export function headOf(vid: number, generation: number): Buffer {
  return fillEntry(Buffer.alloc(ENTRY_BYTES), VDI, vid, 0, generation);
}

/** Returns why the rest could not be read, if so. A partial entry at the end belongs to a write that was not answered. */
export function parse(bytes: Buffer, entries: Entry[]): string | undefined {
  for (let at = HEADER_BYTES; at + ENTRY_BYTES <= bytes.length; at += ENTRY_BYTES) {
    const entry = bytes.subarray(at, at + ENTRY_BYTES);
    if (zlib.crc32(entry.subarray(0, CHECK_AT)) !== entry.readUInt32LE(CHECK_AT)) return 'an entry in it is damaged';
    entries.push({
      kind: entry.readUInt32LE(0),
      first: entry.readUInt32LE(4),
      second: entry.readUInt32LE(8),
      generation: entry.readUInt32LE(12) + entry.readUInt32LE(16) * 2 ** 32,
    });
  }
  return undefined;
}

export function fillEntry(entry: Buffer, kind: number, first: number, second: number, generation: number): Buffer {
  entry.writeUInt32LE(kind, 0);
  entry.writeUInt32LE(first, 4);
  entry.writeUInt32LE(second, 8);
  entry.writeUInt32LE(generation % 2 ** 32, 12);
  entry.writeUInt32LE(Math.floor(generation / 2 ** 32), 16);
  entry.writeUInt32LE(zlib.crc32(entry.subarray(0, CHECK_AT)), CHECK_AT);
  return entry;
}

/**
 * The header of the log that is open as `fd`: where and in which session it is written. Lines of text, so that people can read
 * a log that was set aside. Without the directory's name: a store may be moved.
 */
export function logHeader(disk: HostDisk, place: string, session: string, fd: number): Buffer {
  const header = Buffer.alloc(HEADER_BYTES);
  header.write(`${MAGIC}boot ${bootOf(disk)}\nsession ${session}\n${place}file ${disk.inodeOfSync(fd)}\n`);
  return header;
}

/** The directory and its mounting, as lines of the header. */
export function mapLogDirectory(disk: HostDisk, store: string): string {
  return `mounting ${disk.mountingSync(store)}\ndirectory ${disk.inodeAtSync(store)}\n`;
}

export function field(header: Buffer, name: string): string | undefined {
  const text = header.toString('latin1', 0, HEADER_BYTES);
  return new RegExp(`^${name} (.*)$`, 'm').exec(text)?.[1];
}

/** Without procfs boots cannot be told apart: the logs of this process will not be applied. */
const UNKNOWN_BOOT = randomUUID();
const ANY_BOOT = 'any';

export function bootOf(disk: HostDisk): string {
  if (isPlanted('log of another boot')) return ANY_BOOT;
  return (disk.bootId() ?? UNKNOWN_BOOT).replaceAll('-', '');
}
