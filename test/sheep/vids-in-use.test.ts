/** Reading the nodes' bitmaps of vids. */
import { expect, test } from 'vitest';
import { VDI_BITMAP_BYTES } from '../../src/sheepdog/protocol.js';
import { VidsInUse } from '../../src/sheepdog/vids-in-use.js';

/** Vids per 4 KiB of a bitmap. */
const PART = 4096 * 8;

function bitmapOf(vids: readonly number[]): Buffer {
  const bitmap = Buffer.alloc(VDI_BITMAP_BYTES);
  for (const vid of vids) bitmap[vid >>> 3] = (bitmap[vid >>> 3] as number) | (1 << (vid & 7));
  return bitmap;
}

test('all vids in use are found in order, wherever they are, and deleted vids are not', () => {
  const last = VDI_BITMAP_BYTES * 8 - 1;
  const used = [1, 7, 8, PART - 1, PART, PART + 1, 5 * PART, 5 * PART + 4711, last - 1, last];
  const deleted = [8, PART, last - 1];
  const vids = new VidsInUse(bitmapOf(used), bitmapOf(deleted));
  expect(vids.live()).toEqual(used.filter((vid) => !deleted.includes(vid)));
  expect(vids.live().every((vid) => vids.isLive(vid))).toBe(true);
  expect(new VidsInUse(bitmapOf([]), bitmapOf([])).live()).toEqual([]);
});
