/**
 * Whether a range of an object is zeros already, asked before it is zeroed where that would cost a copy. Looks at holes
 * first and reads only what counts as data, and of that no more than it takes to find a byte that is not zero. Changes
 * nothing; knows nothing of maps.
 */
import type { ObjectReader } from '../store/open-vdi.js';
import { isZeros } from '../system/zeros.js';

/** Read first: what is no zeros shows it here, nearly always. */
const FIRST_LOOK = 4096;
/** Read at a time after that. */
const NEXT_LOOK = 256 * 1024;

/** Whether all of the range is a hole, from what the store knows without reading data. */
export async function isHoleIn(
  reader: ObjectReader,
  owner: number,
  idx: number,
  offset: number,
  length: number,
): Promise<boolean> {
  return (await firstData(reader, owner, idx, offset, offset + length)) === undefined;
}

/** Whether all of the range reads as zeros. Errors: those of reading it. */
export async function readsAsZeros(
  reader: ObjectReader,
  owner: number,
  idx: number,
  offset: number,
  length: number,
): Promise<boolean> {
  const end = offset + length;
  let buffer: Buffer | undefined;
  for (let at = offset; at < end;) {
    const data = await firstData(reader, owner, idx, at, end);
    if (data === undefined) return true;
    for (at = data.from; at < data.to;) {
      const look = buffer === undefined ? FIRST_LOOK : NEXT_LOOK;
      if (buffer === undefined || buffer.length < look) buffer = Buffer.allocUnsafe(look);
      const piece = buffer.subarray(0, Math.min(look, data.to - at));
      await reader.readObject(owner, idx, at, piece);
      if (!isZeros(piece)) return false;
      at += piece.length;
    }
  }
  return true;
}

async function firstData(
  reader: ObjectReader,
  owner: number,
  idx: number,
  from: number,
  to: number,
): Promise<{ from: number; to: number } | undefined> {
  let found: { from: number; to: number } | undefined;
  await reader.objectExtents(owner, idx, from, to - from, (offset, length, hole) => {
    if (hole || length <= 0) return true;
    found = { from: offset, to: offset + length };
    return false;
  });
  return found;
}
