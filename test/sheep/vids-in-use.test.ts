/** Finding the few entries in what is nearly all zeros: the nodes' bitmaps of vids, and tables of inodes. */
import { expect, test } from 'vitest';
import { VDI_BITMAP_BYTES } from '../../src/sheepdog/protocol.js';
import { VidsInUse } from '../../src/sheepdog/vids-in-use.js';
import { presentIn, presentInLong } from '../../src/store/sheep/table-scan.js';

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

test('the buffers of the answers can be used again', () => {
  const [used, deleted] = [bitmapOf([1, 5 * PART]), bitmapOf([1])];
  const vids = new VidsInUse(used, deleted);
  used.fill(0xff);
  deleted.fill(0xff);
  expect(vids.live()).toEqual([5 * PART]);
  expect(vids.isUsed(2)).toBe(false);
});

test('all objects of a table are found in order, wherever they are, also in a table that ends anywhere', async () => {
  for (const length of [0, 1, 1023, 1024, 1025, 3 * 2 ** 15 + 17]) {
    const table = new Uint32Array(length);
    const places = [0, 1, 1022, 1023, 1024, 2 ** 15 - 1, 2 ** 15, length - 1].filter((idx) => idx >= 0 && idx < length);
    for (const idx of places) table[idx] = 2 ** 24 - 1;
    const expected = [...new Set(places)].sort((a, b) => a - b);
    expect(presentIn(table)).toEqual(expected);
    expect(await presentInLong(table)).toEqual(expected);
    expect(presentIn(new Uint32Array(length))).toEqual([]);
  }
});
