/** The first block of a disk, all of whose bytes are one number: enough to tell two points in time apart. */
import type { BlockDevice } from 'nbd-server-ts';
import type { VdiCatalog } from '../../src/vdi/catalog.js';

export const BLOCK = 4096;

export async function readFirst(device: BlockDevice): Promise<number> {
  const block = Buffer.alloc(BLOCK);
  await device.read(0, block);
  return block[0] ?? -1;
}

/** Written to the VDI "disk", durably. */
export async function writeFirst(catalog: VdiCatalog, value: number): Promise<void> {
  const vdi = await catalog.openVdi('disk');
  await vdi.write(0, Buffer.alloc(BLOCK, value), true);
  await catalog.release(vdi);
}
