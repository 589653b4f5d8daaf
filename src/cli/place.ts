/**
 * A PLACE on the command line: a store's directory, or "cluster:" and what --cluster takes. Owns that syntax; for commands
 * that work on two stores at once, which --store and --cluster cannot name.
 */
import fs from 'node:fs';
import path from 'node:path';
import { InvalidArgumentError } from 'commander';
import { OperationError, type Operations } from '../daemon/operations.js';
import { clusterLocation, isClusterLocation } from '../store/sheep/cluster-address.js';
import { printNote } from './output.js';

/** "./cluster:x" is a directory of that name. */
const CLUSTER_PREFIX = 'cluster:';

export const PLACE_HELP = 'store directory, or cluster:HOST[:PORT][,HOST[:PORT]...]';

/** For commander: the location of a store, as StorePlace has it. A daemon's own words for a cluster will do as well. */
export function placeArgument(text: string): string {
  if (text === '' || text.includes('\0')) throw new InvalidArgumentError(`Give a ${PLACE_HELP}.`);
  if (!text.startsWith(CLUSTER_PREFIX) && !isClusterLocation(text)) return path.resolve(text);
  try {
    return clusterLocation(text.startsWith(CLUSTER_PREFIX) ? text.slice(CLUSTER_PREFIX.length) : text);
  } catch (error) {
    throw new InvalidArgumentError(`${(error as Error).message}.`);
  }
}

export interface Place {
  /** A directory, or a cluster's location. */
  readonly location: string;
  /** Its daemon's control socket, if that cannot be found from the location. */
  readonly control: string | undefined;
  readonly mayCreate: boolean;
  /** Read zeros in place of lost objects; then nothing is written, and no daemon is asked. */
  readonly missingIsZero?: boolean;
}

/** Through its daemon if there is one. Errors: NO_STORE, and those of openOperations. */
export async function openPlace(place: Place): Promise<Operations> {
  const { location } = place;
  if (!isClusterLocation(location) && fs.statSync(location, { throwIfNoEntry: false })?.isDirectory() === false) {
    throw new OperationError('NO_STORE', `${location} is not a directory, so it is no store`);
  }
  // Loaded late: the store's native parts take a while, and usage errors and --help need none of them.
  const { openOperations } = await import('../daemon/open-operations.js');
  return openOperations({
    store: location,
    isStoreGiven: true,
    mayCreate: place.mayCreate,
    control: place.control,
    missingIsZero: place.missingIsZero,
    log: printNote,
  });
}
