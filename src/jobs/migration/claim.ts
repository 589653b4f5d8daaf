/**
 * The target of a migration, before the first write: it is made, or found to be what an earlier run of the same migration
 * left. Owns what the migration may write over, and the refusal of everything else.
 */
import { asOperationError, OperationError, type Operations, type VdiRecord } from '../../operations/operations.js';
import { isOfSame } from '../../vdi/unfinished.js';
import type { History } from './history.js';
import { isMigrationMark, type MigrationRun } from './migration-run.js';

/** The VDI and its snapshots in the target. */
export async function targetRecords({ target, options }: MigrationRun): Promise<VdiRecord[]> {
  return (await target.list()).filter((record) => record.name === options.newName);
}

/** Mark the target as unfinished by this run. Errors: EXISTS, BUSY, CHANGED, UNFINISHED, and those of the store. */
export async function claimTarget(migration: MigrationRun, history: History): Promise<void> {
  const { target, options, id, run, migratedTag } = migration;
  const { newName, redundancy, blockSizeShift, force } = options;
  const first = history.snapshots[0] ?? history.working;
  if (!first) throw new Error('invariant: a history without a snapshot or a working VDI');
  const records = await targetRecords(migration);
  const working = records.find(({ isSnapshot }) => !isSnapshot);
  const isOurs = isOfSame(working?.unfinished, { by: 'migrate', of: id });
  const isBetweenRuns = records.some(({ tag }) => tag === migratedTag);
  // An unfinished import, restore or other migration.
  if (working?.unfinished && !isOurs) throw foreign(migration, records);
  const isKnown = isOurs || isBetweenRuns;
  if (isKnown && !working) {
    throw new OperationError(
      'UNFINISHED',
      `${newName} in ${target.store} has snapshots but no working VDI, so the migration cannot continue; delete the snapshots there and start again`,
    );
  }
  try {
    await target.begin(newName, {
      by: 'migrate',
      of: id,
      run,
      size: first.size,
      blockSizeShift,
      likeShift: first.blockSizeShift,
      largestSize: history.snapshots.reduce((most, { size }) => Math.max(most, size), (history.working ?? first).size),
      redundancy,
      // The result of an earlier run of this migration, or an empty VDI.
      overwrites: isBetweenRuns || (records.length === 1 && (await isUntouched(target, working, first))),
      goesOn: true,
      force,
    });
  } catch (error) {
    const { code, message } = asOperationError(error) ?? {};
    if (code === 'EXISTS') throw foreign(migration, records);
    // Two stores are open: say which one.
    if (code !== undefined) throw new OperationError(code, `in ${target.store}, ${message}`, { cause: error });
    throw error;
  }
  if (isKnown) await checkGoesOn(migration, history, isBetweenRuns);
  if (isBetweenRuns) await target.remove(`${newName}@${migratedTag}`);
}

async function isUntouched(target: Operations, working: VdiRecord | undefined, like: VdiRecord): Promise<boolean> {
  if (!working || working.unfinished) return false;
  if (working.size !== like.size || working.blockSizeShift !== like.blockSizeShift) return false;
  const { allocatedBytes, open } = await target.show(working.name);
  return allocatedBytes === 0 && open === 0;
}

/**
 * As long as the snapshot between two runs exists, no run has written since it was taken: any change was made by another client,
 * even if an interrupted run has set its unfinished mark already. Errors: CHANGED (the target is not as the last run left it; its
 * mark is removed, so that the client that wrote it can use it).
 */
async function checkGoesOn(migration: MigrationRun, history: History, isBetweenRuns: boolean): Promise<void> {
  const { target, options, run } = migration;
  try {
    checkPrefix(migration, history, await targetRecords(migration));
    if (isBetweenRuns) await refuseIfChanged(migration);
  } catch (error) {
    // If this fails too, the next run finds the same.
    if (isBetweenRuns) await target.finish(options.newName, run).catch(() => undefined);
    throw error;
  }
}

function foreign({ target, options }: MigrationRun, records: readonly VdiRecord[]): OperationError {
  const { newName } = options;
  const mark = records.find(({ tag }) => isMigrationMark(tag));
  const unfinished = records.find((record) => record.unfinished)?.unfinished;
  let why = 'exists, and is not an unfinished target of this migration: nothing was touched';
  if (unfinished) why = `is unfinished, left by another migration or command (${unfinished.by})`;
  else if (mark) why = `is the unfinished target of another migration (it has the snapshot ${newName}@${mark.tag})`;
  return new OperationError(
    'EXISTS',
    `${newName} in ${target.store} ${why}; give another name with --as, or delete it with its snapshots`,
  );
}

/** The snapshots of the target must be the first snapshots of the source. Errors: CHANGED. */
export function checkPrefix(migration: MigrationRun, history: History, records: readonly VdiRecord[]): void {
  const { source, target, options, sourceSpec } = migration;
  const { newName } = options;
  const there = records.filter(
    ({ isSnapshot, isTemporary, tag }) => isSnapshot && !isMigrationMark(tag) && !isTemporary,
  );
  there.sort((a, b) => a.snapId - b.snapId);
  for (const [n, { tag }] of there.entries()) {
    const expected = history.snapshots[n];
    if (expected && history.tags.get(expected.vid) === tag) continue;
    throw new OperationError(
      'CHANGED',
      `${newName}@${tag} in ${target.store} is not (or no longer) the ${ordinal(n)} snapshot of ${sourceSpec} in ${source.store}; delete it in the target if it is not wanted, and start again`,
    );
  }
}

async function refuseIfChanged({ target, options, migratedTag }: MigrationRun): Promise<void> {
  const { newName } = options;
  const mark = `${newName}@${migratedTag}`;
  const { ranges } = await target.changes(newName, mark, 0);
  if (ranges.length === 0) return;
  throw new OperationError(
    'CHANGED',
    `${newName} in ${target.store} was written by another client since the last run, and another run would undo that; to keep it as it is, delete ${mark}; to start again, delete it with its snapshots`,
  );
}

function ordinal(n: number): string {
  return ['first', 'second', 'third'][n] ?? `${n + 1}th`;
}
