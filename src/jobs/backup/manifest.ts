/**
 * The manifest of a backup target, manifest.json, which is replaced atomically. Owns its format and the validation of what is
 * read. A backup exists if and only if the manifest lists it; files that it does not name are leftovers.
 */
import path from 'node:path';
import { OperationError } from '../../operations/operations.js';
import type { HostDisk } from '../../system/disk.js';
import { MAX_BLOCK_BYTES, MAX_BLOCKS } from '../block-hashes.js';
import { readWhole, replaceFile } from '../target-files.js';

export const MANIFEST = 'manifest.json';
const FORMAT = 'sheepgate-backup';
/** In version 1 the tree hash was called sha256. */
const VERSION = 2;
/** Backups in one target: more than a year of hourly backups. Reading one keeps the file of each earlier one open. */
export const MAX_POINTS = 10_000;
/** A backup takes about 700 bytes in it. */
const MAX_MANIFEST_BYTES = 16 * 2 ** 20;
const MIN_BLOCK_BYTES = 2 ** 16;

/** The snapshot of the source that has the content of a backup. */
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
  /** The number of the full image below it, from 1. */
  readonly chain: number;
  /** Of the disk, in bytes. */
  readonly size: number;
  readonly blockSizeShift: number;
  /** The bytes that one hash covers. */
  readonly blockBytes: number;
  /** Bytes of the blocks that differ from the backup before. */
  readonly changedBytes: number;
  /** Bytes of data, without zeros, that were written for them. */
  readonly storedBytes: number;
  /** BlockHashes.treeHash. */
  readonly treeHash: string;
  /** Of the whole image, as sha256sum computes it; only if requested. */
  readonly sha256?: string;
  /** null if no snapshot is kept. */
  readonly base: BaseSnapshot | null;
}

/** Size and time of a file after it was last written: a file that still has them was not touched. */
export interface Stamp {
  readonly bytes: number;
  readonly mtimeMs: number;
}

export interface Manifest {
  readonly format: typeof FORMAT;
  readonly version: typeof VERSION;
  /** Identifies the target in the tags of its snapshots. */
  readonly target: string;
  readonly vdi: string;
  /** For people: the store of the last backup. */
  readonly store: string;
  /** The oldest first. */
  readonly points: readonly Point[];
  /** By path relative to the target's directory. */
  readonly stamps: Readonly<Record<string, Stamp>>;
  /** The backup whose increment is being written into the image below it. */
  readonly folding: number | null;
  /** The name of a complete image that is about to replace the one before it. */
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

/** undefined if there is none. Errors: DAMAGED, FORMAT, BAD_TARGET. */
export async function readManifest(disk: HostDisk, directory: string): Promise<Manifest | undefined> {
  const file = path.join(directory, MANIFEST);
  let text: string;
  try {
    text = (await readWhole(disk, file, MAX_MANIFEST_BYTES)).toString();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
  let found: unknown;
  try {
    found = JSON.parse(text);
  } catch (error) {
    throw new OperationError('DAMAGED', `${file} is damaged: ${(error as Error).message}`, { cause: error });
  }
  const { format, version } = (found ?? {}) as Partial<Record<'format' | 'version', unknown>>;
  if (format !== FORMAT) throw new OperationError('FORMAT', `${file} is not the manifest of a sheepgate backup`);
  if (version !== VERSION && version !== 1) {
    throw new OperationError(
      'FORMAT',
      `${file} has version ${JSON.stringify(version ?? null).slice(0, 20)}, which this sheepgate does not support`,
    );
  }
  const current = version === 1 ? fromVersion1(found as Fields) : found;
  const wrong = whatIsWrong(current);
  if (wrong !== undefined) throw new OperationError('DAMAGED', `${file} is damaged: ${wrong}`);
  return current as Manifest;
}

export function writeManifest(disk: HostDisk, directory: string, manifest: Manifest): Promise<void> {
  const text = `${JSON.stringify(manifest, undefined, 2)}\n`;
  return replaceFile(disk, path.join(directory, MANIFEST), Buffer.from(text));
}

type Fields = Readonly<Record<string, unknown>>;

/** Version 1 had another name for the tree hash; the rest is the same. */
function fromVersion1(found: Fields): Fields {
  if (!Array.isArray(found.points)) return found;
  const points = found.points.map((point: unknown) => {
    if (!isObject(point)) return point;
    const { sha256, ...rest } = point;
    return { ...rest, treeHash: sha256 };
  });
  return { ...found, version: VERSION, points };
}

/** undefined if it is valid. Strings in it may come from anybody; they are escaped when they are printed. */
function whatIsWrong(found: unknown): string | undefined {
  const fields = 'fields are missing or invalid';
  if (!isObject(found)) return fields;
  const { target, points, stamps, folding, installing } = found;
  const isWhole =
    typeof target === 'string' &&
    /^[0-9a-f]{8}$/.test(target) &&
    typeof found.vdi === 'string' &&
    typeof found.store === 'string' &&
    Array.isArray(points) &&
    isObject(stamps) &&
    (folding === null || isCount(folding)) &&
    (installing === null || (typeof installing === 'string' && /^base-\d{1,16}\.img$/.test(installing)));
  if (!isWhole) return fields;
  if (points.length > MAX_POINTS)
    return `it lists ${points.length} backups, and a target can have at most ${MAX_POINTS}`;
  if (!Object.values(stamps).every((stamp) => isObject(stamp) && isCount(stamp.bytes) && isCount(stamp.mtimeMs))) {
    return fields;
  }
  let before = { id: 0, chain: 0 };
  for (const point of points) {
    if (!isPoint(point, target)) return fields;
    if (point.id <= before.id || point.chain < before.chain) return 'its backups are not in order';
    if (Math.ceil(point.size / point.blockBytes) > MAX_BLOCKS) {
      return `backup ${point.id} has ${point.size} bytes in blocks of ${point.blockBytes}, more than a backup can have`;
    }
    before = point;
  }
  return undefined;
}

function isPoint(found: unknown, target: string): found is Point {
  return (
    isObject(found) &&
    ['id', 'chain', 'size', 'blockSizeShift', 'blockBytes', 'changedBytes', 'storedBytes'].every((field) =>
      isCount(found[field]),
    ) &&
    isBlockSize(found.blockBytes as number) &&
    typeof found.isFull === 'boolean' &&
    typeof found.time === 'string' &&
    // File names are made of it.
    /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z$/.test(found.time) &&
    !Number.isNaN(Date.parse(found.time)) &&
    isHash(found.treeHash) &&
    (found.sha256 === undefined || isHash(found.sha256)) &&
    (found.base === null || isBase(found.base, `backup-${target}-${found.id as number}`))
  );
}

function isBase(found: unknown, tag: string): boolean {
  return isObject(found) && found.tag === tag && isCount(found.vid) && isCount(found.snapshotAt);
}

function isBlockSize(bytes: number): boolean {
  return bytes >= MIN_BLOCK_BYTES && bytes <= MAX_BLOCK_BYTES && Number.isInteger(Math.log2(bytes));
}

function isHash(found: unknown): boolean {
  return typeof found === 'string' && /^[0-9a-f]{64}$/.test(found);
}

function isObject(found: unknown): found is Fields {
  return typeof found === 'object' && found !== null && !Array.isArray(found);
}

function isCount(found: unknown): boolean {
  return Number.isSafeInteger(found) && (found as number) >= 0;
}
