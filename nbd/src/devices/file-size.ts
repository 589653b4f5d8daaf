/** What a descriptor refers to, and how many bytes that has. Block devices do not say it in stat: it is found by reading. */

import type { FileHandle } from 'node:fs/promises';
import { DeviceError } from '../block-device.js';

/** The size of every block device is a multiple of it, bytes. */
const SECTOR_BYTES = 512;
/** Sectors: more bytes than 2^53-1 cannot be addressed. */
const MAX_SECTORS = 2 ** 44 - 1;

/** Errors: DeviceError EINVAL if it is neither a regular file nor a block device. */
export async function sizeOf(
  file: FileHandle,
  name: string,
): Promise<{ readonly isBlockDevice: boolean; readonly size: number }> {
  const found = await file.stat();
  if (found.isFile()) return { isBlockDevice: false, size: found.size };
  if (!found.isBlockDevice()) throw new DeviceError('EINVAL', `${name} is neither a regular file nor a block device`);
  // The first sector that is not there: before `low` all are, and none from `high` on.
  let low = 0;
  let high = 1;
  while (high < MAX_SECTORS && (await hasSector(file, high - 1))) {
    low = high;
    high = Math.min(MAX_SECTORS, high * 2);
  }
  while (low < high) {
    const middle = Math.floor((low + high) / 2);
    if (await hasSector(file, middle)) low = middle + 1;
    else high = middle;
  }
  return { isBlockDevice: true, size: low * SECTOR_BYTES };
}

async function hasSector(file: FileHandle, sector: number): Promise<boolean> {
  const into = Buffer.alloc(SECTOR_BYTES);
  try {
    const { bytesRead } = await file.read(into, 0, SECTOR_BYTES, sector * SECTOR_BYTES);
    return bytesRead > 0;
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    // A sector that cannot be read is there. Behind the end Linux reads nothing; a position may also be too large for a device.
    if (code === 'EIO') return true;
    if (code === 'EINVAL' || code === 'EFBIG' || code === 'EOVERFLOW' || code === 'ENXIO') return false;
    throw error;
  }
}
