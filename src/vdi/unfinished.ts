/**
 * VDIs that a command has begun to fill and not finished: which run may still use one, and the messages for all others. The mark
 * itself is src/store/vdi-record.ts, Unfinished; when it is set and removed, filling.ts decides.
 */
import type { Redundancy, Unfinished, VdiRecord } from '../store/vdi-record.js';
import { shellWord } from '../text/shell-word.js';
import { CatalogError } from './catalog-error.js';

/** How a command begins to fill a VDI. */
export interface Beginning extends Pick<Unfinished, 'by' | 'of' | 'run'> {
  /** Of the VDI in bytes, if it has to be made. */
  readonly size: number;
  /** Undefined: the store's default. */
  readonly blockSizeShift?: number | undefined;
  /** Of a VDI that has to be made; an existing one keeps its own. */
  readonly redundancy?: Redundancy | undefined;
  /** Of the disk that is copied: used if the store has no default, or `largestSize` does not fit into its default. */
  readonly likeShift?: number | undefined;
  /** In bytes: the largest size that it may be resized to while it is filled. */
  readonly largestSize?: number | undefined;
  /** In place of `size`: as large as a VDI can be. It is cut to the size of the data at the end. */
  readonly isOpenEnded?: boolean | undefined;
  /** Also write over a VDI that is not unfinished. */
  readonly overwrites: boolean;
  /**
   * Keep and complete what an earlier run has left; otherwise a VDI that an earlier run has made is deleted and created again.
   */
  readonly goesOn: boolean;
  /** Also if a client that was cut off may come back. */
  readonly force?: boolean | undefined;
}

/** For operations that a run of a command may do on the VDI that it fills. */
export interface Filling {
  readonly run?: string | undefined;
}

/** For messages. */
export const NOUNS: Readonly<Record<Unfinished['by'], string>> = {
  import: 'an import',
  restore: 'a restore',
  migrate: 'a migration',
};

/** Whether the mark was set by the same command, with the same content to carry. */
export function isOfSame(unfinished: Unfinished | undefined, { by, of }: Pick<Beginning, 'by' | 'of'>): boolean {
  return unfinished?.by === by && unfinished.of === of;
}

/** What else is known of an unfinished VDI, for messages. */
export interface Circumstances {
  /** The command has it open; undefined where that is not known: in another store, or a cluster with other hosts. */
  readonly isAtWork: boolean | undefined;
  /** There is a snapshot to roll back to. */
  readonly hasSnapshots: boolean;
}

/** The state of an unfinished VDI, and the ways out. */
export function describeUnfinished(record: VdiRecord, { isAtWork, hasSnapshots }: Circumstances): string {
  const { name, unfinished } = record;
  if (!unfinished) throw new Error('invariant: a VDI without the mark is described as unfinished');
  const { by, since, isNew } = unfinished;
  const began = `${name} is unfinished: ${NOUNS[by]} that began at ${new Date(since).toISOString()}`;
  if (isAtWork) return `${began} is at work on it now; wait until that has ended`;
  const content = isNew ? 'not all of its data is there' : 'it holds a mix of its old data and the new';
  const state = isAtWork === undefined ? 'is at work on it, or has ended without finishing it' : 'was not finished';
  return `${began} ${state}, and ${content}; 'sheepgate ${by}' again completes it, ${waysOut(record, hasSnapshots)} gives it up`;
}

/** The ways to give up an unfinished VDI, as the subject of a sentence. */
export function waysOut({ name, unfinished }: VdiRecord, hasSnapshots: boolean): string {
  const deletion = `'sheepgate vdi delete ${shellWord(name)}'`;
  return !unfinished?.isNew && hasSnapshots ? `a rollback to one of its snapshots, or ${deletion},` : deletion;
}

/** Whether that run may use the VDI; without a run: whether every caller may. Snapshots are never unfinished. */
export function isHeldBy({ isSnapshot, unfinished }: VdiRecord, run: string | undefined): boolean {
  return isSnapshot || unfinished?.run === run;
}

/** The error UNFINISHED, for when isHeldBy is false. */
export function notHeldBy(record: VdiRecord, run: string | undefined, circumstances: Circumstances): CatalogError {
  if (run === undefined) return new CatalogError('UNFINISHED', describeUnfinished(record, circumstances));
  const now = record.unfinished
    ? `${NOUNS[record.unfinished.by]} is at work on it, or was`
    : 'it no longer has the mark of this command';
  return new CatalogError(
    'UNFINISHED',
    `${record.name} was deleted, rolled back, snapshotted by other means or started again while it was being filled: ${now}`,
  );
}
