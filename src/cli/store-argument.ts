/**
 * A PLACE on the command line: a store's directory, or "cluster:" and what --cluster takes. Owns that syntax; for commands
 * that work on two stores at once, which --store and --cluster cannot name.
 */
import fs from 'node:fs';
import { InvalidArgumentError } from 'commander';
import { OperationError, type Operations } from '../operations/operations.js';
import { directoryOf, parseLocation, LOCATION_SYNTAX, type StoreOptions } from '../store/locations.js';
import { printNote } from './output.js';

/** For commander: the location of a store, as StoreLocation has it. A daemon's own words for a cluster will do as well. */
export function storeArgument(text: string): string {
  if (text === '' || text.includes('\0')) throw new InvalidArgumentError(`Give a ${LOCATION_SYNTAX}.`);
  try {
    return parseLocation(text);
  } catch (error) {
    throw new InvalidArgumentError(`${(error as Error).message}.`);
  }
}

export interface StoreArgument {
  /** A directory, or a cluster's location. */
  readonly location: string;
  /** Its daemon's control socket, if that cannot be found from the location. */
  readonly control: string | undefined;
  readonly mayCreate: boolean;
  readonly options?: StoreOptions;
}

/** Through its daemon if there is one. Errors: NO_STORE, and those of openOperations. */
export async function openStoreArgument(place: StoreArgument): Promise<Operations> {
  const { location } = place;
  const directory = directoryOf(location);
  if (directory !== undefined && fs.statSync(directory, { throwIfNoEntry: false })?.isDirectory() === false) {
    throw new OperationError('NO_STORE', `${location} is not a directory, so it is no store`);
  }
  // Loaded late: the store's native parts take a while, and usage errors and --help need none of them.
  const { openOperations } = await import('../operations/open-operations.js');
  return openOperations({
    store: location,
    isStoreGiven: true,
    mayCreate: place.mayCreate,
    control: place.control,
    options: place.options,
    log: printNote,
  });
}
