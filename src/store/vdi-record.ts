/**
 * The record of a VDI or snapshot, as every store reports it, and the limits of a VDI. Types and constants only: nothing here
 * reads or writes a store.
 */

export type Awaitable<T> = T | Promise<T>;

/** Limits of a normal Sheepdog VDI (sheepdog_proto.h, SD_MAX_VDI_LEN, MAX_DATA_OBJS): names and the size of the table. */
export const MAX_DATA_OBJECTS = 2 ** 20;
export const MIN_BLOCK_SIZE_SHIFT = 20;
export const MAX_BLOCK_SIZE_SHIFT = 26;
export const DEFAULT_BLOCK_SIZE_SHIFT = 22;

/** Commands that fill a VDI from elsewhere, and can be ended midway. */
export const FILLERS = ['import', 'restore', 'migrate'] as const;

/**
 * The mark of a working VDI that a command fills, from before its first byte until all of it is durable: meanwhile the content
 * is neither the old one nor the complete new one.
 */
export interface Unfinished {
  readonly by: (typeof FILLERS)[number];
  /** Identifies the content, hex digits: only a command with the same content continues. Empty: any command of its kind. */
  readonly of: string;
  /** The run of the command that works on it, or worked on it last: hex digits that no other run has. */
  readonly run: string;
  /** Milliseconds since the epoch. */
  readonly since: number;
  /** The command has made the VDI: it was empty before. */
  readonly isNew: boolean;
}

/** How a cluster keeps each object, on as many nodes: whole copies, or the strips of an erasure code. */
export type Redundancy = { readonly copies: number } | { readonly dataStrips: number; readonly parityStrips: number };

/** One VDI or snapshot. `size` in bytes, times in milliseconds since the epoch. */
export interface VdiRecord {
  readonly vid: number;
  readonly name: string;
  /** The snapshot's tag; empty for the working VDI. */
  readonly tag: string;
  readonly isSnapshot: boolean;
  /** Counts the snapshots of a name from 1, in the order they were taken; the working VDI has the next one. */
  readonly snapId: number;
  readonly size: number;
  readonly blockSizeShift: number;
  /** The snapshot this VDI continues or was cloned from; 0 for none. */
  readonly parentVid: number;
  readonly createdAt: number;
  /** When it became a snapshot; 0 for a working VDI. */
  readonly snapshotAt: number;
  /** The most objects it may have, where that is not MAX_DATA_OBJECTS (hyper volumes). src/vdi resizes it up to that. */
  readonly maxObjects?: number;
  /** On a working VDI that a command has begun to fill and not finished. */
  readonly unfinished?: Unfinished;
  /**
   * A temporary snapshot that this machine has taken (`prepareTemporary`) and may drop. The tag does not tell: other tools of a
   * cluster may give any tag to a permanent snapshot.
   */
  readonly isTemporary?: true;
  /** A snapshot whose tag may also mean another snapshot of its name (other tools can cause that): only its vid is clear. */
  readonly isDoubtful?: true;
  /** Of a cluster. Absent: the store keeps every object once. */
  readonly redundancy?: Redundancy;
}

/** For people: NAME or NAME@TAG. Not always a spec that finds the record: that is `specOf`. */
export function labelOfVdi({ name, tag, isSnapshot }: VdiRecord): string {
  return isSnapshot ? `${name}@${tag}` : name;
}

/**
 * The order of `Catalog.list`: by name, then as snapshots were taken, the working VDI last. A temporary snapshot may have the
 * `snapId` of its working VDI.
 */
export function inOrder(a: VdiRecord, b: VdiRecord): number {
  if (a.name !== b.name) return a.name < b.name ? -1 : 1;
  return a.snapId - b.snapId || Number(b.isSnapshot) - Number(a.isSnapshot);
}
