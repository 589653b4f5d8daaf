/** Backups compared with their hashes. Owns how little has to be read for that; reports damage, and writes nothing. */
import path from 'node:path';
import { OperationError } from '../../operations/operations.js';
import type { HostDisk } from '../../system/disk.js';
import type { BlockHashes } from '../block-hashes.js';
import { imageSha256, type Image } from '../image-sha256.js';
import { Chain } from './chain.js';
import { MANIFEST, type Point } from './manifest.js';

/** Blocks between two checks of the signal, where nothing is awaited. */
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
 * Read what is stored for these backups, in their order, and compare it with the hashes. Each stored byte is read once, except
 * that a backup on top of a damaged one is read as a whole: it may be damaged too, or have an intact copy of the damaged
 * blocks. Where nothing is stored nothing is read; there the hashes must be those of zeros or of the backup before. Yields the
 * first damage of each backup. With `sha256`, the hash of the image is computed too where the manifest has one, which reads all
 * of it once more.
 */
export async function* verifyBackups(
  target: BackupFiles,
  points: readonly Point[],
  advance: (bytes: number) => void = () => undefined,
  signal?: AbortSignal,
  { sha256 = false } = {},
): AsyncGenerator<Damage> {
  let chain: Chain | undefined;
  /** Damage of a file of the open chain, which makes all later backups of the chain unreadable. */
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

/** Errors: DAMAGED (the manifest has another hash than the image). */
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
    `${file} is damaged: it has ${sha256} as the SHA-256 of backup ${id}, but the image, which matches its hashes, ` +
      `has ${found}`,
  );
}

/** Compare what is stored with the hashes. `before`: the hashes of the backup before, if that was found intact. */
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
      // Signals are only delivered between turns of the event loop.
      await new Promise((resolve) => setImmediate(resolve));
      signal?.throwIfAborted();
    }
    advance(hashes.lengthOf(index));
  }
}

/** The image of a chain: what is stored is read, the rest is zeros. */
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
