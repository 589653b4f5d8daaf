/** Pieces: parts of a range of one object, each small enough for one request that nodes serve fast. */

/** Pieces begin at multiples of this, except the first. */
export const BLOCK_BYTES = 4096;
/**
 * Most bytes of one request. For 512 KiB and more a node maps memory, and unmaps it afterwards (sheep/sheep.c sets
 * M_MMAP_THRESHOLD); with fresh pages each time it is 1.3 to 1.8 times slower. A node allocates somewhat more than the request
 * has, for alignment. Pieces also use all connections, and small requests wait less behind them.
 */
export const MAX_PIECE_BYTES = 124 * BLOCK_BYTES;

/**
 * Calls `work` with all of `bytes` if that is one piece, otherwise with all pieces at once, each with its offset. Pieces are
 * about equally large. Rejects with the error of the first piece that failed, when no piece is in flight any more.
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
