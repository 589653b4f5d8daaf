/**
 * VDIs that a command has begun to fill and not finished: who may still touch one, and what the others are told. What the
 * mark says is the store's (src/store/object-store.ts, Unfinished); when it is set and taken away, the catalog's.
 */
import type { Redundancy, Unfinished, VdiRecord } from '../store/object-store.js';
import { shellWord } from '../text/shell-word.js';
import { CatalogError } from './catalog-error.js';

/** A command that is about to fill a VDI. */
export interface Beginning extends Pick<Unfinished, 'by' | 'of' | 'run'> {
  /** Of the VDI, in bytes, if it has to be made. */
  readonly size: number;
  /** Undefined: the store's own. */
  readonly blockSizeShift?: number | undefined;
  /** Of a VDI that has to be made; what is there keeps its own. */
  readonly redundancy?: Redundancy | undefined;
  /** Of what is copied: for a store that has no object size of its own, or one that `largestSize` is too much for. */
  readonly likeShift?: number | undefined;
  /** What it may be resized to while it is filled. */
  readonly largestSize?: number | undefined;
  /** In place of `size`: as large as it can be. It is cut to what has come at the end. */
  readonly isOpenEnded?: boolean | undefined;
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

/** What else is known of an unfinished VDI. */
export interface Circumstances {
  /** The command has it open: undefined where that cannot be known, in another store or on a cluster with other hosts. */
  readonly isAtWork: boolean | undefined;
  /** There is something to roll back to. */
  readonly hasSnapshots: boolean;
}

/** What is wrong with an unfinished VDI, and the ways out; for messages. */
export function describeUnfinished(record: VdiRecord, { isAtWork, hasSnapshots }: Circumstances): string {
  const { name, unfinished } = record;
  if (!unfinished) throw new Error('invariant: a whole VDI is told to be unfinished');
  const { by, since, isNew } = unfinished;
  const began = `${name} is unfinished: ${NOUNS[by]} that began at ${new Date(since).toISOString()}`;
  if (isAtWork) return `${began} is at work on it now; wait until that has come to its end`;
  const content = isNew ? 'not all of it is there' : 'it is partly what it was and partly what was put over it';
  const state = isAtWork === undefined ? 'is at work on it, or has ended without finishing it' : 'was not finished';
  return `${began} ${state}, and ${content}; 'sheepgate ${by}' again completes it, ${waysOut(record, hasSnapshots)} gives it up`;
}

/** What gives an unfinished VDI up, as the subject of a sentence. */
export function waysOut({ name, unfinished }: VdiRecord, hasSnapshots: boolean): string {
  const deletion = `'sheepgate vdi delete ${shellWord(name)}'`;
  return !unfinished?.isNew && hasSnapshots ? `a rollback to one of its snapshots, or ${deletion},` : deletion;
}

/** Whether that run may touch the VDI, or everybody if it is undefined. Snapshots are never unfinished. */
export function isHeldBy({ isSnapshot, unfinished }: VdiRecord, run: string | undefined): boolean {
  return isSnapshot || unfinished?.run === run;
}

/** What to throw where isHeldBy is false. */
export function notHeldBy(record: VdiRecord, run: string | undefined, circumstances: Circumstances): CatalogError {
  if (run === undefined) return new CatalogError('UNFINISHED', describeUnfinished(record, circumstances));
  const now = record.unfinished
    ? `${NOUNS[record.unfinished.by]} is at work on it, or was`
    : 'it bears no mark of this command any more';
  return new CatalogError(
    'UNFINISHED',
    `${record.name} was deleted, rolled back, snapshotted by other means or begun anew while it was being filled: ${now}`,
  );
}
