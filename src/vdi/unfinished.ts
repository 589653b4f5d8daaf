/**
 * VDIs that a command has begun to fill and not finished: who may still touch one, and what the others are told. What the
 * mark says is the store's (src/store/object-store.ts, Unfinished); when it is set and taken away, the catalog's.
 */
import type { Unfinished, VdiRecord } from '../store/object-store.js';
import { CatalogError } from './catalog-error.js';

/** A command that is about to fill a VDI. */
export interface Beginning extends Pick<Unfinished, 'by' | 'of' | 'run'> {
  /** Of the VDI, in bytes, if it has to be made. */
  readonly size: number;
  readonly blockSizeShift?: number | undefined;
  /** Also a VDI that is whole. */
  readonly overwrites: boolean;
  /** What an earlier run has left is kept and completed; otherwise a VDI that the command had made is made anew. */
  readonly goesOn: boolean;
  /** Also if a client that was cut off from it may come back. */
  readonly force?: boolean | undefined;
}

/** By the run of a command that fills the VDI, if it is one. */
export interface Filling {
  readonly run?: string | undefined;
}

/** For messages. */
export const NOUNS: Readonly<Record<Unfinished['by'], string>> = {
  import: 'an import',
  restore: 'a restore',
  migrate: 'a migration',
};

/** Whether the mark is that of the same command carrying the same. */
export function isOfSame(unfinished: Unfinished | undefined, { by, of }: Pick<Beginning, 'by' | 'of'>): boolean {
  return unfinished?.by === by && unfinished.of === of;
}

/** What is wrong with an unfinished VDI, and the ways out; for messages. */
export function describeUnfinished({ name, unfinished }: VdiRecord): string {
  if (!unfinished) throw new Error('invariant: a whole VDI is told to be unfinished');
  const { by, since, isNew } = unfinished;
  const content = isNew ? 'not all of it is there' : 'it is partly what it was and partly what was put over it';
  const others = isNew ? "'sheepgate vdi delete'" : 'a rollback to one of its snapshots, or deleting it,';
  return (
    `${name} is unfinished: ${NOUNS[by]} that began at ${new Date(since).toISOString()} has not come to its end, ` +
    `and ${content}; 'sheepgate ${by}' again completes it, ${others} gives it up`
  );
}

/**
 * Errors: UNFINISHED unless `run` is the run that is at work on the VDI, or there is no run and nothing to be at work on.
 * Snapshots are never unfinished.
 */
export function mustBeHeldBy(record: VdiRecord, run: string | undefined): void {
  if (record.isSnapshot || record.unfinished?.run === run) return;
  if (run === undefined) throw new CatalogError('UNFINISHED', describeUnfinished(record));
  const now = record.unfinished
    ? `${NOUNS[record.unfinished.by]} is at work on it, or was`
    : 'it bears no mark of this command any more';
  throw new CatalogError(
    'UNFINISHED',
    `${record.name} was deleted, rolled back, snapshotted by other means or begun anew while it was being filled: ${now}`,
  );
}
