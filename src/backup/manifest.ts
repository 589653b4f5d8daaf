/**
 * What a backup target says of itself: manifest.json, replaced as a whole. Owns its form and the checking of what is read.
 * It is the only place where a backup becomes one, or stops being one; files that it does not name are left-overs.
 */
import fs from 'node:fs';
import path from 'node:path';
import { OperationError } from '../daemon/operations.js';
import { replaceFile } from './file-io.js';

export const MANIFEST = 'manifest.json';
const FORMAT = 'sheepgate-backup';
const VERSION = 1;

/** Which snapshot of the source has the content of a backup. */
export interface BaseSnapshot {
  readonly tag: string;
  readonly vid: number;
  readonly snapshotAt: number;
}

/** One backup. */
export interface Point {
  /** Counts the backups of a target from 1. */
  readonly id: number;
  /** When the snapshot was taken, ISO 8601. */
  readonly time: string;
  readonly isFull: boolean;
  /** The full image below it, counted from 1. */
  readonly chain: number;
  /** Of the disk, bytes. */
  readonly size: number;
  readonly blockSizeShift: number;
  /** Bytes that a hash covers. */
  readonly blockBytes: number;
  /** Of the disk: blocks that differ from the backup before. */
  readonly changedBytes: number;
  /** ... of which so much was written, other than zeros. */
  readonly storedBytes: number;
  /** Of the table of hashes. */
  readonly sha256: string;
  /** null where none is kept. */
  readonly base: BaseSnapshot | null;
}

/** What a file looked like when it was last written: if it still does, it was not touched. */
export interface Stamp {
  readonly bytes: number;
  readonly mtimeMs: number;
}

export interface Manifest {
  readonly format: typeof FORMAT;
  readonly version: typeof VERSION;
  /** Names the target in the tags of its snapshots. */
  readonly target: string;
  readonly vdi: string;
  /** For people: where it was backed up from last. */
  readonly store: string;
  /** The oldest first. */
  readonly points: readonly Point[];
  /** By path relative to the target's directory. */
  readonly stamps: Readonly<Record<string, Stamp>>;
  /** This backup's increment is being written into the image below it. */
  readonly folding: number | null;
  /** An image that is complete, and about to take the place of the one before it. */
  readonly installing: string | null;
}

export function newManifest(target: string, vdi: string, store: string): Manifest {
  return {
    format: FORMAT,
    version: VERSION,
    target,
    vdi,
    store,
    points: [],
    stamps: {},
    folding: null,
    installing: null,
  };
}

/** undefined if there is none. Errors: DAMAGED, FORMAT. */
export async function readManifest(directory: string): Promise<Manifest | undefined> {
  const file = path.join(directory, MANIFEST);
  let text: string;
  try {
    text = await fs.promises.readFile(file, 'utf8');
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT' || code === 'ENOTDIR') return undefined;
    throw error;
  }
  let found: unknown;
  try {
    found = JSON.parse(text);
  } catch (error) {
    throw new OperationError('DAMAGED', `${file} is damaged: ${(error as Error).message}`, { cause: error });
  }
  const { format, version } = (found ?? {}) as Partial<Record<'format' | 'version', unknown>>;
  if (format !== FORMAT) throw new OperationError('FORMAT', `${file} is not of a sheepgate backup`);
  if (version !== VERSION) {
    throw new OperationError('FORMAT', `${file} is of a version ${String(version)} that this sheepgate does not know`);
  }
  if (!isManifest(found)) throw new OperationError('DAMAGED', `${file} is damaged: fields are missing`);
  return found;
}

export function writeManifest(directory: string, manifest: Manifest): Promise<void> {
  return replaceFile(path.join(directory, MANIFEST), `${JSON.stringify(manifest, undefined, 2)}\n`);
}

type Fields = Readonly<Record<string, unknown>>;

function isManifest(found: unknown): found is Manifest {
  if (!isObject(found)) return false;
  return (
    typeof found.target === 'string' &&
    /^[0-9a-f]{8}$/.test(found.target) &&
    typeof found.vdi === 'string' &&
    typeof found.store === 'string' &&
    Array.isArray(found.points) &&
    found.points.every(isPoint) &&
    isObject(found.stamps) &&
    Object.values(found.stamps).every((stamp) => isObject(stamp) && isCount(stamp.bytes) && isCount(stamp.mtimeMs)) &&
    (found.folding === null || isCount(found.folding)) &&
    (found.installing === null || (typeof found.installing === 'string' && /^base-\d+\.img$/.test(found.installing)))
  );
}

function isPoint(found: unknown): boolean {
  return (
    isObject(found) &&
    ['id', 'chain', 'size', 'blockSizeShift', 'blockBytes', 'changedBytes', 'storedBytes'].every((field) =>
      isCount(found[field]),
    ) &&
    (found.blockBytes as number) > 0 &&
    typeof found.isFull === 'boolean' &&
    typeof found.time === 'string' &&
    !Number.isNaN(Date.parse(found.time)) &&
    typeof found.sha256 === 'string' &&
    (found.base === null ||
      (isObject(found.base) &&
        typeof found.base.tag === 'string' &&
        isCount(found.base.vid) &&
        isCount(found.base.snapshotAt)))
  );
}

function isObject(found: unknown): found is Fields {
  return typeof found === 'object' && found !== null && !Array.isArray(found);
}

function isCount(found: unknown): boolean {
  return Number.isSafeInteger(found) && (found as number) >= 0;
}
