/**
 * The present content of the source as a point in time, while it may be in use. Owns the choice between a temporary snapshot,
 * a snapshot that lasts until it has been read, and the VDI as it is.
 */
import { asOperationError, type VdiRecord } from '../../operations/operations.js';
import { directoryOf } from '../../store/locations.js';
import type { MigrationRun } from './migration-run.js';

export interface Present {
  /** What to open. */
  readonly spec: string;
  readonly size: number;
  close(): Promise<void>;
}

/** Errors: those of taking a snapshot. */
export async function openPresent(
  { source, options, sourceSpec, readingTag, readingLabel }: MigrationRun,
  { size }: VdiRecord,
): Promise<Present> {
  const { name, isReadOnly, verify } = options;
  const isShared = directoryOf(source.store) === undefined && !source.isDaemon;
  const asItIs = { spec: sourceSpec, size, close: () => Promise.resolve() };
  if (isReadOnly || (isShared && verify === 'only')) return asItIs;
  if (!isShared) {
    // All writers go through this store, so its own temporary snapshot is consistent.
    const spec = `${sourceSpec}@now:${readingLabel}`;
    const disk = await source.openDisk(spec);
    return { spec, size: disk.size, close: () => disk.close() };
  }
  // Others may write to the cluster's VDI; only a snapshot by the cluster itself separates their writes.
  const spec = `${sourceSpec}@${readingTag}`;
  const left = (await source.list()).some((record) => record.name === name && record.tag === readingTag);
  if (left) await source.remove(spec);
  let taken: VdiRecord;
  try {
    taken = await source.snapshot(sourceSpec, readingTag);
  } catch (error) {
    // A cluster of an old version can only be read, without a snapshot.
    if (asOperationError(error)?.code === 'READ_ONLY') return asItIs;
    throw error;
  }
  return { spec, size: taken.size, close: async () => void (await source.remove(spec)) };
}
