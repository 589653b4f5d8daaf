/** Partitions by number: tables as sfdisk writes them, and tables that are broken. */

import { execFileSync } from 'node:child_process';
import { readFile, truncate, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { memoryDevice } from '../src/devices/memory.js';
import { findPartition, partition } from '../src/filters/partition.js';
import { temporaryDirectory } from './test-server.js';

const MIB = 1024 * 1024;
const hasNbdkit = ((): boolean => {
  try {
    execFileSync('nbdkit', ['partitioning', '--dump-plugin'], { stdio: 'ignore' });
    return true;
  } catch {
    console.log('skipped: partition tables of nbdkit, for want of it');
    return false;
  }
})();

/** A disk that nbdkit makes of partitions of these sizes; each begins with its number. */
async function disk(type: 'gpt' | 'mbr', sizes: readonly number[]): Promise<Buffer> {
  const directory = await temporaryDirectory();
  const files = sizes.map((_, at) => join(directory, `part${at + 1}`));
  for (const [at, file] of files.entries()) {
    await writeFile(file, `partition ${at + 1}`);
    await truncate(file, sizes[at]);
  }
  const out = join(directory, 'disk');
  const args = ['-U', '-', 'partitioning', `partition-type=${type}`, ...files, '--run', `nbdcopy "$uri" ${out}`];
  execFileSync('nbdkit', args, { stdio: ['ignore', 'ignore', 'pipe'] });
  return readFile(out);
}

test.runIf(hasNbdkit).each([
  ['gpt', [MIB, 3 * MIB, 512]],
  ['mbr', [MIB, 3 * MIB]],
  // From the fifth file on they are logical, and the fourth is the extended one.
  ['mbr', [MIB, 512, MIB, 2 * MIB, 512, 4 * MIB]],
] as const)("the partitions of nbdkit's disks with a table of type %s, %j", async (type, sizes) => {
  const bytes = await disk(type, sizes);
  const device = memoryDevice(bytes);
  // The numbers of logical partitions begin at 5.
  const numbers = sizes.length > 4 ? [1, 2, 3, 5, 6, 7] : sizes.map((_, at) => at + 1);
  for (const [at, number] of numbers.entries()) {
    const range = await findPartition(device, number);
    expect(range.length).toBe(sizes[at]);
    const into = Buffer.alloc(11);
    await partition(device, range).read(0, into);
    expect(into.toString()).toBe(`partition ${at + 1}`);
    // The same with a device that reads blocks of 4096 bytes only.
    const size = Math.floor(bytes.length / 4096) * 4096;
    const blocks = { size, minimumBlockSize: 4096, read: (from: number, to: Buffer) => bytes.copy(to, 0, from) };
    if (range.offset + range.length <= size) expect(await findPartition(blocks, number)).toEqual(range);
  }
  const last = numbers.at(-1) ?? 0;
  for (const number of [0, last + 1, 300, -1]) {
    await expect(findPartition(device, number)).rejects.toMatchObject({ code: 'NO_PARTITION' });
  }
  await expect(findPartition(device, 1.5)).rejects.toThrow(RangeError);
});

test('a disk without a table, or too small for one', async () => {
  for (const size of [0, 1, 511, 512, 600, 8192]) {
    await expect(findPartition(memoryDevice(size), 1)).rejects.toMatchObject({ code: 'NO_TABLE' });
  }
});

test('a chain of logical partitions that never ends, and tables that point outside, are refused', async () => {
  const table = Buffer.alloc(8 * 512);
  const entry = mbrEntries(table);
  entry(0, 0, 0x83, 7, 2);
  entry(0, 1, 0x05, 2, 6);
  entry(2, 0, 0x83, 1, 1);
  entry(2, 1, 0x05, 0, 6);
  const device = memoryDevice(table);
  await expect(findPartition(device, 1)).rejects.toMatchObject({ code: 'BAD_TABLE', message: /after the end/ });
  expect(await findPartition(device, 5)).toEqual({ offset: 3 * 512, length: 512 });
  await expect(findPartition(device, 10_000)).rejects.toMatchObject({ code: 'NO_PARTITION' });
  entry(2, 1, 0x05, 2, 6);
  await expect(findPartition(device, 6)).rejects.toMatchObject({ code: 'BAD_TABLE' });

  const gpt = Buffer.alloc(8 * 512);
  gpt.write('EFI PART', 512);
  gpt.writeUInt32LE(4, 512 + 80);
  gpt.writeUInt32LE(8, 512 + 84);
  await expect(findPartition(memoryDevice(gpt), 1)).rejects.toMatchObject({ code: 'BAD_TABLE' });
  gpt.writeUInt32LE(128, 512 + 84);
  gpt.writeBigUInt64LE(2n ** 63n, 512 + 72);
  await expect(findPartition(memoryDevice(gpt), 1)).rejects.toMatchObject({ code: 'BAD_TABLE' });
  gpt.writeBigUInt64LE(2n, 512 + 72);
  gpt.writeUInt8(1, 1024);
  gpt.writeBigUInt64LE(9n, 1024 + 32);
  await expect(findPartition(memoryDevice(gpt), 1)).rejects.toMatchObject({ code: 'BAD_TABLE' });
});

test('a GPT that is damaged, or left over, does not lead to other bytes', async () => {
  const table = Buffer.alloc(64 * 512);
  const mbr = (type: number): void => {
    table.writeUInt8(type, 446 + 4);
    table.writeUInt32LE(1, 446 + 8);
    table.writeUInt32LE(63, 446 + 12);
    table.writeUInt16BE(0x55aa, 510);
  };
  table.write('EFI PART', 512);
  table.writeBigUInt64LE(2n, 512 + 72);
  table.writeUInt32LE(4, 512 + 80);
  table.writeUInt32LE(128, 512 + 84);
  table.writeUInt8(1, 1024);
  table.writeBigUInt64LE(10n, 1024 + 32);
  table.writeBigUInt64LE(19n, 1024 + 40);
  const device = memoryDevice(table);
  const [ofGpt, ofMbr] = [
    { offset: 5120, length: 5120 },
    { offset: 512, length: 63 * 512 },
  ];
  expect(await findPartition(device, 1)).toEqual(ofGpt);
  mbr(0xee);
  expect(await findPartition(device, 1)).toEqual(ofGpt);
  // The disk was given an MBR later.
  mbr(0x83);
  expect(await findPartition(device, 1)).toEqual(ofMbr);
  mbr(0xee);
  table.fill(0, 512, 1024);
  for (const number of [1, 2, 5]) {
    await expect(findPartition(device, number)).rejects.toMatchObject({ code: 'BAD_TABLE', message: /may be damaged/ });
  }
});

test('the table of a logical partition that was deleted has no number', async () => {
  const table = Buffer.alloc(32 * 512);
  const entry = mbrEntries(table);
  entry(0, 0, 0x05, 2, 30);
  entry(2, 1, 0x05, 8, 10);
  entry(10, 0, 0x83, 1, 4);
  const device = memoryDevice(table);
  expect(await findPartition(device, 5)).toEqual({ offset: 11 * 512, length: 4 * 512 });
  await expect(findPartition(device, 6)).rejects.toMatchObject({ code: 'NO_PARTITION' });
  // A link to itself.
  entry(2, 1, 0x05, 0, 30);
  await expect(findPartition(device, 5)).rejects.toMatchObject({ code: 'NO_PARTITION' });
});

test('errors of the device pass', async () => {
  const device = {
    size: MIB,
    read: () => {
      throw new Error('unreadable');
    },
  };
  await expect(findPartition(device, 1)).rejects.toThrow('unreadable');
});

type WriteEntry = (
  sector: number,
  index: number,
  ...entry: readonly [type: number, start: number, sectors: number]
) => void;

/** Writes entries of the MBRs in `table`, in sectors of 512 bytes. */
function mbrEntries(table: Buffer): WriteEntry {
  return (sector, index, type, start, sectors) => {
    const at = sector * 512 + 446 + 16 * index;
    table.writeUInt8(type, at + 4);
    table.writeUInt32LE(start, at + 8);
    table.writeUInt32LE(sectors, at + 12);
    table.writeUInt16BE(0x55aa, sector * 512 + 510);
  };
}
