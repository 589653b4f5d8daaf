/** Makes DataPages: the allocation of a disk, or its changes since a snapshot, in pages of bounded size. Never reads data. */
import { STATE_ZERO, type Awaitable, type ExtentSink } from 'nbd-server-ts/block-device';
import type { Vdi } from '../vdi/vdi.js';
import { MAX_PAGE_BYTES, MAX_PAGE_RANGES, OperationError, type DataPage } from './operations.js';

interface Range {
  readonly offset: number;
  length: number;
}

/** Extents of base:allocation; may report fewer bytes than asked for. */
type Extents = (offset: number, length: number, sink: ExtentSink) => Awaitable<void>;

/** The ranges from `offset` on that may hold something other than zeros, by base:allocation; adjacent ranges are merged. */
export async function dataPageOf(size: number, offset: number, extents: Extents): Promise<DataPage> {
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

/** Where `vdi` may differ from `base`, from `offset` on. Errors: BAD_SIZE (data objects of different sizes). */
export async function changesPage(vdi: Vdi, base: Vdi, offset: number): Promise<DataPage> {
  if (vdi.record.blockSizeShift !== base.record.blockSizeShift) {
    throw new OperationError(
      'BAD_SIZE',
      `${vdi.record.name} and ${base.record.name} have data objects of different sizes: they cannot be compared by object`,
    );
  }
  const ranges: Range[] = [];
  let next = offset;
  if (offset < vdi.size) {
    await vdi.changedSince(base, offset, vdi.size - offset, (at, length, changed) => {
      if (changed && ranges.length === MAX_PAGE_RANGES) return false;
      if (changed) ranges.push({ offset: at, length });
      next = at + length;
      return true;
    });
  }
  return { ranges, next: next < vdi.size ? next : null };
}
