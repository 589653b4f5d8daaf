/**
 * What the store suite needs to know about a store, and what the store must offer to be tested: to add a store, describe it with
 * these two interfaces and hand it to `storeSuite` (suite.ts). Owns no store: local.ts, clusters.ts and memory.ts describe
 * today's.
 */
import type { VdiCatalog } from '../../src/vdi/catalog.js';

/**
 * One kind of store for the tests; not the StoreKind of src/store/locations.ts. The suite starts it once and runs all its tests
 * on it, each with VDIs of its own.
 */
export interface StoreKind {
  /** Part of the titles of the tests. */
  readonly label: string;
  /** Why this machine cannot test it; undefined if it can. Printed. */
  readonly missing?: string | undefined;
  readonly abilities: Abilities;
  /** How much of what is repeated is repeated here: 1, or less for a store whose operations take much CPU time. */
  readonly effort: number;
  /** Random sequences of the property test, by the length of the run (test/harness/length.ts). */
  readonly sequences: { readonly quick: number; readonly full: number; readonly long: number };
  start(): Promise<StoreUnderTest>;
}

/** A part of the suite is left out for a store that cannot do what it is about. Unless stated otherwise, today's stores can do all. */
export interface Abilities {
  /** In bytes, of the VDIs that the suite makes; a power of two. */
  readonly objectSize: number;
  /** False: the store can only be read, and `StoreUnderTest.content` says what is in it. */
  readonly canWrite: boolean;
  readonly canSnapshot: boolean;
  /** Temporary snapshots (NAME@now). */
  readonly canSnapshotTemporarily: boolean;
  /** Clones and rollbacks. */
  readonly canClone: boolean;
  readonly canResize: boolean;
  /** What was written is there when the store is closed and opened again. */
  readonly keepsState: boolean;
  /** `Vdi.isHole` knows of objects that were never written. False: the store has to be asked, which takes time. */
  readonly knowsHolesAtOnce: boolean;
  /** `Vdi.changedSince` is exact to an object of `objectSize`. */
  readonly tellsChanges: boolean;
  /** `Vdi.copies` counts the objects that a first write after a snapshot has copied. */
  readonly countsCopies: boolean;
  /** The first write to an object that a snapshot shares stores the blocks that it touches. False: it copies the object. */
  readonly copiesBlocks: boolean;
  /**
   * An object that no snapshot shares any more is written in place. Not on a cluster: an object of a deleted snapshot bears the
   * snapshot's vid, and the next write copies it once more.
   */
  readonly copiesEndWithSnapshots: boolean;
}

/** A store that runs. The suite has it open once at a time. */
export interface StoreUnderTest {
  /** Open the store, or open it again after it was closed. Temporary snapshots of an earlier opening may still be listed. */
  open(): Promise<VdiCatalog>;
  /** End what `open` has opened as SIGKILL and a power loss do: only what was flushed is there at the next `open`. */
  crash(): Promise<void>;
  /** Names of all that takes up space for data, after what was given up so far is gone. */
  objects(): Promise<string[]>;
  /** Take a snapshot behind the store's back, as another tool of the cluster does. Absent: nobody else can. */
  snapshotFromOutside?(name: string, tag: string): Promise<void>;
  /** Do the work that the store does in the background when nobody disturbs it. Absent: there is none. */
  settle?(): Promise<void>;
  /** What the other side (a stand-in for nodes) has to complain about. */
  violations?(): readonly string[];
  /** Of a store that can only be read: what each VDI and snapshot holds, by NAME or NAME@TAG. */
  readonly content?: ReadonlyMap<string, Buffer>;
  stop(): Promise<void>;
}
