/** Which backup target a path names, and what the files of a backup are called. */
import path from 'node:path';
import { OperationError } from '../../operations/operations.js';
import type { HostDisk } from '../../system/disk.js';
import type { Point } from './manifest.js';

/** Beside an image, what belongs to it. */
const BESIDE = '.sheepgate';
/** A name with one of these endings that does not exist yet is an image's; any other is a directory's. */
const IMAGE_ENDINGS = ['.img', '.raw'];
export interface TargetPaths {
  /** The directory that holds the manifest. */
  readonly home: string;
  /** The raw image that is kept up to date; undefined if the target is the directory. */
  readonly image: string | undefined;
}

/** Which target a path names. Errors: BAD_TARGET. */
export function pathsOf(disk: HostDisk, given: string): TargetPaths {
  const where = realPath(disk, path.resolve(given));
  const status = disk.statSync(where);
  if (status?.isDirectory()) return { home: where, image: undefined };
  if (status && !status.isFile()) {
    throw new OperationError('BAD_TARGET', `${given} is neither a file nor a directory; give one to keep backups in`);
  }
  const beside = `${where}${BESIDE}`;
  const isImage =
    status !== undefined ||
    disk.existsSync(beside) ||
    (!given.endsWith('/') && IMAGE_ENDINGS.some((ending) => where.endsWith(ending)));
  return isImage ? { home: beside, image: where } : { home: where, image: undefined };
}

/** What links on the way point to: a new image would take the place of the last one, and target-files.ts follows none. */
function realPath(disk: HostDisk, absolute: string): string {
  if (disk.existsSync(absolute)) return disk.realpathSync(absolute);
  const parent = path.dirname(absolute);
  return disk.existsSync(parent) ? path.join(disk.realpathSync(parent), path.basename(absolute)) : absolute;
}

/** The part of a backup's file names before the ending. */
export function stemOf({ id, time }: Pick<Point, 'id' | 'time'>): string {
  const compact = new Date(time).toISOString().replaceAll(/[-:]|\.\d+/g, '');
  return `${String(id).padStart(4, '0')}-${compact}`;
}
