/**
 * One goal (history.ts): a snapshot or the present content, carried to the target: copied where it differs from what is
 * there, and compared. Owns the hashes that later snapshots are compared with, and the choice of the branch that the target
 * continues.
 */
import { OperationError, type Disk, type Operations } from '../../operations/operations.js';
import { closeAfter } from '../../system/close-after.js';
import { BlockHashes } from '../block-hashes.js';
import { compare, describeDifferences, makeSame, Units, UNIT_BYTES, type Fingerprint } from '../disk-difference.js';
import { diskSha256 } from '../image-sha256.js';
import { withProgress, type Progress } from '../reporting.js';
import { targetRecords } from './claim.js';
import { baseOf, type Goal, type History } from './history.js';
import { isMigrationMark, type MigrationRun } from './migration-run.js';

/** The result for one snapshot, or for the present content. Sizes are in bytes. */
export interface Migrated {
  /** In the target; null for the present content. */
  readonly tag: string | null;
  /** Its name in the source, if it has another tag there. */
  readonly renamedFrom?: string;
  readonly size: number;
  readonly copiedBytes: number;
  readonly zeroedBytes: number;
  /** Bytes that were read on both sides and compared. */
  readonly comparedBytes: number;
  /** BlockHashes.treeHash, over blocks of treeBlockBytes; null if not all of it was read. */
  readonly treeHash: string | null;
  readonly treeBlockBytes: number;
  /** Of the whole image in the target, as sha256sum computes it; null if not requested. */
  readonly sha256: string | null;
}

interface ComparedUnits {
  readonly fingerprint: Fingerprint;
  readonly bytes: number;
}

export class GoalCopier {
  readonly #migration: MigrationRun;
  /** By tag in the target, of snapshots that a later one is compared with. */
  readonly #fingerprints = new Map<string, Fingerprint>();

  constructor(migration: MigrationRun) {
    this.#migration = migration;
  }

  /** Make the working VDI of the target read as the goal, and compare. */
  async migrate(goal: Goal): Promise<Migrated> {
    const { target: store, options, run } = this.#migration;
    const { newName, signal } = options;
    await this.#chooseBranch(goal);
    const working = (await targetRecords(this.#migration)).find(({ isSnapshot }) => !isSnapshot);
    if (working && working.size !== goal.size) {
      await store.resize(newName, goal.size, { force: true, run });
    }
    return this.#withDisks(goal, newName, run, async (source, target) => {
      const units = await this.#unitsOf(goal, source, target, newName, UNIT_BYTES);
      const written = await this.#withProgress(`copying ${goal.label}`, units.bytes, (progress) =>
        makeSame(source, target, units, { progress, signal }),
      );
      await target.flush();
      const compared = await this.#compare(goal, source, target, newName, 'start again to copy it again');
      return migratedOf(goal, compared, await this.#sha256Of(target, goal), written);
    });
  }

  /**
   * Where the history of the source branches, the target is rolled back to the same snapshot, so that it shares the same
   * objects. It is not rolled back if an earlier run has already brought its working VDI closer to the goal.
   */
  async #chooseBranch({ base, spec, size }: Goal): Promise<void> {
    const { source, target, options, run } = this.#migration;
    const { newName } = options;
    if (!base) return;
    const records = (await targetRecords(this.#migration)).filter(
      ({ tag, isTemporary }) => !isMigrationMark(tag) && !isTemporary,
    );
    const last = records.filter(({ isSnapshot }) => isSnapshot).sort((a, b) => b.snapId - a.snapId)[0];
    if (!last || last.tag === base.tag) return;
    const working = records.find(({ isSnapshot }) => !isSnapshot);
    const wanted = await this.#bytesChanged(source, spec, size, base.spec);
    const found = await this.#bytesChanged(target, newName, working?.size ?? 0, `${newName}@${base.tag}`);
    if (found > wanted) await target.rollback(`${newName}@${base.tag}`, { run });
  }

  async #bytesChanged(operations: Operations, spec: string, size: number, since: string): Promise<number> {
    const units = new Units(size);
    await units.markPages((offset) => operations.changes(spec, since, offset), this.#migration.options.signal);
    return units.bytes;
  }

  /** Compare the goal on both sides, and write nothing. Errors: MISMATCH. */
  async verify(goal: Goal, targetSpec: string): Promise<Migrated> {
    return this.#withDisks(goal, targetSpec, undefined, async (source, target) => {
      if (target.size !== goal.size) {
        throw new OperationError(
          'MISMATCH',
          `${targetSpec} in ${this.#migration.target.store} has ${target.size} bytes, ${goal.spec} in ${this.#migration.source.store} has ${goal.size}`,
        );
      }
      const remedy =
        goal.tag === undefined
          ? 'one of them was written since the migration'
          : 'to copy it again, delete it and the snapshots after it in the target, and start again';
      const compared = await this.#compare(goal, source, target, targetSpec, remedy);
      return migratedOf(goal, compared, await this.#sha256Of(target, goal));
    });
  }

  /** An earlier run has compared it. */
  async trust(goal: Goal, targetSpec: string): Promise<Migrated> {
    if (!this.#migration.options.sha256) return trusted(goal, null);
    const target = await this.#migration.target.openDisk(targetSpec);
    return closeAfter(target, async () => trusted(goal, await this.#sha256Of(target, goal)));
  }

  /** null if not requested. */
  async #sha256Of(disk: Disk, { label }: Goal): Promise<string | null> {
    const { sha256, signal } = this.#migration.options;
    if (!sha256) return null;
    return this.#withProgress(`SHA-256 of ${label}`, disk.size, (progress) => diskSha256(disk, { progress, signal }));
  }

  /** `run`: of this migration, if the target is written. */
  async #withDisks<T>(
    goal: Goal,
    targetSpec: string,
    run: string | undefined,
    work: (source: Disk, target: Disk) => Promise<T>,
  ): Promise<T> {
    const source = await this.#migration.source.openDisk(goal.spec);
    return closeAfter(source, async () => {
      const target = await this.#migration.target.openDisk(targetSpec, { run });
      return closeAfter(target, () => work(source, target));
    });
  }

  /** Where the two may differ: where either differs from a base that both have; without a base, where either has data. */
  async #unitsOf(goal: Goal, source: Disk, target: Disk, targetSpec: string, unitBytes: number): Promise<Units> {
    const { newName, signal } = this.#migration.options;
    const { base, spec, size } = goal;
    const units = new Units(size, unitBytes);
    if (base) {
      await units.markPages((offset) => this.#migration.source.changes(spec, base.spec, offset), signal);
      await units.markPages(
        (offset) => this.#migration.target.changes(targetSpec, `${newName}@${base.tag}`, offset),
        signal,
      );
      // The unit at the end of the smaller one is longer in the other.
      if (base.size !== size) units.mark(Math.min(base.size, size) - 1, 1);
    } else {
      await units.markPages((offset) => source.dataPage(offset), signal);
      await units.markPages((offset) => target.dataPage(offset), signal);
    }
    return units;
  }

  /** Errors: MISMATCH. */
  async #compare(goal: Goal, source: Disk, target: Disk, targetSpec: string, remedy: string): Promise<ComparedUnits> {
    const { signal } = this.#migration.options;
    const units = await this.#unitsOf(goal, source, target, targetSpec, goal.blockBytes);
    const before = goal.base && this.#fingerprints.get(goal.base.tag);
    const hashes = new BlockHashes(goal.size, goal.blockBytes, before?.hashes);
    const fingerprint: Fingerprint = { hashes, isWhole: !goal.base || before?.isWhole === true };
    const differing = await this.#withProgress(`comparing ${goal.label}`, units.bytes, (progress) =>
      compare(source, target, units, hashes, { progress, signal }),
    );
    if (differing.length > 0) {
      const where = await describeDifferences(source, target, differing);
      throw new OperationError(
        'MISMATCH',
        `${targetSpec} in ${this.#migration.target.store} is not the same as ${goal.spec} in ${this.#migration.source.store}: ${where}; ${remedy}`,
      );
    }
    if (goal.tag !== undefined) this.#fingerprints.set(goal.tag, fingerprint);
    return { fingerprint, bytes: units.bytes };
  }

  /** Keep the hashes of bases that are still needed, and drop the others. */
  forgetUnused(history: History, done: number): void {
    const needed = new Set<string>();
    for (let n = done + 1; n <= history.snapshots.length; n++) {
      const base = baseOf(history, n);
      if (base) needed.add(base.tag);
    }
    for (const tag of this.#fingerprints.keys()) if (!needed.has(tag)) this.#fingerprints.delete(tag);
  }

  #withProgress<T>(what: string, total: number, work: (progress: Progress) => Promise<T>): Promise<T> {
    return withProgress(this.#migration.options.progress(what, total), work);
  }
}

function migratedOf(
  { tag, renamedFrom, size, blockBytes }: Goal,
  { fingerprint, bytes }: ComparedUnits,
  sha256: string | null,
  { copiedBytes, zeroedBytes } = { copiedBytes: 0, zeroedBytes: 0 },
): Migrated {
  const treeHash = fingerprint.isWhole ? fingerprint.hashes.treeHash : null;
  const hashes = { treeHash, treeBlockBytes: blockBytes, sha256 };
  return { ...named(tag, renamedFrom), size, copiedBytes, zeroedBytes, comparedBytes: bytes, ...hashes };
}

function trusted({ tag, renamedFrom, size, blockBytes }: Goal, sha256: string | null): Migrated {
  const hashes = { treeHash: null, treeBlockBytes: blockBytes, sha256 };
  return { ...named(tag, renamedFrom), size, copiedBytes: 0, zeroedBytes: 0, comparedBytes: 0, ...hashes };
}

function named(tag: string | undefined, renamedFrom: string | undefined): Pick<Migrated, 'tag' | 'renamedFrom'> {
  return { tag: tag ?? null, ...(renamedFrom === undefined ? {} : { renamedFrom }) };
}
