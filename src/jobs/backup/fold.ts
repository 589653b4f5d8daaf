/**
 * How the oldest backup of a chain is dropped: the increment after it is written into the image below it. Guarantees that damage
 * of the increment is found before it reaches the image, which all later backups need.
 */
import type { HostDisk } from '../../system/disk.js';
import type { OpenFile } from '../../system/open-file.js';
import type { BlockHashes } from '../block-hashes.js';
import type { JobContext } from '../reporting.js';
import { openRegular } from '../target-files.js';
import type { Chain } from './chain.js';
import { CLUSTER_BYTES, IncrementReader } from './qcow2-file.js';

/** Compare what the uppermost increment of `chain`, which is closed then, holds with its hashes. Errors: DAMAGED. */
export async function checkIncrement(hashes: BlockHashes, chain: Chain, signal: AbortSignal): Promise<void> {
  try {
    for (let index = 0; index < hashes.count; index++) {
      index = Math.floor((await chain.nextStored(index * hashes.blockBytes, chain.top)) / hashes.blockBytes);
      signal.throwIfAborted();
      if (index < hashes.count) await chain.readChecked(hashes, index);
    }
  } finally {
    await chain.close();
  }
}

/** Before anything is noted that only writing into the image can finish. Errors: BAD_TARGET. */
export async function checkWritable(disk: HostDisk, baseFile: string): Promise<void> {
  await (await openRegular(disk, baseFile, 'r+')).close();
}

export interface Fold {
  readonly disk: HostDisk;
  /** The increment, and the image that it is written into. */
  readonly file: string;
  readonly baseFile: string;
  /** Of the increment's disk, in bytes. */
  readonly size: number;
  /** What is written at a time, at most. */
  readonly blockBytes: number;
}

/**
 * Write an increment into the image below it, durably. Starts over if it was interrupted: until the increment is replaced by
 * one that holds nothing, it hides what changes below it.
 */
export async function foldIntoImage(fold: Fold, { progress, signal }: JobContext): Promise<void> {
  const { disk, size, blockBytes } = fold;
  const increment = await IncrementReader.open(disk, fold.file);
  const doing = progress('dropping an old backup', size);
  let base: OpenFile | undefined;
  try {
    base = await openRegular(disk, fold.baseFile, 'r+');
    await base.truncate(size);
    for (let offset = 0; offset < size;) {
      signal.throwIfAborted();
      const next = await increment.nextOwn(offset);
      const length = Math.min(blockBytes, size - next);
      for (const run of await increment.runs(next, length)) {
        if (run.kind === 'zeros') await zeroOut(base, run.offset, run.length);
        if (run.kind !== 'data') continue;
        const data = Buffer.allocUnsafe(run.length);
        await increment.read(run, data);
        await base.write(data, run.offset);
      }
      doing.advance(next + length - offset);
      offset = next + length;
    }
    await base.sync();
  } finally {
    doing.end();
    await base?.close();
    await increment.close();
  }
}

async function zeroOut(image: OpenFile, offset: number, length: number): Promise<void> {
  if (await image.punchHole(offset, length)) return;
  const zeros = Buffer.alloc(Math.min(length, CLUSTER_BYTES));
  for (let done = 0; done < length; done += zeros.length) {
    await image.write(zeros.subarray(0, Math.min(zeros.length, length - done)), offset + done);
  }
}
