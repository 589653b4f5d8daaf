/** What the catalog's operations work with. One set of parts for each store that is open. */
import type { ObjectStore } from '../store/object-store.js';
import type { BusyChecks } from './busy-checks.js';
import type { InUse } from './in-use.js';
import type { KeptSnapshots } from './kept-snapshots.js';
import type { Log } from './log.js';
import type { Lookup } from './lookup.js';
import type { OpenVdis } from './open-vdis.js';
import type { OperationQueue } from './operation-queue.js';

export interface CatalogParts {
  readonly store: ObjectStore;
  readonly queue: OperationQueue;
  readonly open: OpenVdis;
  readonly lookup: Lookup;
  readonly inUse: InUse;
  readonly busy: BusyChecks;
  readonly kept: KeptSnapshots;
  readonly log: Log;
}
