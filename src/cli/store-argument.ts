/**
 * A PLACE on the command line: the directory of a store, or "cluster:" and the value of --cluster. For commands that work on two
 * stores, because --store and --cluster can name only one.
 */
import { InvalidArgumentError } from 'commander';
import { LOCATION_SYNTAX, parseLocation } from '../store/locations.js';

/** For commander: the location of a store. Also takes a location as a daemon reports it. */
export function storeArgument(text: string): string {
  if (text === '' || text.includes('\0')) throw new InvalidArgumentError(`Give a ${LOCATION_SYNTAX}.`);
  try {
    return parseLocation(text);
  } catch (error) {
    throw new InvalidArgumentError(`${(error as Error).message}.`);
  }
}
