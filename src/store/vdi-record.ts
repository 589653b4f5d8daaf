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
 * What a working VDI bears from before the first byte of a command that fills it until all of it is durable: what is in
 * it is neither what it was nor what it shall be.
 */
export interface Unfinished {
  readonly by: (typeof FILLERS)[number];
  /** What is carried there, as hex digits: only a command that carries the same goes on with it. Empty: any of its kind. */
  readonly of: string;
  /** The run of the command that is at work on it, or was the last: hex digits that no other run has. */
  readonly run: string;
  /** Milliseconds since the epoch. */
  readonly since: number;
  /** The command has made the VDI: nothing was in it before. */
  readonly isNew: boolean;
}

/** What a cluster keeps of each object, on as many nodes: whole copies, or the strips of an erasure code. */
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
  /** Objects that it may have, if they are not MAX_DATA_OBJECTS. */
  readonly maxObjects?: number;
  /** Of a working VDI that a command has begun to fill and not finished. */
  readonly unfinished?: Unfinished;
  /**
   * A temporary snapshot that this machine has taken (`prepareTemporary`), and may drop. Not said by its tag: other tools of a
   * cluster may give any tag to a snapshot that stays.
   */
  readonly isTemporary?: true;
  /** A snapshot whose tag may also say another one of its name, as other tools can bring about: its vid says which is meant. */
  readonly isDoubtful?: true;
  /** In a cluster. A local store keeps every object once, and says nothing. */
  readonly redundancy?: Redundancy;
}

/** The order of `Catalog.list`: by name, then as snapshots were taken. */
export function inOrder(a: VdiRecord, b: VdiRecord): number {
  return a.name < b.name ? -1 : a.name > b.name ? 1 : a.snapId - b.snapId;
}
