/**
 * A VDI with its history, carried from one store to another: in which order, what marks the target until it is complete,
 * and from where an interrupted run goes on. Owns those marks. It knows stores as Operations only, so that it is the same
 * through a daemon or not, on a cluster or not; the bytes are disk-difference.ts's.
 *
 * From before its first write to the end of a run the target is marked as unfinished, by this migration: nobody else opens
 * it, and its content may be written over. Between two runs a snapshot, NAME@migrated-ID, shows whether anybody has written
 * since. A snapshot of the history gets its tag after it was compared: what has its tag is complete.
 */
import { createHash, randomBytes } from 'node:crypto';
import { blockBytesOf, BlockHashes } from './block-hashes.js';
import { diskSha256 } from './image-sha256.js';
import {
  asOperationError,
  OperationError,
  type Disk,
  type Operations,
  type VdiRecord,
} from '../operations/operations.js';
import { whatIsLeft } from './interrupted-fill.js';
import { formatSpec, labelOfRun, specOf } from '../vdi/names.js';
import { bytesOfText } from '../text/name-bytes.js';
import type { Redundancy } from '../store/object-store.js';
import { directoryOf, kindOf } from '../store/locations.js';
import { describeUnfinished, isOfSame } from '../vdi/unfinished.js';
import { carriedTags } from './carried-tags.js';
import { closeAfter } from '../system/close-after.js';
import {
  compare,
  describeDifferences,
  makeSame,
  Units,
  UNIT_BYTES,
  type Fingerprint,
  type Work,
} from './disk-difference.js';
import { InterruptedError } from '../cli/interrupt.js';
import { printNote } from '../cli/output.js';
import { startProgress } from '../cli/progress.js';

/** What is read again when it is said to be there: everything; only what this run copies; everything, copying nothing. */
export type Verify = 'all' | 'changed' | 'only';

export interface MigrationOptions {
  readonly name: string;
  /** Its name in the target. */
  readonly newName: string;
  /** Snapshots whose tags the target cannot have get others. */
  readonly renamesTags?: boolean;
  /** More runs follow: leave the mark that lets them go on. */
  readonly sync: boolean;
  readonly verify: Verify;
  /** Compute the SHA-256 of the images. */
  readonly sha256: boolean;
  /** The source may only be read. */
  readonly isReadOnly: boolean;
  /** Of the target, if that is a cluster and has no such VDI yet. */
  readonly redundancy?: Redundancy | undefined;
  /** Of the objects in the target, if it is made: undefined for what the target takes, or the source has. */
  readonly blockSizeShift?: number | undefined;
  /** Also if a client that was cut off from the target may come back. */
  readonly force?: boolean | undefined;
  readonly signal: AbortSignal;
}

/** What became of one snapshot, or of the present content. Sizes in bytes. */
export interface Migrated {
  /** In the target; null for the present content. */
  readonly tag: string | null;
  /** How the source says it, if it had another tag there. */
  readonly renamedFrom?: string;
  readonly size: number;
  readonly copiedBytes: number;
  readonly zeroedBytes: number;
  /** Read on both sides and compared. */
  readonly comparedBytes: number;
  /** BlockHashes.treeHash, over blocks of so many bytes; null if not all of it was read. */
  readonly treeHash: string | null;
  readonly treeBlockBytes: number;
  /** Of the whole image in the target, as sha256sum says it; null if it was not asked for. */
  readonly sha256: string | null;
}

export interface MigrationResult {
  readonly snapshots: readonly Migrated[];
  /** null if the source has snapshots only. */
  readonly working: Migrated | null;
  /** No mark is left: the target is an ordinary VDI. */
  readonly isFinished: boolean;
}

interface History {
  /** Oldest first. */
  readonly snapshots: readonly VdiRecord[];
  readonly working: VdiRecord | undefined;
  /** What the snapshots are called in the target, by their vids. */
  readonly tags: ReadonlyMap<number, string>;
}

/** What the target is to become next. */
interface Goal {
  /** An export of the source. */
  readonly spec: string;
  /** In the target; undefined: the present content. */
  readonly tag: string | undefined;
  readonly renamedFrom?: string | undefined;
  readonly size: number;
  /** Of the blocks that are compared. */
  readonly blockBytes: number;
  readonly takenAt: number;
  /** A snapshot that both sides have, and from which this differs as little as is known. */
  readonly base: Base | undefined;
  /** For people. */
  readonly label: string;
}

/** A snapshot of the source: how that says it, and its tag in the target. */
interface Base {
  readonly spec: string;
  readonly tag: string;
  readonly size: number;
}

interface Present {
  readonly spec: string;
  readonly size: number;
  close(): Promise<void>;
}

const ID_DIGITS = 12;
const RUN_BYTES = 8;
const MIGRATED = 'migrated-';
/** Of the source, while its present content is read and a temporary snapshot is not possible. */
const READING = 'migrate-';
const MARK = new RegExp(`^${MIGRATED}[0-9a-f]{${ID_DIGITS}}$`);
const READING_MARK = new RegExp(`^${READING}[0-9a-f]{${ID_DIGITS}}$`);

export class Migration {
  readonly #source: Operations;
  readonly #target: Operations;
  readonly #options: MigrationOptions;
  /** In the mark of the target: which migration it is, and which run of it. */
  readonly #id: string;
  readonly #run = randomBytes(RUN_BYTES).toString('hex');
  readonly #migrated: string;
  readonly #reading: string;
  readonly #label: string;
  /** How the source says the VDI. */
  readonly #said: string;
  /** By tag in the target, of snapshots that a later one is compared with. */
  readonly #fingerprints = new Map<string, Fingerprint>();
  readonly #done = new Map<string, Migrated>();
  /** From here on the target bears our mark: a failure can be mended by starting again. */
  #hasClaimed = false;
  /** The working VDI of the target, from when its mark is being taken away. */
  #finishing: VdiRecord | undefined;

  constructor(source: Operations, target: Operations, options: MigrationOptions) {
    this.#source = source;
    this.#target = target;
    this.#options = options;
    this.#said = formatSpec({ name: options.name, tag: undefined });
    this.#id = idOf(source.identity, options.name);
    this.#migrated = MIGRATED + this.#id;
    // Two runs to two targets read from snapshots of their own.
    this.#reading = READING + idOf(source.identity, options.name, target.identity, options.newName);
    // A run that was killed may still have its snapshot: this one takes its own.
    this.#label = labelOfRun(this.#reading);
  }

  /** Errors: OperationError; MISMATCH if both sides are not the same where they should be. */
  async run(): Promise<MigrationResult> {
    try {
      return await this.#migrateAll();
    } catch (error) {
      throw this.#hasClaimed ? await this.#afterFailure(error) : error;
    }
  }

  /** What to throw when it has failed: with what is left in the target. */
  async #afterFailure(error: unknown): Promise<unknown> {
    const { newName } = this.#options;
    const where = `in ${this.#target.store}`;
    const rest = this.#finishing
      ? `${where}, ${await whatIsLeft(this.#target, this.#finishing, { isFinishing: true })}`
      : `${newName} ${where} is not complete, and the same command goes on from there`;
    if (error instanceof InterruptedError) printNote(rest);
    const expected = asOperationError(error);
    if (!expected || expected.code === 'MISMATCH') return error;
    return new OperationError(expected.code, `${expected.message}; ${rest}`, { cause: error });
  }

  async #migrateAll(): Promise<MigrationResult> {
    let history = await this.#history();
    if (this.#options.verify === 'only') return this.#verifyOnly(history);
    await this.#claim(history);
    for (;;) {
      await this.#migrateSnapshots(history);
      if (!history.working) return this.#finish(history, null);
      const { working } = history;
      const present = await this.#openPresent(working);
      const result = await closeAfter(present, async () => {
        const now = await this.#history();
        // Taken since we looked: older than what we have just opened, so they come first.
        const known = new Set(history.snapshots.map(({ vid }) => vid));
        if (now.snapshots.some(({ vid }) => !known.has(vid))) {
          history = now;
          return undefined;
        }
        return this.#finish(history, await this.#migrate(this.#presentGoal(history, working, present)));
      });
      if (result) return result;
    }
  }

  /** What there is to migrate. Errors: NO_VDI, BAD_NAME, UNSUPPORTED. */
  async #history(): Promise<History> {
    const { name, renamesTags = false } = this.#options;
    const records = (await this.#source.list()).filter((record) => record.name === name);
    const { store } = this.#source;
    const mark = records.find(({ tag }) => MARK.test(tag));
    if (mark) {
      throw new OperationError(
        'UNFINISHED',
        `${this.#said} in ${store} is itself the unfinished target of a migration (it has the snapshot ${specOf(mark)}); finish that one first`,
      );
    }
    const unfinished = records.find((record) => record.unfinished);
    if (unfinished) throw await unfinishedIn(this.#source, unfinished, records);
    const snapshots = records
      .filter(({ isSnapshot, isTemporary, tag }) => isSnapshot && !isTemporary && !READING_MARK.test(tag))
      .sort((a, b) => a.snapId - b.snapId);
    const working = records.find(({ isSnapshot }) => !isSnapshot);
    if (snapshots.length === 0 && !working) {
      throw new OperationError(
        'NO_VDI',
        `no VDI named "${name}" in ${this.#source.store}; 'sheepgate vdi list' shows what is there`,
      );
    }
    const { store: place } = this.#target;
    const tags = carriedTags(snapshots, { place, takesNumbersForIds: kindOf(place).takesNumbersForIds, renamesTags });
    return { snapshots, working, tags };
  }

  async #targetRecords(): Promise<VdiRecord[]> {
    return (await this.#target.list()).filter((record) => record.name === this.#options.newName);
  }

  /** Make the target ours, or find that it is. Errors: EXISTS, BUSY, CHANGED. */
  async #claim(history: History): Promise<void> {
    const { newName, redundancy, force } = this.#options;
    const first = history.snapshots[0] ?? (history.working as VdiRecord);
    const records = await this.#targetRecords();
    const working = records.find(({ isSnapshot }) => !isSnapshot);
    const isOurs = isOfSame(working?.unfinished, { by: 'migrate', of: this.#id });
    const isBetweenRuns = records.some(({ tag }) => tag === this.#migrated);
    // Half of something else now, whatever it was before.
    if (working?.unfinished && !isOurs) throw this.#foreign(records);
    const isKnown = isOurs || isBetweenRuns;
    if (isKnown && !working) {
      throw new OperationError(
        'UNFINISHED',
        `${newName} in ${this.#target.store} lacks its working VDI, without which its history cannot go on; delete its snapshots there and start again`,
      );
    }
    try {
      await this.#target.begin(newName, {
        by: 'migrate',
        of: this.#id,
        run: this.#run,
        size: first.size,
        blockSizeShift: this.#options.blockSizeShift,
        likeShift: first.blockSizeShift,
        largestSize: history.snapshots.reduce(
          (most, { size }) => Math.max(most, size),
          (history.working ?? first).size,
        ),
        redundancy,
        // What a run before this one has brought to its end, or what nobody loses anything with.
        overwrites: isBetweenRuns || (records.length === 1 && (await this.#isUntouched(working, first))),
        goesOn: true,
        force,
      });
    } catch (error) {
      const { code, message } = asOperationError(error) ?? {};
      if (code === 'EXISTS') throw this.#foreign(records);
      // There are two stores.
      if (code !== undefined) throw new OperationError(code, `in ${this.#target.store}, ${message}`, { cause: error });
      throw error;
    }
    if (isKnown) await this.#checkGoesOn(history, isBetweenRuns);
    if (isBetweenRuns) await this.#target.remove(`${newName}@${this.#migrated}`);
    this.#hasClaimed = true;
  }

  async #isUntouched(working: VdiRecord | undefined, like: VdiRecord): Promise<boolean> {
    if (!working || working.unfinished) return false;
    if (working.size !== like.size || working.blockSizeShift !== like.blockSizeShift) return false;
    const { allocatedBytes, open } = await this.#target.show(working.name);
    return allocatedBytes === 0 && open === 0;
  }

  /**
   * As long as the snapshot between two runs is there, no run has written since it was taken: whatever has changed was
   * changed by somebody else, also if a run that was cut off has set its mark already. Errors: CHANGED if the target is not
   * what a run before this one has left; it is whole then, for whoever wrote it.
   */
  async #checkGoesOn(history: History, isBetweenRuns: boolean): Promise<void> {
    try {
      await this.#checkPrefix(history, await this.#targetRecords());
      if (isBetweenRuns) await this.#refuseIfChanged();
    } catch (error) {
      // If that fails as well, the next run finds what this one has found.
      if (isBetweenRuns) await this.#target.finish(this.#options.newName, this.#run).catch(() => undefined);
      throw error;
    }
  }

  #foreign(records: readonly VdiRecord[]): OperationError {
    const { newName } = this.#options;
    const mark = records.find(({ tag }) => MARK.test(tag));
    const unfinished = records.find((record) => record.unfinished)?.unfinished;
    let why = 'exists, and it is no unfinished migration of this one: nothing was touched';
    if (unfinished) why = `is unfinished, of another migration or another command (${unfinished.by})`;
    else if (mark) why = `is the unfinished target of another migration (it has the snapshot ${newName}@${mark.tag})`;
    return new OperationError(
      'EXISTS',
      `${newName} in ${this.#target.store} ${why}; give another name with --as, or delete it with its snapshots`,
    );
  }

  /** The snapshots of the target must be the first ones of the source. */
  async #checkPrefix(history: History, records: readonly VdiRecord[]): Promise<void> {
    const { newName } = this.#options;
    const there = records.filter(({ isSnapshot, isTemporary, tag }) => isSnapshot && !MARK.test(tag) && !isTemporary);
    there.sort((a, b) => a.snapId - b.snapId);
    for (const [n, { tag }] of there.entries()) {
      const expected = history.snapshots[n];
      if (expected && history.tags.get(expected.vid) === tag) continue;
      throw new OperationError(
        'CHANGED',
        `${newName}@${tag} in ${this.#target.store} is not the ${ordinal(n)} snapshot of ${this.#said} in ${this.#source.store} (any more); delete it in the target if it is not wanted, and start again`,
      );
    }
  }

  async #refuseIfChanged(): Promise<void> {
    const { newName } = this.#options;
    const mark = `${newName}@${this.#migrated}`;
    const { ranges } = await this.#target.changes(newName, mark, 0);
    if (ranges.length === 0) return;
    throw new OperationError(
      'CHANGED',
      `${newName} in ${this.#target.store} was written by somebody else since the last run, and migrating it again would undo that; to keep it as it is, delete ${mark}; to start again, delete it with its snapshots`,
    );
  }

  async #migrateSnapshots(history: History): Promise<void> {
    const { newName } = this.#options;
    for (const [n, snapshot] of history.snapshots.entries()) {
      const tag = tagOf(history, snapshot);
      if (this.#done.has(tag)) continue;
      const goal = this.#goalOf(history, n);
      const found = (await this.#targetRecords()).find((record) => record.isSnapshot && record.tag === tag);
      if (found) {
        // Of the same time it is the same one, and was compared before it got its tag.
        const isTrusted = this.#options.verify === 'changed' && found.snapshotAt === snapshot.snapshotAt;
        const label = `${newName}@${tag}`;
        this.#done.set(tag, isTrusted ? await this.#trust(goal, label) : await this.#verify(goal, label));
        this.#forgetUnused(history, n);
        continue;
      }
      const migrated = await this.#migrate(goal);
      await this.#target.snapshot(newName, tag, { takenAt: snapshot.snapshotAt, run: this.#run });
      this.#done.set(tag, migrated);
      this.#forgetUnused(history, n);
    }
  }

  #goalOf(history: History, n: number): Goal {
    const snapshot = history.snapshots[n] as VdiRecord;
    const { size, blockSizeShift, snapshotAt } = snapshot;
    const spec = specOf(snapshot);
    const tag = tagOf(history, snapshot);
    const renamedFrom = tag === snapshot.tag ? undefined : spec;
    const blockBytes = blockBytesOf(blockSizeShift);
    return { spec, tag, renamedFrom, size, blockBytes, takenAt: snapshotAt, base: baseOf(history, n), label: spec };
  }

  #presentGoal(history: History, { blockSizeShift }: VdiRecord, { spec, size }: Present): Goal {
    const base = baseOf(history, history.snapshots.length);
    return {
      spec,
      tag: undefined,
      size,
      blockBytes: blockBytesOf(blockSizeShift),
      takenAt: 0,
      base,
      label: this.#said,
    };
  }

  /** Make the working VDI of the target read as the goal, and compare. */
  async #migrate(goal: Goal): Promise<Migrated> {
    const { newName, signal } = this.#options;
    await this.#chooseBranch(goal);
    const working = (await this.#targetRecords()).find(({ isSnapshot }) => !isSnapshot);
    if (working && working.size !== goal.size) {
      await this.#target.resize(newName, goal.size, { force: true, run: this.#run });
    }
    return this.#withDisks(goal, newName, this.#run, async (source, target) => {
      const units = await this.#unitsOf(goal, source, target, newName, UNIT_BYTES);
      const written = await withProgress(`copying ${goal.label}`, units, signal, (work) =>
        makeSame(source, target, units, work),
      );
      await target.flush();
      const compared = await this.#compare(goal, source, target, newName, 'start again to copy that anew');
      return migratedOf(goal, compared, await this.#sha256Of(target, goal), written);
    });
  }

  /**
   * Where the history branches the target does too: it then shares what the source shares. A working VDI that is closer to
   * the goal already, from a run before this one, is not put back.
   */
  async #chooseBranch({ base, spec, size }: Goal): Promise<void> {
    const { newName } = this.#options;
    if (!base) return;
    const records = (await this.#targetRecords()).filter(({ tag, isTemporary }) => !MARK.test(tag) && !isTemporary);
    const last = records.filter(({ isSnapshot }) => isSnapshot).sort((a, b) => b.snapId - a.snapId)[0];
    if (!last || last.tag === base.tag) return;
    const working = records.find(({ isSnapshot }) => !isSnapshot);
    const wanted = await this.#bytesChanged(this.#source, spec, size, base.spec);
    const found = await this.#bytesChanged(this.#target, newName, working?.size ?? 0, `${newName}@${base.tag}`);
    if (found > wanted) await this.#target.rollback(`${newName}@${base.tag}`, { run: this.#run });
  }

  async #bytesChanged(operations: Operations, spec: string, size: number, since: string): Promise<number> {
    const units = new Units(size);
    await units.markPages((offset) => operations.changes(spec, since, offset), this.#options.signal);
    return units.bytes;
  }

  /** Read the goal on both sides. */
  async #verify(goal: Goal, targetSpec: string): Promise<Migrated> {
    return this.#withDisks(goal, targetSpec, undefined, async (source, target) => {
      if (target.size !== goal.size) {
        throw new OperationError(
          'MISMATCH',
          `${targetSpec} in ${this.#target.store} has ${target.size} bytes, ${goal.spec} in ${this.#source.store} has ${goal.size}`,
        );
      }
      const remedy =
        goal.tag === undefined
          ? 'one of them was written since'
          : 'to copy it anew, delete it and the snapshots after it in the target, and start again';
      const compared = await this.#compare(goal, source, target, targetSpec, remedy);
      return migratedOf(goal, compared, await this.#sha256Of(target, goal));
    });
  }

  /** It is there and was compared before. */
  async #trust(goal: Goal, targetSpec: string): Promise<Migrated> {
    if (!this.#options.sha256) return trusted(goal, null);
    const target = await this.#target.openDisk(targetSpec);
    return closeAfter(target, async () => trusted(goal, await this.#sha256Of(target, goal)));
  }

  /** null if it was not asked for. */
  async #sha256Of(disk: Disk, { label }: Goal): Promise<string | null> {
    const { sha256, signal } = this.#options;
    if (!sha256) return null;
    const progress = startProgress(`SHA-256 of ${label}`, disk.size);
    try {
      return await diskSha256(disk, { progress, signal });
    } finally {
      progress.end();
    }
  }

  /** `run`: it is written, and therefore ours. */
  async #withDisks<T>(
    goal: Goal,
    targetSpec: string,
    run: string | undefined,
    work: (source: Disk, target: Disk) => Promise<T>,
  ): Promise<T> {
    const source = await this.#source.openDisk(goal.spec);
    return closeAfter(source, async () => {
      const target = await this.#target.openDisk(targetSpec, { run });
      return closeAfter(target, () => work(source, target));
    });
  }

  /** Where the two may differ: where either differs from a base that both have, or else where either has data. */
  async #unitsOf(goal: Goal, source: Disk, target: Disk, targetSpec: string, unitBytes: number): Promise<Units> {
    const { newName, signal } = this.#options;
    const { base, spec, size } = goal;
    const units = new Units(size, unitBytes);
    if (base) {
      await units.markPages((offset) => this.#source.changes(spec, base.spec, offset), signal);
      await units.markPages((offset) => this.#target.changes(targetSpec, `${newName}@${base.tag}`, offset), signal);
      // The unit that is cut off by the end of one of them is another one in the other.
      if (base.size !== size) units.mark(Math.min(base.size, size) - 1, 1);
    } else {
      await units.markPages((offset) => source.dataPage(offset), signal);
      await units.markPages((offset) => target.dataPage(offset), signal);
    }
    return units;
  }

  /** Errors: MISMATCH. */
  async #compare(goal: Goal, source: Disk, target: Disk, targetSpec: string, remedy: string): Promise<ComparedUnits> {
    const { signal } = this.#options;
    const units = await this.#unitsOf(goal, source, target, targetSpec, goal.blockBytes);
    const before = goal.base && this.#fingerprints.get(goal.base.tag);
    const hashes = new BlockHashes(goal.size, goal.blockBytes, before?.hashes);
    const fingerprint: Fingerprint = { hashes, isWhole: !goal.base || before?.isWhole === true };
    const differing = await withProgress(`comparing ${goal.label}`, units, signal, (work) =>
      compare(source, target, units, hashes, work),
    );
    if (differing.length > 0) {
      const where = await describeDifferences(source, target, differing);
      throw new OperationError(
        'MISMATCH',
        `${targetSpec} in ${this.#target.store} is not the same as ${goal.spec} in ${this.#source.store}: ${where}; ${remedy}`,
      );
    }
    if (goal.tag !== undefined) this.#fingerprints.set(goal.tag, fingerprint);
    return { fingerprint, bytes: units.bytes };
  }

  /** Hashes are kept for what is still compared with them. */
  #forgetUnused(history: History, done: number): void {
    const needed = new Set<string>();
    for (let n = done + 1; n <= history.snapshots.length; n++) {
      const base = baseOf(history, n);
      if (base) needed.add(base.tag);
    }
    for (const tag of this.#fingerprints.keys()) if (!needed.has(tag)) this.#fingerprints.delete(tag);
  }

  /** The source's present content as a point in time. Errors: those of taking a snapshot. */
  async #openPresent(working: VdiRecord): Promise<Present> {
    const { name, isReadOnly, verify } = this.#options;
    const { size } = working;
    const source = this.#source;
    const isForeign = directoryOf(source.store) === undefined && !source.isDaemon;
    const said = this.#said;
    const asItIs = { spec: said, size, close: () => Promise.resolve() };
    if (isReadOnly || (isForeign && verify === 'only')) return asItIs;
    if (!isForeign) {
      // Nobody else writes it than whom we ask.
      const spec = `${said}@now:${this.#label}`;
      const disk = await source.openDisk(spec);
      return { spec, size: disk.size, close: () => disk.close() };
    }
    // Others may write it whom only a snapshot by the cluster's own means reaches.
    const spec = `${said}@${this.#reading}`;
    const left = (await source.list()).some((record) => record.name === name && record.tag === this.#reading);
    if (left) await source.remove(spec);
    let taken: VdiRecord;
    try {
      taken = await source.snapshot(said, this.#reading);
    } catch (error) {
      // A cluster of an old version is only read. Of it this is all that there is.
      if (asOperationError(error)?.code === 'READ_ONLY') return asItIs;
      throw error;
    }
    return { spec, size: taken.size, close: async () => void (await source.remove(spec)) };
  }

  async #finish(history: History, present: Migrated | null): Promise<MigrationResult> {
    const { newName, sync } = this.#options;
    const { snapshots, working } = history;
    const target = this.#target;
    const run = this.#run;
    if (sync && working) await target.snapshot(newName, this.#migrated, { run });
    // With `sync` the next run goes on from here, whether this step was its last or not.
    if (!sync) this.#finishing = (await this.#targetRecords()).find(({ unfinished }) => unfinished?.run === run);
    if (working) await target.finish(newName, run);
    // As in the source: a VDI that was deleted, and its snapshots.
    else await target.remove(newName, { run });
    this.#hasClaimed = sync;
    return {
      snapshots: snapshots.map((snapshot) => this.#done.get(tagOf(history, snapshot)) as Migrated),
      working: present,
      isFinished: !sync || !working,
    };
  }

  /** Compare all there is, and write nothing. */
  async #verifyOnly(history: History): Promise<MigrationResult> {
    const { newName } = this.#options;
    const records = await this.#targetRecords();
    const missing = (what: string): OperationError =>
      new OperationError('MISMATCH', `${this.#target.store} has no ${what}, which ${this.#source.store} has`);
    if (records.length === 0) throw missing(newName);
    const unfinished = records.find((record) => record.unfinished);
    if (unfinished) throw await unfinishedIn(this.#target, unfinished, records);
    await this.#checkPrefix(history, records);
    for (const [n, snapshot] of history.snapshots.entries()) {
      const tag = tagOf(history, snapshot);
      if (!records.some((record) => record.isSnapshot && record.tag === tag)) throw missing(`${newName}@${tag}`);
      this.#done.set(tag, await this.#verify(this.#goalOf(history, n), `${newName}@${tag}`));
      this.#forgetUnused(history, n);
    }
    let present: Migrated | null = null;
    if (history.working) {
      if (!records.some(({ isSnapshot }) => !isSnapshot)) throw missing(newName);
      const { working } = history;
      const opened = await this.#openPresent(working);
      present = await closeAfter(opened, () => this.#verify(this.#presentGoal(history, working, opened), newName));
    }
    const isFinished = !records.some(({ tag }) => MARK.test(tag));
    return {
      snapshots: history.snapshots.map((snapshot) => this.#done.get(tagOf(history, snapshot)) as Migrated),
      working: present,
      isFinished,
    };
  }
}

interface ComparedUnits {
  readonly fingerprint: Fingerprint;
  readonly bytes: number;
}

/**
 * What the nth snapshot, or the present content, is compared with: the snapshot it goes on from, which is another one than
 * the one before where the VDI was rolled back; or that one, if its origin is gone or another VDI's.
 */
function baseOf(history: History, n: number): Base | undefined {
  const { snapshots, working } = history;
  const parentVid = (snapshots[n] ?? working)?.parentVid;
  const before = snapshots.slice(0, n);
  const base = before.find(({ vid }) => vid === parentVid) ?? before.at(-1);
  return base && { spec: specOf(base), tag: tagOf(history, base), size: base.size };
}

/** In the target. */
function tagOf({ tags }: History, { vid }: VdiRecord): string {
  return tags.get(vid) as string;
}

async function withProgress<T>(
  what: string,
  units: Units,
  signal: AbortSignal,
  run: (work: Work) => Promise<T>,
): Promise<T> {
  const progress = startProgress(what, units.bytes);
  try {
    return await run({ progress, signal });
  } finally {
    progress.end();
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

function idOf(...parts: readonly string[]): string {
  return createHash('sha256')
    .update(bytesOfText(parts.join('\0')))
    .digest('hex')
    .slice(0, ID_DIGITS);
}

function ordinal(n: number): string {
  return ['first', 'second', 'third'][n] ?? `${n + 1}th`;
}

async function unfinishedIn(
  operations: Pick<Operations, 'store' | 'show'>,
  unfinished: VdiRecord,
  records: readonly VdiRecord[],
): Promise<OperationError> {
  const { open } = await operations.show(specOf(unfinished));
  const hasSnapshots = records.some(({ isSnapshot, isTemporary }) => isSnapshot && !isTemporary);
  const what = describeUnfinished(unfinished, { isAtWork: open > 0 || undefined, hasSnapshots });
  return new OperationError('UNFINISHED', `in ${operations.store} ${what}`);
}
