/**
 * `store rescue` of a local store: locks the damaged store as a reader, plans, and builds the new one. Owns that lock. The rules are
 * in rescue-plan.ts and rescue-replay.ts.
 */
import path from 'node:path';
import type { HostDisk } from '../../system/disk.js';
import { hostDisk } from '../../system/real-disk.js';
import { StoreError } from '../store-error.js';
import { buildRescued, mustBeNew, type BuildOptions, type Built } from './rescue-build.js';
import { planRescue, type RescuePlan } from './rescue-plan.js';
import { StoreLock, StoreLockedError } from './store-lock.js';

export interface RescueOptions extends BuildOptions {
  /** Called with the plan before anything is made. */
  readonly planned?: (plan: RescuePlan) => void;
  /** Only plan. */
  readonly isDry: boolean;
  /** Build a store although meta.mdb is good. */
  readonly force: boolean;
  readonly disk?: HostDisk;
}

export interface Rescued {
  readonly plan: RescuePlan;
  /** Undefined if nothing was built. */
  readonly built: Built | undefined;
}

/**
 * Rescue the store in `from` into `to`. Errors (StoreError): NO_STORE (there is none in `from`, or `to` is not empty), LOCKED (the
 * store is in use), FORMAT (a newer sheepgate wrote it), UNSUPPORTED (meta.mdb is good, and no `force`), those of the disk.
 */
export async function rescueStore(from: string, to: string | undefined, options: RescueOptions): Promise<Rescued> {
  const { disk = hostDisk } = options;
  const directory = path.resolve(from);
  if (!disk.statSync(directory)?.isDirectory()) throw new StoreError('NO_STORE', `${from} is not a directory`);
  if (to !== undefined) mustBeNew(disk, directory, to);
  const lock = lockToRead(disk, directory);
  try {
    const plan = await planRescue(disk, directory);
    if (plan.base === 'nothing' && plan.lost.length === 0)
      throw new StoreError('NO_STORE', `nothing in ${from} can be rescued: no metadata, no copy of it, and no objects`);
    options.planned?.(plan);
    if (options.isDry || to === undefined) return { plan, built: undefined };
    if (plan.base === 'metadata' && !options.force)
      throw new StoreError(
        'UNSUPPORTED',
        `${from} needs no rescue: its meta.mdb is good; --force builds a new store all the same`,
      );
    return { plan, built: await buildRescued(disk, plan, to, options) };
  } finally {
    lock.release();
  }
}

/** Errors: LOCKED, those of the disk. */
function lockToRead(disk: HostDisk, directory: string): StoreLock {
  try {
    return StoreLock.take(disk, directory, 'command', { isReadOnly: true });
  } catch (error) {
    if (!(error instanceof StoreLockedError)) throw error;
    throw new StoreError('LOCKED', `${error.message}; stop it first: a rescue needs files that nobody changes`, {
      cause: error,
    });
  }
}
