/** The door to `store rescue`, for commands: it is done on the files of a local store, never by a daemon. */
import { rescueStore, type Rescued, type RescueOptions } from '../store/local/rescue.js';

export type { Rescued };

/** Errors: StoreError; see rescueStore. */
export function rescue(from: string, to: string | undefined, options: RescueOptions): Promise<Rescued> {
  return rescueStore(from, to, options);
}
