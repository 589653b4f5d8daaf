/** Which backup target a path names, and what the files of a backup are called. */
import path from 'node:path';
import { OperationError } from '../../operations/operations.js';
import type { HostDisk } from '../../system/disk.js';
import type { Point } from './manifest.js';

/** Ending of the directory beside an image. */
const BESIDE = '.sheepgate';
/** A path that does not exist is an image if it has one of these endings, else a directory. */
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
    throw new OperationError(
      'BAD_TARGET',
      `${given} is neither a file nor a directory; give a directory or an image for backups`,
    );
  }
  const beside = `${where}${BESIDE}`;
  const isImage =
    status !== undefined ||
    disk.existsSync(beside) ||
    (!given.endsWith('/') && IMAGE_ENDINGS.some((ending) => where.endsWith(ending)));
  return isImage ? { home: beside, image: where } : { home: where, image: undefined };
}

/** Resolve links: renaming a new image would replace the last link, and target-files.ts follows none. */
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
