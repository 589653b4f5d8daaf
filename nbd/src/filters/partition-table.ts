/**
 * Where the partitions of a disk are: GPT (UEFI specification, "GUID Partition Table Format") with sectors of 512 or 4096 bytes,
 * and MBR with logical partitions. It only reads; it does not verify the checksums of a GPT.
 */

import type { CompleteDevice } from '../block-device.js';
import { completeDevice, type AnyDevice } from '../device.js';
import { memoryFor, readWhole } from './forwarding.js';

const MBR_SECTOR_BYTES = 512;
const GPT_SECTOR_SIZES = [512, 4096];
const GPT_HEADER_BYTES = 92;
const GPT_ENTRY_BYTES = 128;
const EXTENDED_TYPES = [0x05, 0x0f, 0x85];
/** The type that a GPT is protected by: an entry of it is no partition. */
const PROTECTIVE_TYPE = 0xee;
/** Logical partitions have the numbers from 5 on. A chain of more of them than this is taken for a loop. */
const MAX_LOGICAL = 256;

/** Why there is no such partition. `NO_TABLE`: no GPT or MBR was found. `BAD_TABLE`: it is broken, or points outside of the disk. */
export class PartitionError extends Error {
  constructor(
    readonly code: 'NO_TABLE' | 'BAD_TABLE' | 'NO_PARTITION',
    message: string,
  ) {
    super(message);
    this.name = 'PartitionError';
  }
}

interface Range {
  readonly offset: number;
  readonly length: number;
}

/**
 * The range, in bytes, of the partition with this number, from 1 on; logical partitions of an MBR begin at 5. For `partition`.
 * As with Linux, a GPT counts only if the MBR does not have partitions of its own: a disk that was given an MBR later often
 * still has its old GPT. The copy of the GPT at the end of the disk is not used.
 * Errors: PartitionError; those of the device; RangeError if `number` is not an integer.
 */
export async function findPartition(device: AnyDevice, number: number): Promise<Range> {
  const disk = completeDevice(device);
  if (!Number.isInteger(number)) throw new RangeError(`${number} is not the number of a partition`);
  const table = await mbrAt(disk, 0);
  const isGptPossible = table === undefined || !isUsed(table) || isProtective(table);
  const found =
    (isGptPossible ? await gptPartition(disk, number) : undefined) ?? (await mbrPartition(disk, table, number));
  if (found.offset + found.length > disk.geometry.size) {
    throw new PartitionError(
      'BAD_TABLE',
      `partition ${number} ends after the end of the disk (${disk.geometry.size} bytes)`,
    );
  }
  return found;
}

/** Undefined if there is no GPT. */
async function gptPartition(disk: CompleteDevice, number: number): Promise<Range | undefined> {
  for (const sector of GPT_SECTOR_SIZES) {
    const header = await bytesAt(disk, sector, GPT_HEADER_BYTES);
    if (header?.toString('latin1', 0, 8) !== 'EFI PART') continue;
    const entries = Number(header.readBigUInt64LE(72)) * sector;
    const count = header.readUInt32LE(80);
    const entryBytes = header.readUInt32LE(84);
    if (entryBytes < GPT_ENTRY_BYTES)
      throw new PartitionError('BAD_TABLE', `the GPT has entries of ${entryBytes} bytes`);
    if (!(number >= 1 && number <= count)) throw missing(number, 'GPT');
    const entry = await bytesAt(disk, entries + (number - 1) * entryBytes, GPT_ENTRY_BYTES);
    if (entry === undefined)
      throw new PartitionError('BAD_TABLE', 'the entries of the GPT are after the end of the disk');
    if (entry.subarray(0, 16).every((byte) => byte === 0)) throw missing(number, 'GPT');
    const first = Number(entry.readBigUInt64LE(32));
    const last = Number(entry.readBigUInt64LE(40));
    if (last < first) throw new PartitionError('BAD_TABLE', `partition ${number} ends before its beginning`);
    return { offset: first * sector, length: (last - first + 1) * sector };
  }
  return undefined;
}

/** `table`: the MBR, if there is one. */
async function mbrPartition(disk: CompleteDevice, table: Buffer | undefined, number: number): Promise<Range> {
  if (table === undefined) throw new PartitionError('NO_TABLE', 'the disk has neither a GPT nor an MBR');
  if (isProtective(table)) {
    throw new PartitionError('BAD_TABLE', 'the MBR protects a GPT, which is not after it: it may be damaged');
  }
  if (number >= 1 && number <= 4) {
    const entry = mbrEntry(table, number - 1);
    if (entry.type === 0 || entry.sectors === 0) throw missing(number, 'MBR');
    return rangeOf(0, entry);
  }
  const extended = mbrEntries(table).find(({ type }) => EXTENDED_TYPES.includes(type));
  if (extended === undefined || !(number >= 5 && number < 5 + MAX_LOGICAL)) throw missing(number, 'MBR');
  // Each table has its partition, relative to the table, and the next table, relative to the extended partition.
  let tableSector = extended.start;
  let at = 5;
  for (let tables = 0; tables < MAX_LOGICAL; tables++) {
    const logical = await mbrAt(disk, tableSector * MBR_SECTOR_BYTES);
    if (logical === undefined) throw new PartitionError('BAD_TABLE', `the table of partition ${at} is not a table`);
    const entry = mbrEntry(logical, 0);
    const next = mbrEntry(logical, 1);
    // The table of a partition that was deleted may remain as a link: it has no number.
    if (entry.type !== 0 && entry.sectors > 0 && at++ === number) return rangeOf(tableSector, entry);
    if (next.sectors === 0) throw missing(number, 'MBR');
    tableSector = extended.start + next.start;
  }
  throw missing(number, 'MBR');
}

interface MbrEntry {
  readonly type: number;
  readonly start: number;
  readonly sectors: number;
}

function mbrEntry(table: Buffer, index: number): MbrEntry {
  const at = 446 + 16 * index;
  return { type: table.readUInt8(at + 4), start: table.readUInt32LE(at + 8), sectors: table.readUInt32LE(at + 12) };
}

function mbrEntries(table: Buffer): MbrEntry[] {
  return [0, 1, 2, 3].map((index) => mbrEntry(table, index));
}

/** Whether it has partitions, of whatever type. */
function isUsed(table: Buffer): boolean {
  return mbrEntries(table).some(({ type, sectors }) => type !== 0 && sectors > 0);
}

function isProtective(table: Buffer): boolean {
  return mbrEntries(table).some(({ type }) => type === PROTECTIVE_TYPE);
}

function rangeOf(tableSector: number, { start, sectors }: MbrEntry): Range {
  return { offset: (tableSector + start) * MBR_SECTOR_BYTES, length: sectors * MBR_SECTOR_BYTES };
}

/** Undefined if there is none. */
async function mbrAt(disk: CompleteDevice, offset: number): Promise<Buffer | undefined> {
  const table = await bytesAt(disk, offset, MBR_SECTOR_BYTES);
  return table?.readUInt16BE(510) === 0x55aa ? table : undefined;
}

/** Undefined if they are not all on the disk. Reads are multiples of the minimum block size. */
async function bytesAt(disk: CompleteDevice, offset: number, length: number): Promise<Buffer | undefined> {
  const { size, minimumBlockSize } = disk.geometry;
  if (offset + length > size) return undefined;
  const start = offset - (offset % minimumBlockSize);
  const end = Math.ceil((offset + length) / minimumBlockSize) * minimumBlockSize;
  const blocks = memoryFor(disk, end - start);
  await readWhole(disk, start, blocks, undefined);
  return blocks.subarray(offset - start, offset - start + length);
}

function missing(number: number, table: string): PartitionError {
  return new PartitionError('NO_PARTITION', `the ${table} has no partition ${number}`);
}
