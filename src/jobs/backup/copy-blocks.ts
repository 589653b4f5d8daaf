/**
 * The blocks of a disk, copied into the file of a new backup: all of them into an image, or what has changed into an increment;
 * and read back from there. Owns which blocks are read, and which parts of a block are written.
 */
import type { Disk, Operations } from '../../operations/operations.js';
import { runsOf } from '../buffer-runs.js';
import { hashOf, BlockHashes } from '../block-hashes.js';
import { PagedRanges } from '../paged-ranges.js';
import { withRequestsInFlight } from '../requests-in-flight.js';
import { createFile } from '../target-files.js';
import { Chain, type Link } from './chain.js';
import type { Point } from './manifest.js';
import { CLUSTER_BYTES, IncrementWriter } from './qcow2-file.js';
import type { BackupTarget } from './target.js';

/** The backup before, and how changes since then are found. */
export interface Previous {
  readonly point: Point;
  readonly hashes: BlockHashes;
  /** NAME@TAG of the snapshot to compare with; undefined to read everything. */
  readonly since: string | undefined;
}

/** The snapshot that is backed up. */
export interface Source {
  /** Its name, and its disk. */
  readonly spec: string;
  readonly disk: Disk;
}

/** Where blocks are copied to. */
export interface Copying {
  readonly target: BackupTarget;
  /** The file that is written. */
  readonly file: string;
  /** Filled with the hashes of the blocks that are copied. */
  readonly hashes: BlockHashes;
  /** Told of bytes of the disk that are done. */
  readonly advance: (bytes: number) => void;
  readonly signal: AbortSignal;
}

export interface Copied {
  /** Indexes of the blocks that were stored, in no order. */
  readonly blocks: number[];
  changedBytes: number;
  storedBytes: number;
}

/** Copy everything into a raw image, without zeros. */
export async function copyAll(disk: Disk, { target, file, hashes, advance, signal }: Copying): Promise<Copied> {
  const copied: Copied = { blocks: [], changedBytes: 0, storedBytes: 0 };
  const data = new PagedRanges((offset) => disk.dataPage(offset));
  const handle = await createFile(target.disk, file);
  try {
    await handle.truncate(disk.size);
    await withRequestsInFlight(async (requests) => {
      for (let index = 0; index < hashes.count; index++) {
        signal.throwIfAborted();
        const offset = index * hashes.blockBytes;
        const length = hashes.lengthOf(index);
        copied.blocks.push(index);
        if (!(await data.touch(offset, length))) {
          advance(length);
          continue;
        }
        await requests.add(async () => {
          const block = await readBlock(disk, offset, length);
          hashes.set(index, hashOf(block));
          for (const { from, to, kind } of runsOf(block, CLUSTER_BYTES)) {
            if (kind !== 'data') continue;
            await handle.write(block.subarray(from, to), offset + from);
            copied.storedBytes += to - from;
          }
          if (!hashes.isZero(index)) copied.changedBytes += length;
          advance(length);
        });
      }
    });
    await handle.sync();
  } finally {
    await handle.close();
  }
  return copied;
}

/** Copy into an increment what differs from the backup before, of each block that may have changed. Errors: DAMAGED. */
export async function copyChanges(
  operations: Pick<Operations, 'changes'>,
  { spec, disk }: Source,
  previous: Previous,
  { target, file, hashes, advance, signal }: Copying,
): Promise<Copied> {
  const copied: Copied = { blocks: [], changedBytes: 0, storedBytes: 0 };
  const data = new PagedRanges((offset) => disk.dataPage(offset));
  const { since } = previous;
  const changes =
    since === undefined ? undefined : new PagedRanges((offset) => operations.changes(spec, since, offset));
  // The blocks at the old and the new end have another length than before.
  const ends = disk.size === previous.hashes.size ? [] : [disk.size, previous.hashes.size];
  const cut = new Set(ends.map((end) => Math.floor(end / hashes.blockBytes)));
  const chain = await target.openChain(previous.point);
  const backing = target.backingOf(previous.point);
  const writer = await IncrementWriter.create(target.disk, file, disk.size, backing).catch(async (error: unknown) => {
    await chain.close();
    throw error;
  });
  const copyBlock = async (index: number, isData: boolean): Promise<void> => {
    const offset = index * hashes.blockBytes;
    const length = hashes.lengthOf(index);
    const block = isData ? await readBlock(disk, offset, length) : Buffer.alloc(length);
    const hash = hashOf(block);
    if (!cut.has(index) && previous.hashes.is(index, hash)) return;
    // Reading the backup before verifies it, so that damage is found before anything is based on it.
    const before = cut.has(index)
      ? Buffer.alloc(length)
      : await chain.readChecked(padded(previous.hashes, index), index);
    if (cut.has(index)) await chain.read(offset, before);
    hashes.set(index, hash);
    copied.blocks.push(index);
    copied.changedBytes += length;
    for (const { from, to, kind } of runsOf(block, CLUSTER_BYTES, before)) {
      if (kind === 'zeros') writer.zeros(offset + from, to - from);
      if (kind !== 'data') continue;
      await writer.data(offset + from, block.subarray(from, to));
      copied.storedBytes += to - from;
    }
  };
  try {
    await withRequestsInFlight(async (requests) => {
      for (let index = 0; index < hashes.count; index++) {
        signal.throwIfAborted();
        const offset = index * hashes.blockBytes;
        const length = hashes.lengthOf(index);
        const isChanged = changes === undefined || (await changes.touch(offset, length)) || cut.has(index);
        const isData = isChanged && (await data.touch(offset, length));
        const isSame = !isChanged || (!isData && !cut.has(index) && previous.hashes.isZero(index));
        if (isSame) advance(length);
        else await requests.add(() => copyBlock(index, isData).then(() => advance(length)));
      }
    });
    await writer.finish();
  } finally {
    await writer.close();
    await chain.close();
  }
  return copied;
}

/** Compare what was written with the hashes of what was read from the disk. Errors: DAMAGED. */
export async function readBack(
  blocks: readonly number[],
  previous: Previous | undefined,
  { target, file, hashes, advance, signal }: Copying,
): Promise<void> {
  const written: Link = { file, size: hashes.size };
  const [image, below] = previous ? target.linksOf(previous.point) : [written, []];
  const chain = await Chain.open(target.disk, image, previous ? [...below, written] : []);
  try {
    await chain.dropCached();
    for (const index of blocks) {
      signal.throwIfAborted();
      // Blocks of zeros are holes in a new image: nothing was written.
      if (previous || !hashes.isZero(index)) await chain.readChecked(hashes, index);
      advance(hashes.lengthOf(index));
    }
  } finally {
    await chain.close();
  }
}

async function readBlock(disk: Disk, offset: number, length: number): Promise<Buffer> {
  const block = Buffer.allocUnsafe(length);
  for (let done = 0; done < length; done += disk.maxRequestBytes) {
    await disk.read(offset + done, block.subarray(done, Math.min(done + disk.maxRequestBytes, length)));
  }
  return block;
}

/** For a disk that has grown: the blocks behind the old end were zeros. */
function padded(hashes: BlockHashes, index: number): BlockHashes {
  return index < hashes.count ? hashes : new BlockHashes((index + 1) * hashes.blockBytes, hashes.blockBytes);
}
