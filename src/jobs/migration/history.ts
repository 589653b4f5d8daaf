/**
 * The history of the VDI that is migrated: its snapshots, what each is called in the target, and which snapshot each one is
 * compared with. Owns the choice of that base, and of what belongs to a history. Reads the source's list, writes nothing.
 */
import { OperationError, type Operations, type VdiRecord } from '../../operations/operations.js';
import { kindOf } from '../../store/locations.js';
import { specOf } from '../../vdi/names.js';
import { describeUnfinished } from '../../vdi/unfinished.js';
import { blockBytesOf } from '../block-hashes.js';
import { carriedTags } from './carried-tags.js';
import { isMigrationMark, isReadingMark, type MigrationRun } from './migration-run.js';
import type { Present } from './present.js';

export interface History {
  /** Oldest first. */
  readonly snapshots: readonly VdiRecord[];
  readonly working: VdiRecord | undefined;
  /** The tags of the snapshots in the target, by their vids in the source. */
  readonly tags: ReadonlyMap<number, string>;
}

/** What the target has to become next: a snapshot, or the present content. */
export interface Goal {
  /** An export of the source. */
  readonly spec: string;
  /** The tag in the target; undefined for the present content. */
  readonly tag: string | undefined;
  readonly renamedFrom?: string | undefined;
  readonly size: number;
  /** Of the blocks that are compared. */
  readonly blockBytes: number;
  readonly takenAt: number;
  /** The snapshot on both sides from which this one differs least, as far as is known. */
  readonly base: Base | undefined;
  /** For people. */
  readonly label: string;
}

/** A snapshot: its name in the source, and its tag in the target. */
export interface Base {
  readonly spec: string;
  readonly tag: string;
  readonly size: number;
}

/** What there is to migrate. Errors: NO_VDI, BAD_NAME, UNFINISHED. */
export async function readHistory({ source, target, options, sourceSpec }: MigrationRun): Promise<History> {
  const { name, renamesTags = false } = options;
  const { store } = source;
  const records = (await source.list()).filter((record) => record.name === name);
  const mark = records.find(({ tag }) => isMigrationMark(tag));
  if (mark) {
    throw new OperationError(
      'UNFINISHED',
      `${sourceSpec} in ${store} is itself the unfinished target of a migration (it has the snapshot ${specOf(mark)}); finish that one first`,
    );
  }
  const unfinished = records.find((record) => record.unfinished);
  if (unfinished) throw await unfinishedIn(source, unfinished, records);
  const snapshots = records
    .filter(({ isSnapshot, isTemporary, tag }) => isSnapshot && !isTemporary && !isReadingMark(tag))
    .sort((a, b) => a.snapId - b.snapId);
  const working = records.find(({ isSnapshot }) => !isSnapshot);
  if (snapshots.length === 0 && !working) {
    throw new OperationError('NO_VDI', `no VDI named "${name}" in ${store}; 'sheepgate vdi list' shows what is there`);
  }
  const { store: place } = target;
  const tags = carriedTags(snapshots, { place, takesNumbersForIds: kindOf(place).takesNumbersForIds, renamesTags });
  return { snapshots, working, tags };
}

export function goalOf(history: History, n: number): Goal {
  const snapshot = history.snapshots[n] as VdiRecord;
  const { size, blockSizeShift, snapshotAt } = snapshot;
  const spec = specOf(snapshot);
  const tag = tagOf(history, snapshot);
  const renamedFrom = tag === snapshot.tag ? undefined : spec;
  const blockBytes = blockBytesOf(blockSizeShift);
  return { spec, tag, renamedFrom, size, blockBytes, takenAt: snapshotAt, base: baseOf(history, n), label: spec };
}

export function presentGoal(history: History, working: VdiRecord, { spec, size }: Present, label: string): Goal {
  return {
    spec,
    tag: undefined,
    size,
    blockBytes: blockBytesOf(working.blockSizeShift),
    takenAt: 0,
    base: baseOf(history, history.snapshots.length),
    label,
  };
}

/**
 * The base of the nth snapshot, or of the present content: its parent, which after a rollback is not the snapshot before it.
 * If the parent is gone or belongs to another VDI, the base is the snapshot before it.
 */
export function baseOf(history: History, n: number): Base | undefined {
  const { snapshots, working } = history;
  const parentVid = (snapshots[n] ?? working)?.parentVid;
  const before = snapshots.slice(0, n);
  const base = before.find(({ vid }) => vid === parentVid) ?? before.at(-1);
  return base && { spec: specOf(base), tag: tagOf(history, base), size: base.size };
}

/** In the target. */
export function tagOf({ tags }: History, { vid }: VdiRecord): string {
  return tags.get(vid) as string;
}

export async function unfinishedIn(
  operations: Pick<Operations, 'store' | 'show'>,
  unfinished: VdiRecord,
  records: readonly VdiRecord[],
): Promise<OperationError> {
  const { open } = await operations.show(specOf(unfinished));
  const hasSnapshots = records.some(({ isSnapshot, isTemporary }) => isSnapshot && !isTemporary);
  const what = describeUnfinished(unfinished, { isAtWork: open > 0 || undefined, hasSnapshots });
  return new OperationError('UNFINISHED', `in ${operations.store} ${what}`);
}
