/**
 * What a new VDI may be: its name, size, object size and redundancy, and the limits of a resize. Owns these rules and the
 * errors for what breaks them; makes nothing.
 */
import type { ObjectStore } from '../store/object-store.js';
import {
  DEFAULT_BLOCK_SIZE_SHIFT,
  MAX_BLOCK_SIZE_SHIFT,
  MAX_DATA_OBJECTS,
  MIN_BLOCK_SIZE_SHIFT,
  type Redundancy,
  type VdiRecord,
} from '../store/vdi-record.js';
import { describeRedundancy, formatRedundancy, isSameRedundancy } from '../store/redundancy.js';
import { CatalogError } from './catalog-error.js';
import { checkName } from './names.js';
import type { Beginning } from './unfinished.js';

/** Sizes are multiples of this, so that every client's block size fits. */
const SIZE_UNIT = 512;

export type NewVdi = Pick<Beginning, 'size' | 'blockSizeShift' | 'likeShift' | 'largestSize' | 'isOpenEnded'>;

/** Returns its block size shift. Errors: BAD_NAME, BAD_SIZE. */
export function checkNewVdi(name: string, size: number, shift = DEFAULT_BLOCK_SIZE_SHIFT): number {
  if (!Number.isInteger(shift) || shift < MIN_BLOCK_SIZE_SHIFT || shift > MAX_BLOCK_SIZE_SHIFT) {
    throw new CatalogError(
      'BAD_SIZE',
      `block size shift ${shift}: must be ${MIN_BLOCK_SIZE_SHIFT} to ${MAX_BLOCK_SIZE_SHIFT}`,
    );
  }
  checkName(name);
  checkSize(size, shift);
  return shift;
}

/**
 * The block size shift of a new VDI: the one asked for; else the store's own, if the VDI fits into it; else that of the disk
 * that is copied. Errors: BAD_NAME, BAD_SIZE.
 */
export function shiftOfNew(
  { defaultBlockSizeShift: own }: ObjectStore,
  name: string,
  { size, blockSizeShift, likeShift, largestSize = size, isOpenEnded = false }: NewVdi,
): number {
  if (blockSizeShift !== undefined || own === undefined) {
    const shift = blockSizeShift ?? likeShift;
    return isOpenEnded ? checkNewVdi(name, SIZE_UNIT, shift) : checkNewVdi(name, size, shift);
  }
  if (likeShift !== undefined && largestSize > MAX_DATA_OBJECTS * 2 ** own) return checkNewVdi(name, size, likeShift);
  // A cluster may be formatted with more than --block-size-shift allows.
  checkName(name);
  if (!isOpenEnded) checkSize(size, own);
  return own;
}

/** Errors: BAD_SIZE. */
export function checkSize(size: number, blockSizeShift: number, maxObjects = MAX_DATA_OBJECTS): void {
  const limit = maxObjects * 2 ** blockSizeShift;
  if (!Number.isSafeInteger(size) || size <= 0 || size % SIZE_UNIT !== 0) {
    throw new CatalogError('BAD_SIZE', `size ${size}: must be a positive multiple of ${SIZE_UNIT} bytes`);
  }
  if (size > limit) {
    const advice = blockSizeShift < MAX_BLOCK_SIZE_SHIFT ? '; a larger --block-size-shift allows more' : '';
    throw new CatalogError(
      'BAD_SIZE',
      `size ${size}: a VDI with block size shift ${blockSizeShift} has at most ${limit} bytes${advice}`,
    );
  }
}

/** Whether the store can keep objects so. Errors: UNSUPPORTED (a local store), LIMIT (a cluster with too few nodes). */
export async function mustHold({ catalog, location }: ObjectStore, redundancy: Redundancy | undefined): Promise<void> {
  if (redundancy === undefined) return;
  if (catalog.mustHold) return catalog.mustHold(redundancy);
  throw new CatalogError(
    'UNSUPPORTED',
    `--copies ${formatRedundancy(redundancy)} is for Sheepdog clusters (--cluster); ${location} is a local store, ` +
      'which keeps every object once',
  );
}

/** A VDI that exists keeps its redundancy. Errors: UNSUPPORTED (another one is wanted). */
export function mustKeepRedundancy({ name, redundancy }: VdiRecord, wanted: Redundancy | undefined): void {
  if (wanted === undefined || isSameRedundancy(wanted, redundancy)) return;
  const has = redundancy === undefined ? 'its redundancy' : describeRedundancy(redundancy);
  throw new CatalogError(
    'UNSUPPORTED',
    `${name} exists and keeps ${has}; leave --copies ${formatRedundancy(wanted)} out, or delete it first`,
  );
}
