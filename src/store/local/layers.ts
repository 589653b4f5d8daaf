/**
 * What the parts of layered objects share: the files of both kinds, what is known of overlays, and how files of segments are told
 * from those of whole objects. Does nothing.
 */
import type { KeyTurns } from './key-turns.js';
import type { ObjectFiles } from './object-files.js';
import { SEGMENT_OBJECTS, type Overlays } from './overlays.js';
import type { ReferenceCounts } from './reference-counts.js';

/** Added to the key of a segment file to tell it from the key of a whole object: above all of those. */
const SEGMENT_FILE = 2 ** 45;

/** The file of a segment, as `sync` and `syncNames` know it. */
export function segmentFile(segment: number): number {
  return SEGMENT_FILE + segment;
}

export function isSegmentFile(file: number): boolean {
  return file >= SEGMENT_FILE;
}

/** The segment (segmentOf) whose file this is. */
export function segmentOfFile(file: number): number {
  return file - SEGMENT_FILE;
}

/** What an overlay and everything below it share. */
export interface Layers {
  readonly whole: ObjectFiles;
  readonly segments: ObjectFiles;
  readonly overlays: Overlays;
  readonly references: ReferenceCounts;
  readonly turns: KeyTurns;
  /** Whether the store has the format with overlays, and the folder of segment files. */
  readonly isReady: boolean;
  /** Gives it both, durably. */
  prepare(): Promise<void>;
}

/** Where a byte of the overlay (vid, idx) is in its segment file. */
export function segmentOffset(segments: ObjectFiles, vid: number, idx: number, offset: number): number {
  return ((idx % SEGMENT_OBJECTS) * segments.lengthOf(vid)) / SEGMENT_OBJECTS + offset;
}
