/**
 * The SHA-256 of a disk, as sha256sum computes it for its raw image. Zeros need not be read, but they must be hashed, at some
 * GB/s at best; a large empty disk takes minutes. So it is computed only on request.
 */
import { createHash } from 'node:crypto';
import type { Disk } from '../operations/operations.js';
import { PagedRanges } from './paged-ranges.js';
import type { Progress } from './reporting.js';

const CHUNK_BYTES = 4 * 2 ** 20;
const ZEROS = Buffer.alloc(CHUNK_BYTES);

export interface Image {
  readonly size: number;
  /** Whether the range may hold anything but zeros. Called in ascending order. */
  isData(offset: number, length: number): Promise<boolean>;
  read(offset: number, into: Buffer): Promise<void>;
}

export interface HashingWork {
  readonly progress: Pick<Progress, 'advance'>;
  readonly signal: AbortSignal | undefined;
}

/** In hexadecimal. */
export async function imageSha256(image: Image, { progress, signal }: HashingWork): Promise<string> {
  const hash = createHash('sha256');
  const chunk = Buffer.allocUnsafe(CHUNK_BYTES);
  for (let offset = 0; offset < image.size; offset += CHUNK_BYTES) {
    signal?.throwIfAborted();
    const length = Math.min(CHUNK_BYTES, image.size - offset);
    if (await image.isData(offset, length)) {
      const part = chunk.subarray(0, length);
      await image.read(offset, part);
      hash.update(part);
    } else {
      hash.update(ZEROS.subarray(0, length));
    }
    progress.advance(length);
    // Signals are only delivered between turns of the event loop, and resolved promises do not end a turn.
    await new Promise((resolve) => setImmediate(resolve));
  }
  return hash.digest('hex');
}

/** The same for an open export. */
export function diskSha256(disk: Disk, work: HashingWork): Promise<string> {
  const data = new PagedRanges((offset) => disk.dataPage(offset));
  return imageSha256(
    {
      size: disk.size,
      isData: (offset, length) => data.touch(offset, length),
      read: (offset, into) => disk.read(offset, into),
    },
    work,
  );
}
