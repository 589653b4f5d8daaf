/**
 * A PLACE on the command line: a store's directory, or "cluster:" and what --cluster takes. Owns that syntax; for commands
 * that work on two stores at once, which --store and --cluster cannot name.
 */
import { InvalidArgumentError } from 'commander';
import { LOCATION_SYNTAX, parseLocation } from '../store/locations.js';

/** For commander: the location of a store, as StoreLocation has it. A daemon's own words for a cluster will do as well. */
export function storeArgument(text: string): string {
  if (text === '' || text.includes('\0')) throw new InvalidArgumentError(`Give a ${LOCATION_SYNTAX}.`);
  try {
    return parseLocation(text);
  } catch (error) {
    throw new InvalidArgumentError(`${(error as Error).message}.`);
  }
}
