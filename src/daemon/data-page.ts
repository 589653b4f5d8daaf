/** Turns what a device says about its allocation into pages of bounded size. Never reads data. */
import { ALLOCATION_CONTEXT, STATE_ZERO, type BlockDevice } from 'nbd-server-ts';
import { MAX_PAGE_BYTES, MAX_PAGE_RANGES, type DataPage } from './operations.js';

interface Range {
  readonly offset: number;
  length: number;
}

/** The ranges of `device` from `offset` on that may hold something other than zeros; adjacent ones are one range. */
export async function dataPageOf(device: BlockDevice, offset: number): Promise<DataPage> {
  const { size } = device.geometry;
  const end = Math.min(size, offset + MAX_PAGE_BYTES);
  if (offset >= end) return { ranges: [], next: null };
  const ranges: Range[] = [];
  let stoppedAt = -1;
  await device.extents(ALLOCATION_CONTEXT, offset, end - offset, (at, length, flags) => {
    if ((flags & STATE_ZERO) !== 0) return true;
    const last = ranges.at(-1);
    if (last && last.offset + last.length === at) {
      last.length += length;
    } else if (ranges.length === MAX_PAGE_RANGES) {
      stoppedAt = at;
      return false;
    } else {
      ranges.push({ offset: at, length });
    }
    return true;
  });
  const next = stoppedAt >= 0 ? stoppedAt : end;
  return { ranges, next: next < size ? next : null };
}
