/**
 * The migration of a VDI with its snapshots from one store to another. Owns the order of the steps, and where an interrupted
 * run continues. The stores are Operations, so a daemon makes no difference. A cluster makes one in two places: how its present
 * content is read (present.ts), and which tags it can have (carried-tags.ts).
 *
 * From before the first write to the end of a run, the target has the unfinished mark of this migration: nobody else opens it,
 * and its content may be overwritten. Between two runs a snapshot, NAME@migrated-ID, shows whether anybody has written since.
 * A snapshot of the history gets its tag after it was compared, so a snapshot with its tag is complete.
 */
import { asOperationError, OperationError, type Operations, type VdiRecord } from '../../operations/operations.js';
import { whatIsLeft } from '../interrupted-fill.js';
import { closeAfter } from '../../system/close-after.js';
import { InterruptedError } from '../../system/interrupted-error.js';
import { checkPrefix, claimTarget, targetRecords } from './claim.js';
import { GoalCopier, type Migrated } from './goal-copier.js';
import { goalOf, presentGoal, readHistory, tagOf, unfinishedIn, type History } from './history.js';
import { beginRun, isMigrationMark, type MigrationOptions, type MigrationRun } from './migration-run.js';
import { openPresent } from './present.js';

export interface MigrationResult {
  readonly snapshots: readonly Migrated[];
  /** null if the source has snapshots only. */
  readonly working: Migrated | null;
  /** The target has no mark of the migration any more: it is an ordinary VDI. */
  readonly isFinished: boolean;
}

export class Migration {
  readonly #migration: MigrationRun;
  readonly #copier: GoalCopier;
  readonly #done = new Map<string, Migrated>();
  /** The target has our mark: after a failure the next run continues. */
  #hasClaimed = false;
  /** The working VDI of the target, once its mark is being removed. */
  #finishing: VdiRecord | undefined;

  constructor(source: Operations, target: Operations, options: MigrationOptions) {
    this.#migration = beginRun(source, target, options);
    this.#copier = new GoalCopier(this.#migration);
  }

  /** Errors: MISMATCH (both sides differ where they should not), and those of reading the history, claiming and copying. */
  async run(): Promise<MigrationResult> {
    try {
      return await this.#migrateAll();
    } catch (error) {
      throw this.#hasClaimed ? await this.#afterFailure(error) : error;
    }
  }

  /** What to throw after a failure, with what is left in the target. */
  async #afterFailure(error: unknown): Promise<unknown> {
    const { newName } = this.#migration.options;
    const where = `in ${this.#migration.target.store}`;
    const rest = this.#finishing
      ? `${where}, ${await whatIsLeft(this.#migration.target, this.#finishing, { isFinishing: true })}`
      : `${newName} ${where} is not complete; the same command continues it`;
    if (error instanceof InterruptedError) this.#migration.options.log(rest);
    const expected = asOperationError(error);
    if (!expected || expected.code === 'MISMATCH') return error;
    return new OperationError(expected.code, `${expected.message}; ${rest}`, { cause: error });
  }

  async #migrateAll(): Promise<MigrationResult> {
    let history = await readHistory(this.#migration);
    if (this.#migration.options.verify === 'only') return this.#verifyOnly(history);
    await claimTarget(this.#migration, history);
    this.#hasClaimed = true;
    for (;;) {
      await this.#migrateSnapshots(history);
      if (!history.working) return this.#finish(history, null);
      const { working } = history;
      const present = await openPresent(this.#migration, working);
      const result = await closeAfter(present, async () => {
        const now = await readHistory(this.#migration);
        // Snapshots that were taken meanwhile are older than the content just opened, so they are migrated first.
        const known = new Set(history.snapshots.map(({ vid }) => vid));
        if (now.snapshots.some(({ vid }) => !known.has(vid))) {
          history = now;
          return undefined;
        }
        return this.#finish(
          history,
          await this.#copier.migrate(presentGoal(history, working, present, this.#migration.sourceSpec)),
        );
      });
      if (result) return result;
    }
  }

  async #migrateSnapshots(history: History): Promise<void> {
    const { newName } = this.#migration.options;
    for (const [n, snapshot] of history.snapshots.entries()) {
      const tag = tagOf(history, snapshot);
      if (this.#done.has(tag)) continue;
      const goal = goalOf(history, n);
      const found = (await targetRecords(this.#migration)).find((record) => record.isSnapshot && record.tag === tag);
      if (found) {
        // With the same time it is the same snapshot, and was compared before it got its tag.
        const isTrusted = this.#migration.options.verify === 'changed' && found.snapshotAt === snapshot.snapshotAt;
        const label = `${newName}@${tag}`;
        this.#done.set(tag, isTrusted ? await this.#copier.trust(goal, label) : await this.#copier.verify(goal, label));
        this.#copier.forgetUnused(history, n);
        continue;
      }
      const migrated = await this.#copier.migrate(goal);
      await this.#migration.target.snapshot(newName, tag, { takenAt: snapshot.snapshotAt, run: this.#migration.run });
      this.#done.set(tag, migrated);
      this.#copier.forgetUnused(history, n);
    }
  }

  async #finish(history: History, present: Migrated | null): Promise<MigrationResult> {
    const { target, options, run, migratedTag } = this.#migration;
    const { newName, sync } = options;
    const { snapshots, working } = history;
    if (sync && working) await target.snapshot(newName, migratedTag, { run });
    // With `sync` the next run continues from here, whether this step succeeded or not.
    if (!sync)
      this.#finishing = (await targetRecords(this.#migration)).find(({ unfinished }) => unfinished?.run === run);
    if (working) await target.finish(newName, run);
    // As in the source: the VDI was deleted, and its snapshots are left.
    else await target.remove(newName, { run });
    this.#hasClaimed = sync;
    return {
      snapshots: snapshots.map((snapshot) => this.#done.get(tagOf(history, snapshot)) as Migrated),
      working: present,
      isFinished: !sync || !working,
    };
  }

  /** Compare everything, and write nothing. Errors: MISMATCH, UNFINISHED, CHANGED. */
  async #verifyOnly(history: History): Promise<MigrationResult> {
    const { newName } = this.#migration.options;
    const records = await targetRecords(this.#migration);
    const missing = (what: string): OperationError =>
      new OperationError(
        'MISMATCH',
        `${this.#migration.target.store} has no ${what}, but ${this.#migration.source.store} has it`,
      );
    if (records.length === 0) throw missing(newName);
    const unfinished = records.find((record) => record.unfinished);
    if (unfinished) throw await unfinishedIn(this.#migration.target, unfinished, records);
    checkPrefix(this.#migration, history, records);
    for (const [n, snapshot] of history.snapshots.entries()) {
      const tag = tagOf(history, snapshot);
      if (!records.some((record) => record.isSnapshot && record.tag === tag)) throw missing(`${newName}@${tag}`);
      this.#done.set(tag, await this.#copier.verify(goalOf(history, n), `${newName}@${tag}`));
      this.#copier.forgetUnused(history, n);
    }
    let present: Migrated | null = null;
    if (history.working) {
      if (!records.some(({ isSnapshot }) => !isSnapshot)) throw missing(newName);
      const { working } = history;
      const opened = await openPresent(this.#migration, working);
      present = await closeAfter(opened, () =>
        this.#copier.verify(presentGoal(history, working, opened, this.#migration.sourceSpec), newName),
      );
    }
    const isFinished = !records.some(({ tag }) => isMigrationMark(tag));
    return {
      snapshots: history.snapshots.map((snapshot) => this.#done.get(tagOf(history, snapshot)) as Migrated),
      working: present,
      isFinished,
    };
  }
}
