/**
 * Builds a new store from a rescue plan: copies the objects, then stores maps and records. Owns the new directory until it is done;
 * never opens anything of the damaged store for writing. Objects are copied, not linked: a link would share later writes.
 */
import path from 'node:path';
import {
  O_CREAT,
  O_EXCL,
  O_NOFOLLOW,
  O_NONBLOCK,
  O_RDONLY,
  O_RDWR,
  O_WRONLY,
  type HostDisk,
} from '../../system/disk.js';
import { StoreError } from '../store-error.js';
import { OBJECTS } from './data-objects.js';
import { LocalStore } from './local-store.js';
import { pagesOf } from './map-pages.js';
import { FLAT_LAYOUT, OBJECT_LAYOUT, ObjectNames } from './object-names.js';
import { OVERLAYS } from './open-layers.js';
import { OVERLAY_BLOCK } from './overlay-records.js';
import { SEGMENT_OBJECTS } from './overlays.js';
import { openPlainFile } from './plain-file.js';
import { idxOf } from './reference-counts.js';
import type { RescuedOverlay, RescuePlan } from './rescue-plan.js';
import { segmentOf } from './segment-space.js';
import { SparseCopy } from './sparse-copy.js';
import { directoryState } from './store-directory.js';
import { asStoreError, isDiskError } from './store-errors.js';

/** Objects that are copied at a time. */
const COPIES_AT_ONCE = 4;

export interface BuildOptions {
  /** Called with the bytes that were copied since the last call. */
  readonly advance?: (bytes: number) => void;
  readonly signal?: AbortSignal;
}

export interface Built {
  readonly objects: number;
  /** Paths of objects that could not be read: they are missing in the new store, and 'check' lists them there. */
  readonly unreadable: readonly string[];
}

/** Errors: NO_STORE (`to` is not empty, or is in the damaged store, or around it). */
export function mustBeNew(disk: HostDisk, from: string, to: string): void {
  const [source, target] = [disk.realpathSync(from), realpathOfNew(disk, path.resolve(to))];
  const isIn = (inner: string, outer: string): boolean => `${inner}/`.startsWith(`${outer}/`);
  if (isIn(target, source) || isIn(source, target))
    throw new StoreError('NO_STORE', `${to} and ${from} are in each other: give a directory elsewhere`);
  const state = directoryState(disk, to);
  if (state !== 'missing' && state !== 'empty')
    throw new StoreError('NO_STORE', `${to} is not empty: give a directory that is missing or empty`);
}

/** The real path of a directory that may be missing. */
function realpathOfNew(disk: HostDisk, directory: string): string {
  if (disk.existsSync(directory)) return disk.realpathSync(directory);
  const above = path.dirname(directory);
  return above === directory ? directory : path.join(realpathOfNew(disk, above), path.basename(directory));
}

/**
 * Build the store in `to`, a directory that is missing or empty. If this fails, what it has made is removed. Errors: as mustBeNew;
 * the signal's reason; those of the disk.
 */
export async function buildRescued(
  disk: HostDisk,
  plan: RescuePlan,
  to: string,
  { advance = () => undefined, signal }: BuildOptions = {},
): Promise<Built> {
  mustBeNew(disk, plan.directory, to);
  const store = await LocalStore.open(to, { disk });
  const names = new ObjectNames(
    disk,
    path.join(store.location, OBJECTS),
    { isReadOnly: false, layout: OBJECT_LAYOUT },
    asStoreError,
  );
  const made: string[] = [];
  let isDone = false;
  try {
    const unreadable: string[] = [];
    const copier = new SparseCopy(disk);
    await atOnce(
      [...plan.objects.keys()].sort((a, b) => a - b),
      async (key) => {
        signal?.throwIfAborted();
        const source = plan.pathOf(key);
        const target = names.path(key);
        made.push(target);
        if (!(await copyObject(disk, copier, source, target))) unreadable.push(source);
        advance(plan.objects.get(key)?.bytes ?? 0);
      },
    );
    const segments = new Map<number, RescuedOverlay[]>();
    for (const each of plan.overlays) {
      const of = segments.get(segmentOf(each.key));
      if (of) of.push(each);
      else segments.set(segmentOf(each.key), [each]);
    }
    if (segments.size > 0) await store.layers.prepare();
    const folder = new ObjectNames(
      disk,
      path.join(store.location, OVERLAYS),
      { isReadOnly: false, layout: FLAT_LAYOUT },
      asStoreError,
    );
    const overlays = new Map(plan.overlays.map(({ key, overlay }) => [key, overlay]));
    await atOnce([...segments], async ([segment, members]) => {
      const target = folder.path(segment);
      made.push(target);
      const missing = await copySegment(disk, copier, plan.segmentPathOf(segment), target, members, advance, signal);
      for (const key of missing) {
        // Without a record and a file, the object is lost: reads fail, and do not show what is below.
        overlays.delete(key);
        unreadable.push(`${plan.segmentPathOf(segment)} (object ${idxOf(key)})`);
      }
    });
    await disk.syncfs(store.fd);
    // Before the maps that name them.
    await store.metadata.storeOverlays([...overlays.keys()], (key) => overlays.get(key));
    const vdis = [...plan.vdis, ...plan.lost];
    for (const { record, map } of vdis) {
      signal?.throwIfAborted();
      await store.metadata.preparePages(pagesOf(record.vid, map));
    }
    // All at once: a store with some of the disks would look complete.
    await store.metadata.commit({ records: vdis.map(({ record }) => record) });
    isDone = true;
    return { objects: plan.objects.size + plan.overlays.length - unreadable.length, unreadable };
  } finally {
    if (isDone) await store.close();
    else await takeBack(disk, store, made);
  }
}

/** Do `work` for each item, COPIES_AT_ONCE at a time, in their order. */
async function atOnce<T>(items: readonly T[], work: (item: T) => Promise<void>): Promise<void> {
  const next = items.values();
  await Promise.all(
    Array.from({ length: COPIES_AT_ONCE }, async () => {
      for (const item of next) await work(item);
    }),
  );
}

/**
 * Copy the parts of a segment file that these overlays have, and nothing of others. Returns the keys of those that cannot be read.
 * Errors: those of writing, and the signal's reason.
 */
async function copySegment(
  disk: HostDisk,
  copier: SparseCopy,
  source: string,
  target: string,
  members: readonly RescuedOverlay[],
  advance: (bytes: number) => void,
  signal: AbortSignal | undefined,
): Promise<readonly number[]> {
  let from: number;
  try {
    from = openPlainFile(disk, source);
  } catch {
    return []; // it is missing in the new store as well: reads of these overlays' blocks fail
  }
  try {
    const { size } = disk.fstatSync(from);
    const to = await disk.open(target, O_RDWR | O_CREAT | O_EXCL, 0o600);
    try {
      await disk.truncate(to, size);
      const missing: number[] = [];
      for (const { key, overlay } of members) {
        signal?.throwIfAborted();
        const length = overlay.blocks * OVERLAY_BLOCK;
        const at = (idxOf(key) % SEGMENT_OBJECTS) * length;
        try {
          await copier.copyRange(from, to, at, Math.min(at + length, size));
        } catch (error) {
          if (!isDiskError(error) || !(await isUnreadable(disk, from, at, at + length))) throw error;
          missing.push(key);
          await disk.punchHole(to, at, length);
        }
        advance(length);
      }
      return missing;
    } finally {
      await disk.close(to);
    }
  } finally {
    disk.closeSync(from);
  }
}

/** False if the object cannot be read: then it is not made. Errors: those of writing it. */
async function copyObject(disk: HostDisk, copier: SparseCopy, source: string, target: string): Promise<boolean> {
  let from: number;
  try {
    from = await disk.open(source, O_RDONLY | O_NOFOLLOW | O_NONBLOCK);
  } catch (error) {
    if (isDiskError(error) || isNotReadable(error)) return false;
    throw error;
  }
  try {
    const { size } = disk.fstatSync(from);
    const to = await disk.open(target, O_WRONLY | O_CREAT | O_EXCL, 0o600);
    let isCopied = false;
    try {
      await copier.copy(from, to, size, 0, 0);
      await disk.truncate(to, size);
      isCopied = true;
    } catch (error) {
      if (!isDiskError(error) || !(await isUnreadable(disk, from, 0, size))) throw error;
    } finally {
      await disk.close(to);
      if (!isCopied) await disk.unlink(target);
    }
    return isCopied;
  } finally {
    await disk.close(from);
  }
}

/** Of one object that is gone, or belongs to somebody else. */
function isNotReadable(error: unknown): boolean {
  return ['EACCES', 'ELOOP', 'ENOENT', 'EPERM'].includes((error as NodeJS.ErrnoException).code ?? '');
}

/** Whether it is the source of a copy that fails, and not its target. */
async function isUnreadable(disk: HostDisk, fd: number, start: number, end: number): Promise<boolean> {
  const buffer = Buffer.allocUnsafe(2 ** 20);
  try {
    for (let at = start; at < end; at += buffer.length) await disk.read(fd, buffer, 0, at);
    return false;
  } catch {
    return true;
  }
}

async function takeBack(disk: HostDisk, store: LocalStore, made: readonly string[]): Promise<void> {
  for (const file of made) await disk.unlink(file).catch(() => undefined);
  store.takeBackCreation();
  await store.close().catch(() => undefined);
}
