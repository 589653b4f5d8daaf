/** Backups compared with their hashes. Owns how little has to be read for that; reports damage, and writes nothing. */
import path from 'node:path';
import { OperationError } from '../../operations/operations.js';
import type { HostDisk } from '../../system/disk.js';
import type { BlockHashes } from '../block-hashes.js';
import { imageSha256, type Image } from '../image-sha256.js';
import { Chain } from './chain.js';
import { MANIFEST, type Point } from './manifest.js';

/** Blocks between two looks at whether to stop, where nothing else is waited for. */
const BLOCKS_AT_ONCE = 2 ** 16;

/** Where the files of backups are. */
export interface BackupFiles {
  readonly disk: HostDisk;
  readonly home: string;
  baseFile(chain: number): string;
  fileOf(point: Point): string;
  hashesOf(point: Point): Promise<BlockHashes>;
}

export interface Damage {
  readonly id: number;
  readonly message: string;
}

/**
 * Read what is stored for these backups, which are in their order, and compare it with its hashes, each byte once;
 * backups over a damaged one as a whole, because they may be damaged with it, or have a copy of their own of what is.
 * Where nothing is stored nothing is read: the hashes must say zeros there, or the same as in the backup before. Yields
 * the first finding in each backup. With `sha256` the hash of the image is computed where the manifest has one, which
 * takes reading all of it once more.
 */
export async function* verifyBackups(
  target: BackupFiles,
  points: readonly Point[],
  advance: (bytes: number) => void = () => undefined,
  signal?: AbortSignal,
  { sha256 = false } = {},
): AsyncGenerator<Damage> {
  let chain: Chain | undefined;
  /** What is wrong with the files of the chain that is open, for all that come after in it. */
  let broken: OperationError | undefined;
  let before: { readonly point: Point; readonly hashes: BlockHashes | undefined } | undefined;
  try {
    for (const point of points) {
      signal?.throwIfAborted();
      if (before?.point.chain !== point.chain) {
        await chain?.close();
        chain = broken = before = undefined;
      }
      let hashes: BlockHashes | undefined;
      try {
        if (broken) throw broken;
        try {
          chain ??= await Chain.openImage(target.disk, target.baseFile(point.chain), point.size);
          await chain.add({ file: target.fileOf(point), size: point.size });
        } catch (error) {
          if (isDamage(error)) broken = error;
          throw error;
        }
        await chain.dropCached();
        const found = await target.hashesOf(point);
        await verifyStored(chain, found, before?.hashes, advance, signal);
        hashes = found;
        if (sha256) await verifySha256(target, point, chain, advance, signal);
      } catch (error) {
        if (!isDamage(error)) throw error;
        yield { id: point.id, message: error.message };
      }
      before = { point, hashes };
    }
  } finally {
    await chain?.close();
  }
}

/** Errors: DAMAGED if the manifest says another one than the image has. */
async function verifySha256(
  { home }: BackupFiles,
  { id, sha256 }: Point,
  chain: Chain,
  advance: (bytes: number) => void,
  signal: AbortSignal | undefined,
): Promise<void> {
  if (sha256 === undefined) return;
  const found = await imageSha256(imageOf(chain), { progress: { advance }, signal });
  if (found === sha256) return;
  const file = path.join(home, MANIFEST);
  throw new OperationError(
    'DAMAGED',
    `${file} is damaged: it says that the SHA-256 of backup ${id} is ${sha256}, and its image, which is as its hashes say, ` +
      `has ${found}`,
  );
}

/** Compare what is stored with its hashes; `before`: the hashes of the backup below the uppermost increment, if right. */
async function verifyStored(
  chain: Chain,
  hashes: BlockHashes,
  before: BlockHashes | undefined,
  advance: (bytes: number) => void,
  signal: AbortSignal | undefined,
): Promise<void> {
  const only = before && chain.top;
  /** The block that the next stored byte is in. */
  let stored = -1;
  let looked = 0;
  for (let index = 0; index < hashes.count; index++) {
    if (stored < index) {
      const next = await chain.nextStored(index * hashes.blockBytes, only);
      stored = next >= hashes.size ? hashes.count : Math.floor(next / hashes.blockBytes);
    }
    const isExpected = before ? hashes.agrees(index, before) : hashes.isZero(index);
    if (stored === index || !isExpected) {
      signal?.throwIfAborted();
      await chain.readChecked(hashes, index);
    } else if (++looked % BLOCKS_AT_ONCE === 0) {
      // Promises alone never let a signal in.
      await new Promise((resolve) => setImmediate(resolve));
      signal?.throwIfAborted();
    }
    advance(hashes.lengthOf(index));
  }
}

/** What is stored of it is read, the rest is zeros. */
export function imageOf(chain: Chain): Image {
  return {
    size: chain.size,
    isData: async (offset, length) => (await chain.nextStored(offset)) < offset + length,
    read: (offset, into) => chain.read(offset, into),
  };
}

function isDamage(error: unknown): error is OperationError {
  return error instanceof OperationError && error.code === 'DAMAGED';
}
