/**
 * What identifies a migration, and one run of it: its options, its two stores, and the names of the marks that it leaves in
 * them. Owns the form of those names; the same migration finds the marks of its earlier runs by them.
 */
import { createHash, randomBytes } from 'node:crypto';
import type { Operations } from '../../operations/operations.js';
import type { Redundancy } from '../../store/vdi-record.js';
import { bytesOfText } from '../../text/name-bytes.js';
import { formatSpec, labelOfRun } from '../../vdi/names.js';
import type { JobContext } from '../reporting.js';

/** What is compared: 'all'; 'changed', only what this run copies; 'only', everything, and nothing is copied. */
export type Verify = 'all' | 'changed' | 'only';

export interface MigrationOptions extends JobContext {
  readonly name: string;
  /** Its name in the target. */
  readonly newName: string;
  /** Rename snapshots whose tags the target cannot have. */
  readonly renamesTags?: boolean;
  /** More runs follow: leave the mark from which they continue. */
  readonly sync: boolean;
  readonly verify: Verify;
  /** Compute the SHA-256 of the images. */
  readonly sha256: boolean;
  /** The source may only be read. */
  readonly isReadOnly: boolean;
  /** Of the VDI in the target, if that is a cluster and the VDI is made. */
  readonly redundancy?: Redundancy | undefined;
  /** Of the objects in the target, if the VDI is made; undefined for the target's own, or that of the source. */
  readonly blockSizeShift?: number | undefined;
  /** Also if a client that was cut off from the target may come back. */
  readonly force?: boolean | undefined;
}

const ID_DIGITS = 12;
const RUN_BYTES = 8;
const MIGRATED = 'migrated-';
/** Tag in the source while its present content is read, where a temporary snapshot is not possible. */
const READING = 'migrate-';
const MARK = new RegExp(`^${MIGRATED}[0-9a-f]{${ID_DIGITS}}$`);
const READING_MARK = new RegExp(`^${READING}[0-9a-f]{${ID_DIGITS}}$`);

export interface MigrationRun {
  readonly source: Operations;
  readonly target: Operations;
  readonly options: MigrationOptions;
  /** How messages and requests to the source name the VDI. */
  readonly sourceSpec: string;
  /** In the unfinished mark of the target: which migration it is. */
  readonly id: string;
  /** ... and which run of it. */
  readonly run: string;
  /** Tag of the snapshot that the target has between two runs. */
  readonly migratedTag: string;
  /** Tag of the snapshot that the present content of the source is read from, where it has to be a lasting one. */
  readonly readingTag: string;
  /** Label of the temporary snapshot, where that is possible. */
  readonly readingLabel: string;
}

export function beginRun(source: Operations, target: Operations, options: MigrationOptions): MigrationRun {
  const { name, newName } = options;
  const id = idOf(source.identity, name);
  // Two runs to two targets read from snapshots of their own.
  const readingTag = READING + idOf(source.identity, name, target.identity, newName);
  return {
    source,
    target,
    options,
    sourceSpec: formatSpec({ name, tag: undefined }),
    id,
    run: randomBytes(RUN_BYTES).toString('hex'),
    migratedTag: MIGRATED + id,
    readingTag,
    // A run that was killed may still have its snapshot: this one takes its own.
    readingLabel: labelOfRun(readingTag),
  };
}

/** Whether a tag marks the target of an unfinished migration, whichever that is. */
export function isMigrationMark(tag: string): boolean {
  return MARK.test(tag);
}

/** Whether a tag is that of a snapshot which a migration reads from. */
export function isReadingMark(tag: string): boolean {
  return READING_MARK.test(tag);
}

function idOf(...parts: readonly string[]): string {
  return createHash('sha256')
    .update(bytesOfText(parts.join('\0')))
    .digest('hex')
    .slice(0, ID_DIGITS);
}
