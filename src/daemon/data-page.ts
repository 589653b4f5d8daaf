/** Turns what a disk says about its allocation into pages of bounded size. Never reads data. */
import { STATE_ZERO, type Awaitable, type ExtentSink } from 'nbd-server-ts';
import { MAX_PAGE_BYTES, MAX_PAGE_RANGES, type DataPage } from './operations.js';

interface Range {
  readonly offset: number;
  length: number;
}

/** The ranges from `offset` on that may hold something other than zeros; adjacent ones are one range. */
export async function dataPageOf(
  size: number,
  offset: number,
  /** Of base:allocation; may report less than it was asked for. */
  extents: (offset: number, length: number, sink: ExtentSink) => Awaitable<void>,
): Promise<DataPage> {
  const end = Math.min(size, offset + MAX_PAGE_BYTES);
  const ranges: Range[] = [];
  let next = offset;
  if (offset < end) {
    await extents(offset, end - offset, (at, length, flags) => {
      const last = ranges.at(-1);
      if ((flags & STATE_ZERO) === 0) {
        if (last && last.offset + last.length === at) last.length += length;
        else if (ranges.length === MAX_PAGE_RANGES) return false;
        else ranges.push({ offset: at, length });
      }
      next = at + length;
      return true;
    });
  }
  return { ranges, next: next < size ? next : null };
}
