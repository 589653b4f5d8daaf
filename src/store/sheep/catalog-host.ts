/** What the parts of a cluster's catalog need of the store. */
import type { ReadTracker } from './read-tracker.js';
import type { SheepVdi, SheepVdiHost } from './sheep-vdi.js';

export interface CatalogHost extends SheepVdiHost {
  readonly location: string;
  /** Why nothing may be changed; undefined if it may. */
  readonly readOnlyBecause: string | undefined;
  readonly enforcesLocks: boolean;
  /** The mark of this process on temporary snapshots. */
  readonly owner: Buffer;
  /** By vid. */
  readonly open: Map<number, SheepVdi>;
  readonly reads: ReadTracker;
}
