/**
 * One backup of a VDI: take a snapshot, copy what differs from the backup before, commit the copy as the newest backup, and keep
 * the snapshot as the base of the next backup. Owns the snapshots of the target in the source, their tags, and the order of
 * the steps: the old base is dropped only after the new backup is committed, so after a failure one of the two is usable.
 */
import path from 'node:path';
import {
  formatSpec,
  labelOfRun,
  OperationError,
  type Disk,
  type Operations,
  type VdiRecord,
} from '../../operations/operations.js';
import type { HostDisk } from '../../system/disk.js';
import { hostDisk } from '../../system/real-disk.js';
import { blockBytesOf, BlockHashes } from '../block-hashes.js';
import { copyAll, copyChanges, readBack, type Previous, type Source } from './copy-blocks.js';
import { MAX_POINTS, type BaseSnapshot, type Point } from './manifest.js';
import { PARTIAL } from './target-directory.js';
import { pathsOf, stemOf } from './target-paths.js';
import { BackupTarget } from './target.js';
import { withProgress, type JobContext } from '../reporting.js';
import type { WithStore } from '../with-store.js';
import { moveFile } from '../target-files.js';
import { whoIsBehind } from './who-is-behind.js';

export interface TakeOptions extends JobContext {
  /** NAME. */
  readonly vdi: string;
  /** Directory or image. */
  readonly to: string;
  /** The disk that `to` is on; this machine's by default. */
  readonly disk?: HostDisk;
  /** The number of backups to keep; undefined for all. An image holds one. */
  readonly keep: number | undefined;
  /** Take a full backup. */
  readonly isFull: boolean;
  /** Find changes by reading the whole disk. */
  readonly compares: boolean;
  /** Keep a snapshot for the next backup. */
  readonly keepsBase: boolean;
  /** Read back what was written. */
  readonly verifies: boolean;
  /** Called with the taking of the snapshot (FrozenMoment.during). */
  readonly moment: <T>(take: () => Promise<T>) => Promise<T>;
  /** Compute the SHA-256 of the image. */
  readonly sha256: boolean;
}

export interface Taken {
  readonly point: Point;
  /** What to open: the image, or the newest file of the directory. */
  readonly file: string;
  readonly kept: readonly number[];
  readonly dropped: readonly number[];
}

/**
 * The store is open only while it is needed: work on the target alone, which may take hours, is done before and after.
 * Errors: BASE_GONE, DAMAGED, BAD_TARGET, BUSY, NO_SPACE, and those of the store.
 */
export async function takeBackup(withStore: WithStore, given: TakeOptions): Promise<Taken> {
  const { to, isFull, log } = given;
  // First, so that a mistyped name does not leave a directory behind.
  const { store, vdi } = await withStore(async (operations) => {
    const { name } = await showWorking(operations, given.vdi);
    return { store: operations.store, vdi: formatSpec({ name, tag: undefined }) };
  });
  // The name may have been given in another form; the names of snapshots are made of this one.
  const options = { ...given, vdi };
  const { image } = pathsOf(options.disk ?? hostDisk, to);
  if (image !== undefined && options.keep !== undefined && options.keep !== 1) {
    throw new OperationError(
      'BAD_USAGE',
      `${to} is an image, which holds only the newest backup; --keep ${options.keep} needs a directory`,
    );
  }
  const keep = image === undefined ? options.keep : 1;
  const target = await BackupTarget.openForBackup(to, vdi, store, options, isFull, options.disk);
  try {
    const dropped = await makeRoom(target, keep, options);
    if (target.last && !isFull) await target.checkUntouched(options);
    const point = await withStore(async (operations) =>
      new Run(operations, target, options, await showWorking(operations, vdi)).run(),
    );
    let isKept = false;
    try {
      if (keep !== undefined) dropped.push(...(await target.keep(keep, options)));
      isKept = true;
      const sha256 = options.sha256 ? await target.addSha256(point, options) : undefined;
      const file = target.image ?? target.fileOf(point);
      return { point: { ...point, sha256 }, file, kept: target.points.map((each) => each.id), dropped };
    } catch (error) {
      const rest = isKept ? 'its SHA-256 was not computed' : 'the next run continues to drop old backups';
      if (options.signal.aborted) log(`backup ${point.id} was taken; ${rest}`);
      throw notComplete(
        error,
        point,
        isKept ? 'its SHA-256 could not be computed' : 'an old backup could not be dropped',
      );
    }
  } catch (error) {
    throw explained(error, target, options);
  } finally {
    await target.close();
  }
}

/** Errors: IS_SNAPSHOT, NO_VDI. */
async function showWorking(operations: Operations, vdi: string): Promise<VdiRecord> {
  const working = await operations.show(vdi);
  if (working.isSnapshot) throw new OperationError('IS_SNAPSHOT', `${vdi} is a snapshot; give the name of a VDI`);
  return working;
}

/** Make room in a target that is full. Returns the ids of dropped backups. Errors: BAD_TARGET. */
async function makeRoom(target: BackupTarget, keep: number | undefined, options: TakeOptions): Promise<number[]> {
  if (target.points.length < MAX_POINTS) return [];
  if (keep !== undefined && keep < MAX_POINTS) return target.keep(keep, options);
  throw new OperationError(
    'BAD_TARGET',
    `${options.to} has ${target.points.length} backups, the maximum; drop some with --keep, or give another place`,
  );
}

/** The error after the new backup was committed. */
function notComplete(error: unknown, { id }: Point, what: string): unknown {
  if (!(error instanceof OperationError)) return error;
  const message = `backup ${id} was taken, but ${what}: ${error.message}`;
  return new OperationError(error.code, message, { cause: error });
}

class Run {
  readonly #operations: Operations;
  readonly #target: BackupTarget;
  readonly #options: TakeOptions;
  readonly #working: VdiRecord;
  readonly #tagPrefix: string;

  constructor(operations: Operations, target: BackupTarget, options: TakeOptions, working: VdiRecord) {
    this.#operations = operations;
    this.#target = target;
    this.#options = options;
    this.#working = working;
    this.#tagPrefix = `backup-${target.manifest.target}-`;
  }

  async run(): Promise<Point> {
    const { vdi, keepsBase, moment, signal } = this.#options;
    const previous = await this.#previous();
    const id = (this.#target.last?.id ?? 0) + 1;
    const tag = `${this.#tagPrefix}${id}`;
    await this.#dropSnapshots(this.#target.last?.base?.tag, id);
    signal.throwIfAborted();
    let disk: Disk | undefined;
    try {
      let base: BaseSnapshot | null = null;
      let point: Point;
      try {
        let time: string;
        // A label for this run alone: a killed run may still have its snapshot.
        const label = labelOfRun(`${this.#target.manifest.target}-${id}`);
        const spec = keepsBase ? `${vdi}@${tag}` : `${vdi}@now:${label}`;
        if (keepsBase) {
          const { vid, snapshotAt } = await moment(() => this.#operations.snapshot(vdi, tag));
          base = { tag, vid, snapshotAt };
          time = new Date().toISOString();
          signal.throwIfAborted();
          disk = await this.#operations.openDisk(spec);
        } else {
          // Set inside: if the snapshot came too late, `moment` throws while the disk is open.
          disk = await moment(async () => (disk = await this.#operations.openDisk(spec)));
          time = new Date().toISOString();
        }
        point = await this.#copy({ spec, disk }, { id, time, base }, previous);
      } finally {
        await disk?.close();
      }
      // The backup is committed: drop the old snapshot, which makes every first write to an object slower.
      await this.#dropSnapshots(point.base?.tag, point.id);
      return point;
    } catch (error) {
      const isKept = this.#target.points.some((point) => point.id === id);
      if (keepsBase && !isKept) await this.#operations.remove(`${vdi}@${tag}`).catch(() => undefined);
      throw error;
    }
  }

  /** Errors: BASE_GONE, DAMAGED. */
  async #previous(): Promise<Previous | undefined> {
    const { isFull, compares } = this.#options;
    const point = this.#target.last;
    if (!point || isFull) return undefined;
    const hashes = await this.#target.hashesOf(point);
    if (compares || point.base === null) return { point, hashes, since: undefined };
    await this.#checkBase(point.base);
    return { point, hashes, since: `${this.#options.vdi}@${point.base.tag}` };
  }

  async #checkBase(base: BaseSnapshot): Promise<void> {
    const { vdi, to } = this.#options;
    const { name } = this.#working;
    const snapshots = (await this.#operations.list()).filter((record) => record.name === name && record.isSnapshot);
    const why = whoIsBehind({
      vdi,
      to,
      store: this.#operations.store,
      base,
      points: this.#target.points,
      snapshots: snapshots.filter(({ tag }) => tag.startsWith(this.#tagPrefix)),
    });
    if (why !== undefined) throw new OperationError('BASE_GONE', why);
  }

  /** Remove this target's snapshots of failed runs and old bases. Newer ones belong to another copy of the target, and stay. */
  async #dropSnapshots(keep: string | undefined, below: number): Promise<void> {
    const { vdi, log } = this.#options;
    for (const { name, tag, isSnapshot } of await this.#operations.list()) {
      const number = tag.startsWith(this.#tagPrefix) ? Number(tag.slice(this.#tagPrefix.length)) : NaN;
      if (name !== this.#working.name || !isSnapshot || !(number <= below) || tag === keep) continue;
      try {
        await this.#operations.remove(`${vdi}@${tag}`);
      } catch (error) {
        const { code, message } = error as Partial<OperationError>;
        if (number === below || code === undefined) throw error;
        if (code !== 'NO_TAG') log(`${message}; the next backup tries again`);
      }
    }
  }

  async #copy(
    source: Source,
    about: Pick<Point, 'id' | 'time' | 'base'>,
    previous: Previous | undefined,
  ): Promise<Point> {
    const { disk } = source;
    const { vdi, verifies, progress, signal } = this.#options;
    const { blockSizeShift } = this.#working;
    const target = this.#target;
    const blockBytes = previous?.point.blockBytes ?? blockBytesOf(blockSizeShift);
    const hashes = new BlockHashes(disk.size, blockBytes, previous?.hashes);
    const chain = previous?.point.chain ?? (target.last?.chain ?? 0) + 1;
    const stem = path.join(target.home, stemOf(about));
    const newBase = previous ? undefined : `base-${chain}.img`;
    const partial = newBase === undefined ? `${stem}.qcow2${PARTIAL}` : path.join(target.home, `${newBase}${PARTIAL}`);
    try {
      const copied = await withProgress(progress(`backing up ${vdi}`, disk.size), ({ advance }) => {
        const copying = { target, file: partial, hashes, advance, signal };
        return previous ? copyChanges(this.#operations, source, previous, copying) : copyAll(disk, copying);
      });
      signal.throwIfAborted();
      if (verifies) {
        const { blocks } = copied;
        await withProgress(progress('verifying', blocks.length * blockBytes), ({ advance }) =>
          readBack(blocks, previous, { target, file: partial, hashes, advance, signal }),
        );
      }
      await moveFile(this.#target.disk, partial, partial.slice(0, -PARTIAL.length));
      if (newBase !== undefined) await target.writeEmpty(`${stem}.qcow2`, disk.size, chain);
      await hashes.save(this.#target.disk, `${stem}.hashes`);
      const point: Point = {
        ...about,
        isFull: previous === undefined,
        chain,
        size: disk.size,
        blockSizeShift,
        blockBytes,
        changedBytes: copied.changedBytes,
        storedBytes: copied.storedBytes,
        treeHash: hashes.treeHash,
      };
      signal.throwIfAborted();
      await target.commit(point, newBase, this.#operations.store);
      return point;
    } catch (error) {
      // A commit that failed may still have taken effect: the manifest on disk decides.
      await target.removeLeftovers().catch(() => undefined);
      throw error;
    }
  }
}

const SPACE_CODES = new Set(['ENOSPC', 'EDQUOT']);

/** The error with the state of the target, and what to do. */
function explained(error: unknown, target: BackupTarget, { to }: TakeOptions): unknown {
  const { code, syscall } = error as NodeJS.ErrnoException;
  const kept =
    target.points.length === 0
      ? ''
      : `; the backups in it are unharmed: ${target.points.map(({ id }) => id).join(', ')}`;
  if (code !== undefined && syscall !== undefined && SPACE_CODES.has(code)) {
    return new OperationError(
      'NO_SPACE',
      `no space left in ${to}; free some space there, or --keep fewer backups${kept}`,
      {
        cause: error,
      },
    );
  }
  if (error instanceof OperationError && error.code === 'DAMAGED') {
    const message = `${error.message}; 'sheepgate restore ${to} --verify' shows which backups are intact, and --full starts again with a full backup`;
    return new OperationError('DAMAGED', message, { cause: error });
  }
  return error;
}
