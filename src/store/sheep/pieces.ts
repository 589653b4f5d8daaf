/** How requests that are too large for nodes to take gladly are cut up. */

/** Pieces begin at multiples of this. */
export const BLOCK_BYTES = 4096;
/**
 * The most that is read or written with one request. For 512 KiB and more a node maps memory, and unmaps it afterwards
 * (sheep/sheep.c sets M_MMAP_THRESHOLD); with fresh pages each time it is 1.3 to 1.8 times slower. To align what it takes
 * a node needs some more than it is asked for. Pieces also use all connections, and small requests wait less behind them.
 */
export const MAX_PIECE_BYTES = 124 * BLOCK_BYTES;

/**
 * Do `work` with all of `bytes` if nodes take that, otherwise with parts of it at once, each with its offset; they are about
 * equally large and begin at blocks, except for the first. Rejects with the error of the first part that failed, when
 * nothing is under way any more.
 */
export function inPieces(offset: number, bytes: Buffer, work: PieceWork): Promise<void> {
  return bytes.length <= MAX_PIECE_BYTES ? work(offset, bytes) : inEqualPieces(offset, bytes, work);
}

type PieceWork = (offset: number, part: Buffer) => Promise<void>;

async function inEqualPieces(offset: number, bytes: Buffer, work: PieceWork): Promise<void> {
  const start = offset - (offset % BLOCK_BYTES);
  const end = offset + bytes.length;
  const count = Math.ceil((end - start) / MAX_PIECE_BYTES);
  const size = Math.ceil((end - start) / count / BLOCK_BYTES) * BLOCK_BYTES;
  const parts: Promise<void>[] = [];
  for (let at = start; at < end; at += size) {
    const from = Math.max(at, offset);
    parts.push(work(from, bytes.subarray(from - offset, at + size - offset)));
  }
  for (const result of await Promise.allSettled(parts)) if (result.status === 'rejected') throw result.reason;
}
