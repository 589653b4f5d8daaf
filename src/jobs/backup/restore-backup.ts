/**
 * A backup becomes a VDI. Every block is compared with its hash before it is written, and read back afterwards unless the caller
 * does not want that. Until then the VDI is marked as unfinished. Owns the choice of the backup, and what happens to the VDI
 * after a failure.
 */
import { randomBytes } from 'node:crypto';
import { OperationError, type Disk, type Operations, type VdiRecord } from '../../operations/operations.js';
import { whatIsLeft } from '../interrupted-fill.js';
import { MAX_DATA_OBJECTS, type Redundancy } from '../../store/vdi-record.js';
import { closeAfter } from '../../system/close-after.js';
import { runsOf } from '../buffer-runs.js';
import { hashOf, type BlockHashes } from '../block-hashes.js';
import type { Chain } from './chain.js';
import { withRequestsInFlight } from '../requests-in-flight.js';
import type { Point } from './manifest.js';
import { PagedRanges } from '../paged-ranges.js';
import { CLUSTER_BYTES } from './qcow2-file.js';
import type { JobContext } from '../reporting.js';
import type { WithStore } from '../with-store.js';
import type { BackupTarget } from './target.js';

const RUN_BYTES = 8;

export interface RestoreOptions extends JobContext {
  /** The VDI to make. */
  readonly name: string;
  /** Of its objects, if the VDI is made; undefined for the store's own, or that of the VDI that was backed up. */
  readonly blockSizeShift?: number | undefined;
  /** Overwrite a VDI of that name. */
  readonly overwrites: boolean;
  /** Of a cluster, if the VDI is made. */
  readonly redundancy?: Redundancy | undefined;
  /** Also if a client that was cut off from it may come back. */
  readonly force?: boolean | undefined;
  readonly verifies: boolean;
}

/**
 * Find a backup by its id, or the newest that was taken at or before a time (ISO 8601, or its beginning: a day, an hour). The
 * last backup for undefined. Errors: NO_BACKUP, BAD_USAGE.
 */
export function pointAt(target: BackupTarget, at: string | undefined): Point {
  const { points } = target;
  const last = points.at(-1);
  if (!last) {
    throw new OperationError('NO_BACKUP', `${target.image ?? target.home} has no complete backup`);
  }
  if (at === undefined) return last;
  const found = /^\d{1,7}$/.test(at)
    ? points.find(({ id }) => id === Number(at))
    : points.filter(({ time }) => Date.parse(time) <= endOf(at)).at(-1);
  if (found) return found;
  const first = points[0] as Point;
  throw new OperationError(
    'NO_BACKUP',
    `there is no backup ${at}: the oldest is ${first.id} (${first.time}), the newest ${last.id} (${last.time}); --list shows all`,
  );
}

/** The last moment of a time that is given in part: "2026-11-24" is the whole day, in local time. */
function endOf(text: string): number {
  const match = /^(\d{4}-\d\d-\d\d)(?:[T ](\d\d)(?::(\d\d)(?::(\d\d)(\.\d+)?)?)?(Z|[+-]\d\d:?\d\d)?)?$/.exec(text);
  const [, day, hour, minute, second, fraction, zone] = match ?? [];
  const time = Date.parse(
    `${day}T${hour ?? '23'}:${minute ?? '59'}:${second ?? '59'}${fraction ?? '.999'}${zone ?? ''}`,
  );
  if (Number.isNaN(time)) {
    throw new OperationError(
      'BAD_USAGE',
      `--at ${text}: give a backup's number, a day (2026-11-24) or a time (2026-11-24T03:00)`,
    );
  }
  return time;
}

/**
 * Restore the backup `at` (pointAt) of a target. Before a VDI is overwritten the whole backup is checked, so that nothing is
 * given up for a damaged one. Errors: NO_BACKUP, BAD_USAGE, DAMAGED, EXISTS, BUSY, and those of the store.
 */
export async function restoreFrom(
  target: BackupTarget,
  at: string | undefined,
  withStore: WithStore,
  options: RestoreOptions,
): Promise<{ readonly point: Point; readonly dataBytes: number }> {
  const point = pointAt(target, at);
  const opened = await openPoint(target, point);
  return closeAfter(opened.chain, async () => {
    if (options.overwrites) await checkBackup(opened, options);
    const { dataBytes } = await withStore((operations) => restoreBackup(operations, opened, options));
    return { point, dataBytes };
  });
}

/** One backup with all its files open. */
export interface OpenedPoint {
  readonly point: Point;
  readonly hashes: BlockHashes;
  readonly chain: Chain;
}

/** To be called before the store is opened: with the identity of the store's owner, root may not be able to read the files. */
export async function openPoint(target: BackupTarget, point: Point): Promise<OpenedPoint> {
  return { point, hashes: await target.hashesOf(point), chain: await target.openChain(point) };
}

/**
 * What is written over is given up at once: ask checkBackup first. Errors: EXISTS, DAMAGED, BUSY, and those of the store.
 */
export async function restoreBackup(
  operations: Operations,
  { point, hashes, chain }: OpenedPoint,
  options: RestoreOptions,
): Promise<{ readonly dataBytes: number }> {
  const { name, overwrites } = options;
  const found = (await operations.list()).find((vdi) => vdi.name === name && !vdi.isSnapshot);
  if (found && overwrites) mustFit(found, point);
  const run = randomBytes(RUN_BYTES).toString('hex');
  const begun = await operations.begin(name, {
    by: 'restore',
    of: '',
    run,
    size: point.size,
    blockSizeShift: options.blockSizeShift,
    likeShift: point.blockSizeShift,
    redundancy: options.redundancy,
    overwrites,
    goesOn: false,
    force: options.force,
  });
  const isNew = begun.unfinished?.isNew ?? false;
  let isFinishing = false;
  try {
    if (begun.size !== point.size) await operations.resize(name, point.size, { force: true, run });
    const disk = await operations.openDisk(name, { run });
    let dataBytes: number;
    try {
      if (disk.size !== point.size) {
        throw new OperationError('BAD_SIZE', `${name} has ${disk.size} bytes, the backup ${point.size}`);
      }
      if (!isNew) await disk.zero(0, disk.size);
      dataBytes = await copyIn(chain, hashes, disk, options);
      if (options.verifies) await readBack(hashes, disk, options);
    } finally {
      await disk.close();
    }
    isFinishing = true;
    await operations.finish(name, run);
    return { dataBytes };
  } catch (error) {
    // Half a disk is worse than none: a new VDI is removed.
    const isGone =
      isNew &&
      (await operations.remove(name, { run }).then(
        () => true,
        () => false,
      ));
    if (!isGone) options.log(await whatIsLeft(operations, begun, { isFinishing }));
    throw error;
  }
}

/**
 * Compare all of a backup with its hashes, before anything is given up for it; the store need not be open meanwhile.
 * Errors: DAMAGED.
 */
export async function checkBackup(
  { hashes, chain }: OpenedPoint,
  options: Pick<RestoreOptions, 'progress' | 'signal'>,
): Promise<void> {
  const doing = options.progress('checking the backup', hashes.size);
  try {
    for (let index = 0; index < hashes.count; index++) {
      options.signal.throwIfAborted();
      if (!hashes.isZero(index)) await chain.readChecked(hashes, index);
      doing.advance(hashes.lengthOf(index));
    }
  } finally {
    doing.end();
  }
}

/** Errors: BAD_SIZE (the VDI cannot have the size of the backup). */
function mustFit({ name, blockSizeShift, maxObjects, unfinished }: VdiRecord, { size }: Point): void {
  const most = (maxObjects ?? MAX_DATA_OBJECTS) * 2 ** blockSizeShift;
  if (unfinished?.isNew || size <= most) return;
  throw new OperationError(
    'BAD_SIZE',
    `${name} can have at most ${most} bytes, the backup has ${size}; nothing was written; restore it under another name`,
  );
}

async function copyIn(chain: Chain, hashes: BlockHashes, disk: Disk, options: RestoreOptions): Promise<number> {
  let dataBytes = 0;
  const doing = options.progress(`restoring ${options.name}`, disk.size);
  try {
    await withRequestsInFlight(async (requests) => {
      for (let index = 0; index < hashes.count; index++) {
        options.signal.throwIfAborted();
        const length = hashes.lengthOf(index);
        if (hashes.isZero(index)) {
          doing.advance(length);
          continue;
        }
        await requests.add(async () => {
          const block = await chain.readChecked(hashes, index);
          for (const { from, to, kind } of runsOf(block, CLUSTER_BYTES)) {
            if (kind !== 'data') continue;
            await disk.write(index * hashes.blockBytes + from, block.subarray(from, to));
            dataBytes += to - from;
          }
          doing.advance(length);
        });
      }
    });
    await disk.flush();
  } finally {
    doing.end();
  }
  return dataBytes;
}

/** Compare the disk with the hashes. Blocks that are zeros by the allocation map are not read. Errors: DAMAGED. */
async function readBack(hashes: BlockHashes, disk: Disk, options: RestoreOptions): Promise<void> {
  const doing = options.progress('verifying', disk.size);
  const data = new PagedRanges((offset) => disk.dataPage(offset));
  try {
    await withRequestsInFlight(async (requests) => {
      for (let index = 0; index < hashes.count; index++) {
        options.signal.throwIfAborted();
        const length = hashes.lengthOf(index);
        const offset = index * hashes.blockBytes;
        const check = (isRight: boolean): void => {
          if (isRight) return doing.advance(length);
          throw new OperationError('DAMAGED', `${options.name} at ${offset} does not read back as it was written`);
        };
        if (!(await data.touch(offset, length))) {
          check(hashes.isZero(index));
          continue;
        }
        await requests.add(async () => {
          const block = Buffer.allocUnsafe(length);
          await disk.read(offset, block);
          check(hashes.is(index, hashOf(block)));
        });
      }
    });
  } finally {
    doing.end();
  }
}
