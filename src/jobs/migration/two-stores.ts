/**
 * The source and the target of a migration, open at the same time. Owns the order in which the two stores are opened and
 * closed, and the check that they are not the same store.
 */
import fs from 'node:fs';
import { OperationError, type Operations } from '../../operations/operations.js';
import { directoryOf, type StoreOptions } from '../../store/locations.js';
import { closeAfter } from '../../system/close-after.js';

export interface StorePlace {
  /** A directory, or a cluster's location. */
  readonly location: string;
  /** Its daemon's control socket, if that cannot be found from the location. */
  readonly control: string | undefined;
  readonly mayCreate: boolean;
  readonly options?: StoreOptions;
}

/**
 * Run `work` on both stores. Errors: BAD_USAGE (they are the same store), and those of opening.
 *
 * While a local store is open, root may have the identity of its owner. The state that this host keeps about a cluster, and the
 * daemon that may serve it, belong to root. So a cluster is opened before a local store, and closed after it.
 */
export async function withTwoStores<T>(
  source: StorePlace,
  target: StorePlace,
  log: (line: string) => void,
  work: (source: Operations, target: Operations) => Promise<T>,
): Promise<T> {
  const [from, to] = [source.location, target.location];
  const { isSameStore } = await import('../../operations/open-operations.js');
  // Before the stores are opened: as another user this process may not be able to read its own program.
  const { explainIdentity } = await import('../../operations/run-as-owner.js');
  const same = (): OperationError =>
    new OperationError(
      'BAD_USAGE',
      `--from and --to are the same, ${from}; 'sheepgate vdi clone' copies within a store`,
    );
  if (isSameStore(from, to)) throw same();
  const isTargetFirst = directoryOf(to) === undefined && directoryOf(from) !== undefined;
  const explained = <R>(part: () => Promise<R>): Promise<R> =>
    part().catch((error: unknown) => {
      throw explainIdentity(error);
    });
  const first = await openStore(isTargetFirst ? target : source, log);
  return closeAfter(first, () =>
    explained(async () => {
      const second = await openStore(isTargetFirst ? source : target, log);
      return closeAfter(second, () =>
        explained(async () => {
          // The same cluster through two of its nodes, or the same directory under two names.
          if (first.identity === second.identity) throw same();
          // This process may now have an identity that the first store's daemon refuses: better to find that out here.
          if (first.isDaemon && !second.isDaemon) await first.list();
          return isTargetFirst ? work(second, first) : work(first, second);
        }),
      );
    }),
  );
}

/** Open a store, through its daemon if it has one. Errors: NO_STORE, and those of openOperations. */
async function openStore(place: StorePlace, log: (line: string) => void): Promise<Operations> {
  const { location } = place;
  const directory = directoryOf(location);
  if (directory !== undefined && fs.statSync(directory, { throwIfNoEntry: false })?.isDirectory() === false) {
    throw new OperationError('NO_STORE', `${location} is not a directory, so it cannot be a store`);
  }
  // Loaded late: loading a store's native libraries takes a while, and usage errors and --help do not need them.
  const { openOperations } = await import('../../operations/open-operations.js');
  return openOperations({
    store: location,
    isStoreGiven: true,
    mayCreate: place.mayCreate,
    control: place.control,
    options: place.options,
    log,
  });
}
