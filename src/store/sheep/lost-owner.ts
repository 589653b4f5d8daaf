/** The owner of an object that a temporary snapshot has lost. Stands in the map of the snapshot, and never in an inode. */
import { MAX_VID } from '../../sheepdog/object-ids.js';
import { StoreError } from '../store-error.js';

/** No vid is that large. */
export const LOST = MAX_VID + 1;

/** Whether this owner stands for a lost object. */
export function isLost(owner: number): boolean {
  return owner === LOST;
}

/** The error of reading such an object. */
export function lostError(idx: number): StoreError {
  const forClients = 'a part of this temporary snapshot is lost: it was overwritten and could not be copied before';
  return new StoreError(
    'IO',
    `object ${idx} of this temporary snapshot is lost: it was overwritten and could not be copied before (is the cluster full?)`,
    { forClients },
  );
}
