/**
 * Who this process is during a backup. Root takes the identity of a store's owner while it has the store open
 * (src/operations/run-as-owner.ts). A backup opens its store several times, and its target must belong to one user: the
 * identity of the first opening is held to the end of the backup.
 */
import { explainIdentity, takeOwner } from '../../operations/run-as-owner.js';
import { directoryOf } from '../../store/locations.js';
import type { WithStore } from '../with-store.js';

/** Run `work` with a `withStore` that holds the owner. Errors: as of `work`, with the identity explained where it matters. */
export async function holdingOwner<T>(withStore: WithStore, work: (withStore: WithStore) => Promise<T>): Promise<T> {
  let leave: (() => void) | undefined;
  const held: WithStore = (use) =>
    withStore((operations) => {
      const directory = directoryOf(operations.store);
      if (!operations.isDaemon && directory !== undefined) leave ??= takeOwner(directory);
      return use(operations);
    });
  try {
    return await work(held);
  } catch (error) {
    throw explainIdentity(error);
  } finally {
    leave?.();
  }
}
