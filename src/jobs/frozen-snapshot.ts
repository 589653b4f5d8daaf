/**
 * A snapshot of a guest that is frozen for it. Owns what becomes of a snapshot that was taken too late to be consistent: it
 * is removed.
 */
import type { ForceOption, Operations, VdiRecord } from '../operations/operations.js';
import { specOf } from '../vdi/names.js';
import { FrozenMoment, type Freezing } from './freeze.js';
import type { JobContext } from './reporting.js';

export interface FrozenSnapshotOptions extends ForceOption, Pick<JobContext, 'log' | 'signal'> {
  readonly freezing: Freezing;
}

/** Errors: FREEZE_FAILED, FREEZE_TIMEOUT, THAW_FAILED (the snapshot is kept), and those of the snapshot. */
export async function takeFrozenSnapshot(
  operations: Operations,
  name: string,
  tag: string,
  { freezing, force, log, signal }: FrozenSnapshotOptions,
): Promise<VdiRecord> {
  const moment = new FrozenMoment(freezing, { log, signal });
  const taken: VdiRecord[] = [];
  let snapshot: VdiRecord;
  try {
    snapshot = await moment.during(async () => {
      const record = await operations.snapshot(name, tag, { force });
      taken.push(record);
      return record;
    });
  } catch (error) {
    for (const record of taken) {
      const label = specOf(record);
      await operations.remove(label).catch((failure: unknown) => {
        log(`${label} is left behind: ${(failure as Error).message}`);
      });
    }
    throw error;
  }
  moment.throwIfFrozen(`took ${specOf(snapshot)}`);
  return snapshot;
}
