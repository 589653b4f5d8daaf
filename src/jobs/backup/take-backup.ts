/**
 * One backup of a VDI: take a snapshot, copy what differs from the backup before, make the copy the newest backup, and
 * keep the snapshot as the base of the next one. Owns the snapshots of the target and their tags, and the order of things:
 * the base before is dropped only when the new backup is one, so that whatever happens one of the two can be gone on from.
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
import { isZeros } from '../../system/zeros.js';
import { blockBytesOf, BlockHashes, hashOf } from '../block-hashes.js';
import { Chain, type Link } from './chain.js';
import { inFlight } from '../requests-in-flight.js';
import { MAX_POINTS, type BaseSnapshot, type Point } from './manifest.js';
import { CLUSTER_BYTES, IncrementWriter } from './qcow2-file.js';
import { PagedRanges } from '../paged-ranges.js';
import { BackupTarget, PARTIAL, pathsOf, stemOf } from './target.js';
import type { JobContext } from '../reporting.js';
import type { WithStore } from '../with-store.js';
import { createFile, moveFile } from '../target-files.js';
import { whoIsBehind } from './who-is-behind.js';

export interface TakeOptions extends JobContext {
  /** NAME. */
  readonly vdi: string;
  /** Directory or image. */
  readonly to: string;
  /** The disk that `to` is on; this machine's if not given. */
  readonly disk?: HostDisk;
  /** How many backups to keep; undefined for all. An image holds one. */
  readonly keep: number | undefined;
  /** Copy all of it, over nothing. */
  readonly isFull: boolean;
  /** Find what changed by reading the whole disk. */
  readonly compares: boolean;
  /** Keep a snapshot for the next one. */
  readonly keepsBase: boolean;
  /** Read back what was written. */
  readonly verifies: boolean;
  /** Runs what takes the snapshot; what it throws ends the backup. */
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
 * The store is open only while something is asked of it: what concerns the target alone, and may take hours, comes before
 * and after. Errors: BASE_GONE, DAMAGED, BAD_TARGET, BUSY, NO_SPACE, and those of the store.
 */
export async function takeBackup(withStore: WithStore, given: TakeOptions): Promise<Taken> {
  const { to, isFull, log } = given;
  // First: a mistyped name must not leave a directory behind.
  const { store, vdi } = await withStore(async (operations) => {
    const { name } = await showWorking(operations, given.vdi);
    return { store: operations.store, vdi: formatSpec({ name, tag: undefined }) };
  });
  // However it was said: its snapshots are said by its name.
  const options = { ...given, vdi };
  const { image } = pathsOf(options.disk ?? hostDisk, to);
  if (image !== undefined && options.keep !== undefined && options.keep !== 1) {
    throw new OperationError(
      'BAD_USAGE',
      `${to} is one image, which holds the newest backup; --keep ${options.keep} needs a directory`,
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
      const rest = isKept ? 'its SHA-256 was not computed' : 'the next run goes on with dropping old ones';
      if (options.signal.aborted) log(`backup ${point.id} was taken; ${rest}`);
      throw notComplete(error, point, isKept ? 'its SHA-256 could not be computed' : 'an old one could not be dropped');
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

/** A target that is full. Returns what was dropped. Errors: BAD_TARGET. */
async function makeRoom(target: BackupTarget, keep: number | undefined, options: TakeOptions): Promise<number[]> {
  if (target.points.length < MAX_POINTS) return [];
  if (keep !== undefined && keep < MAX_POINTS) return target.keep(keep, options);
  throw new OperationError(
    'BAD_TARGET',
    `${options.to} has ${target.points.length} backups, and no more fit; drop some with --keep, or give another place`,
  );
}

/** The new backup is one, whatever became of the old ones. */
function notComplete(error: unknown, { id }: Point, what: string): unknown {
  if (!(error instanceof OperationError)) return error;
  const message = `backup ${id} was taken, but ${what}: ${error.message}`;
  return new OperationError(error.code, message, { cause: error });
}

/** What the new backup is over, and how to find what it must hold. */
interface Previous {
  readonly point: Point;
  readonly hashes: BlockHashes;
  /** NAME@TAG of the snapshot to compare with; undefined: read everything. */
  readonly since: string | undefined;
}

/** The moment that is backed up. */
interface Source {
  /** NAME@TAG, and that opened. */
  readonly spec: string;
  readonly disk: Disk;
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
        // Of this run alone: one that was killed may still have its snapshot.
        const label = labelOfRun(`${this.#target.manifest.target}-${id}`);
        const spec = keepsBase ? `${vdi}@${tag}` : `${vdi}@now:${label}`;
        if (keepsBase) {
          const { vid, snapshotAt } = await moment(() => this.#operations.snapshot(vdi, tag));
          base = { tag, vid, snapshotAt };
          time = new Date().toISOString();
          signal.throwIfAborted();
          disk = await this.#operations.openDisk(spec);
        } else {
          // Set inside: a moment that was over too late throws with the disk open.
          disk = await moment(async () => (disk = await this.#operations.openDisk(spec)));
          time = new Date().toISOString();
        }
        point = await this.#copy({ spec, disk }, { id, time, base }, previous);
      } finally {
        await disk?.close();
      }
      // It is a backup now: what it replaces goes from the source, whose writers it costs something.
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

  /** Those of this target: of runs that did not end, and bases before the last. Not those of a copy that went on. */
  async #dropSnapshots(keep: string | undefined, below: number): Promise<void> {
    const { vdi, log } = this.#options;
    for (const { name, tag, isSnapshot } of await this.#operations.list()) {
      const number = tag.startsWith(this.#tagPrefix) ? Number(tag.slice(this.#tagPrefix.length)) : NaN;
      if (name !== this.#working.name || !isSnapshot || !(number <= below) || tag === keep) continue;
      try {
        await this.#operations.remove(`${vdi}@${tag}`);
      } catch (error) {
        const { code, message } = error as OperationError;
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
      const doing = progress(`backing up ${vdi}`, disk.size);
      let copied: Copied;
      try {
        copied = previous
          ? await this.#copyChanges(source, partial, hashes, previous, doing.advance)
          : await this.#copyAll(disk, partial, hashes, doing.advance);
      } finally {
        doing.end();
      }
      signal.throwIfAborted();
      if (verifies) await this.#readBack(partial, disk.size, hashes, copied.blocks, previous);
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
      // A failed commit may have been one: what the manifest says decides, not we.
      await target.removeLeftovers().catch(() => undefined);
      throw error;
    }
  }

  /** Into a raw image, zeros left out. */
  async #copyAll(disk: Disk, file: string, hashes: BlockHashes, advance: (bytes: number) => void): Promise<Copied> {
    const copied: Copied = { blocks: [], changedBytes: 0, storedBytes: 0 };
    const data = new PagedRanges((offset) => disk.dataPage(offset));
    const handle = await createFile(this.#target.disk, file);
    try {
      await handle.truncate(disk.size);
      await inFlight(async (flight) => {
        for (let index = 0; index < hashes.count; index++) {
          this.#options.signal.throwIfAborted();
          const offset = index * hashes.blockBytes;
          const length = hashes.lengthOf(index);
          copied.blocks.push(index);
          if (!(await data.touch(offset, length))) {
            advance(length);
            continue;
          }
          await flight.add(async () => {
            const block = await readBlock(disk, offset, length);
            hashes.set(index, hashOf(block));
            for (const { from, to, kind } of differences(block, undefined)) {
              if (kind !== 'data') continue;
              await handle.write(block.subarray(from, to), offset + from);
              copied.storedBytes += to - from;
            }
            if (!hashes.isZero(index)) copied.changedBytes += length;
            advance(length);
          });
        }
      });
      await handle.sync();
    } finally {
      await handle.close();
    }
    return copied;
  }

  /** Into an increment: of each block that may have changed what differs from the backup before. */
  async #copyChanges(
    { spec, disk }: Source,
    file: string,
    hashes: BlockHashes,
    previous: Previous,
    advance: (bytes: number) => void,
  ): Promise<Copied> {
    const copied: Copied = { blocks: [], changedBytes: 0, storedBytes: 0 };
    const data = new PagedRanges((offset) => disk.dataPage(offset));
    const { since } = previous;
    const changes =
      since === undefined ? undefined : new PagedRanges((offset) => this.#operations.changes(spec, since, offset));
    // The block that the end is in, or was in, is of another length now.
    const ends = disk.size === previous.hashes.size ? [] : [disk.size, previous.hashes.size];
    const cut = new Set(ends.map((end) => Math.floor(end / hashes.blockBytes)));
    const chain = await this.#target.openChain(previous.point);
    const backing = this.#target.backingOf(previous.point);
    const writer = await IncrementWriter.create(this.#target.disk, file, disk.size, backing).catch(
      async (error: unknown) => {
        await chain.close();
        throw error;
      },
    );
    const copyBlock = async (index: number, isData: boolean): Promise<void> => {
      const offset = index * hashes.blockBytes;
      const length = hashes.lengthOf(index);
      const block = isData ? await readBlock(disk, offset, length) : Buffer.alloc(length);
      const hash = hashOf(block);
      if (!cut.has(index) && previous.hashes.is(index, hash)) return;
      // What is there is read anyway, so that damage is found before anything is built on it.
      const before = cut.has(index)
        ? Buffer.alloc(length)
        : await chain.readChecked(padded(previous.hashes, index), index);
      if (cut.has(index)) await chain.read(offset, before);
      hashes.set(index, hash);
      copied.blocks.push(index);
      copied.changedBytes += length;
      for (const { from, to, kind } of differences(block, before)) {
        if (kind === 'zeros') writer.zeros(offset + from, to - from);
        if (kind !== 'data') continue;
        await writer.data(offset + from, block.subarray(from, to));
        copied.storedBytes += to - from;
      }
    };
    try {
      await inFlight(async (flight) => {
        for (let index = 0; index < hashes.count; index++) {
          this.#options.signal.throwIfAborted();
          const offset = index * hashes.blockBytes;
          const length = hashes.lengthOf(index);
          const isChanged = changes === undefined || (await changes.touch(offset, length)) || cut.has(index);
          const isData = isChanged && (await data.touch(offset, length));
          const isSame = !isChanged || (!isData && !cut.has(index) && previous.hashes.isZero(index));
          if (isSame) advance(length);
          else await flight.add(() => copyBlock(index, isData).then(() => advance(length)));
        }
      });
      await writer.finish();
    } finally {
      await writer.close();
      await chain.close();
    }
    return copied;
  }

  /** What was written is what was read from the disk. */
  async #readBack(
    file: string,
    size: number,
    hashes: BlockHashes,
    blocks: readonly number[],
    previous: Previous | undefined,
  ): Promise<void> {
    const written: Link = { file, size };
    const [image, below] = previous ? this.#target.linksOf(previous.point) : [written, []];
    const chain = await Chain.open(this.#target.disk, image, previous ? [...below, written] : []);
    const doing = this.#options.progress('verifying', blocks.length * hashes.blockBytes);
    try {
      await chain.dropCached();
      for (const index of blocks) {
        this.#options.signal.throwIfAborted();
        // Holes of a new image: nothing was written there.
        if (previous || !hashes.isZero(index)) await chain.readChecked(hashes, index);
        doing.advance(hashes.lengthOf(index));
      }
    } finally {
      doing.end();
      await chain.close();
    }
  }
}

interface Copied {
  /** Those that were stored, in no order. */
  readonly blocks: number[];
  changedBytes: number;
  storedBytes: number;
}

async function readBlock(disk: Disk, offset: number, length: number): Promise<Buffer> {
  const block = Buffer.allocUnsafe(length);
  for (let done = 0; done < length; done += disk.maxRequestBytes) {
    await disk.read(offset + done, block.subarray(done, Math.min(done + disk.maxRequestBytes, length)));
  }
  return block;
}

interface Difference {
  readonly from: number;
  readonly to: number;
  readonly kind: 'data' | 'zeros' | 'same';
}

/** The clusters of a block in runs, compared with what is there already, if anything. */
function differences(block: Buffer, before: Buffer | undefined): Difference[] {
  const runs: Difference[] = [];
  for (let from = 0; from < block.length; from += CLUSTER_BYTES) {
    const to = Math.min(from + CLUSTER_BYTES, block.length);
    const cluster = block.subarray(from, to);
    const isSame = before?.subarray(from, to).equals(cluster) ?? false;
    const kind = isSame ? 'same' : isZeros(cluster) ? 'zeros' : 'data';
    const last = runs.at(-1);
    if (last?.kind === kind) runs[runs.length - 1] = { ...last, to };
    else runs.push({ from, to, kind });
  }
  return runs;
}

/** A disk that has grown: the blocks it has got were zeros. */
function padded(hashes: BlockHashes, index: number): BlockHashes {
  return index < hashes.count ? hashes : new BlockHashes((index + 1) * hashes.blockBytes, hashes.blockBytes);
}

const SPACE_CODES = new Set(['ENOSPC', 'EDQUOT']);

/** What went wrong with the target, and what to do. */
function explained(error: unknown, target: BackupTarget, { to }: TakeOptions): unknown {
  const { code, syscall } = error as NodeJS.ErrnoException;
  const kept =
    target.points.length === 0
      ? ''
      : `; the backups in it are unharmed: ${target.points.map(({ id }) => id).join(', ')}`;
  if (code !== undefined && syscall !== undefined && SPACE_CODES.has(code)) {
    return new OperationError('NO_SPACE', `no space left in ${to}: free some, or --keep fewer${kept}`, {
      cause: error,
    });
  }
  if (error instanceof OperationError && error.code === 'DAMAGED') {
    const message = `${error.message}; 'sheepgate restore ${to} --verify' tells which backups are whole, and --full begins anew`;
    return new OperationError('DAMAGED', message, { cause: error });
  }
  return error;
}
