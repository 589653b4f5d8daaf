/**
 * The contract of a store as a whole: its catalog, its identity and its limits. Holds for every store, also for one whose VDIs
 * are not made of objects. The data of one VDI is behind what `Catalog.open` hands out (open-vdi.ts). Nothing here knows
 * exports, names with tags in them, or NBD.
 */
import type { OpenVdi } from './open-vdi.js';
import type { Awaitable, Redundancy, Unfinished, VdiRecord } from './vdi-record.js';

/** A VDI or snapshot that exists and cannot be read. Nothing more is known of it. */
export interface DamagedVdi {
  readonly vid: number;
  /** Its name, concluded from other records; undefined if they do not tell. */
  readonly likelyName: string | undefined;
  /** Undefined if unknown. */
  readonly isSnapshot: boolean | undefined;
  /** For people. */
  readonly why: string;
}

/**
 * Few and short facts of src/vdi that must outlive the process: keys of less than 1900 bytes, values that JSON can hold. The
 * store does not know their meaning.
 */
export interface StoreState {
  /** Other processes may change entries at the same time: read `entries` again where that matters. */
  readonly isShared: boolean;
  entries(): ReadonlyMap<string, unknown>;
  /** Durable when it resolves; the value undefined removes an entry. Errors: StoreError. */
  commit(changes: ReadonlyMap<string, unknown>): Promise<void>;
}

/** Work of a store in the background: objects that lie over each other are put together again. */
export interface MergeState {
  /** Objects that are to be merged. */
  readonly overlays: number;
  /** Bytes that have to be moved for that. */
  readonly bytes: number;
  readonly isPaused: boolean;
}

export interface Merging {
  /** What is left to be done. */
  state(): Promise<MergeState>;
  /** Until it is resumed or the store is closed. */
  pause(isPaused: boolean): void;
}

export interface ObjectStore {
  /** For messages: where the store is. */
  readonly location: string;
  /** The same for this store whatever its location is called, and different for every other store. */
  readonly identity: string;
  /** Why nothing may be changed; undefined if it may. */
  readonly readOnlyBecause: string | undefined;
  /** For new VDIs without a shift of their own. Absent: DEFAULT_BLOCK_SIZE_SHIFT. */
  readonly defaultBlockSizeShift?: number;
  /** Undefined if this process can store nothing of its own. */
  readonly state: StoreState | undefined;
  readonly catalog: Catalog;
  /** Absent: the store has nothing to merge. */
  readonly merging?: Merging;
  /** This process will close the store soon: shown to other processes that wait for its lock. Absent: nobody waits. */
  announceStop?(): void;
  /** The command that opened the store has failed: `close` removes a store that this opening has created, if it is empty. */
  takeBackCreation?(): void;
  close(): Promise<void>;
}

/** A lock that the nodes of a cluster have on a VDI: `shared` ones belong to iSCSI targets, which coordinate their writes. */
export interface VdiLock {
  /** It may be the vid of a snapshot now. */
  readonly vid: number;
  /** The VDI was deleted. A new VDI that gets this id would be locked. */
  readonly isDeleted: boolean;
  readonly kind: 'exclusive' | 'shared';
  readonly holders: readonly LockHolder[];
}

/** The node through which the lock was taken. Nodes do not know which client took it, nor whether that client still exists. */
export interface LockHolder {
  /** HOST:PORT, as the cluster knows it. */
  readonly node: string;
  readonly isMember: boolean;
}

/** Locks that a cluster's nodes keep; a local store has none. */
export interface VdiLocks {
  /** Whether the nodes refuse a VDI that is locked by another. */
  readonly areEnforced: boolean;
  list(): Promise<readonly VdiLock[]>;
  /** Remove the lock of this holder, even if it is in use. Errors: IO (the lock is still there afterwards). */
  unlock(lock: VdiLock, holder: LockHolder): Promise<void>;
}

export interface CheckReport {
  readonly objects: number;
  readonly vdis: number;
  /** Human-readable findings, worst first; empty for a sound store. */
  readonly problems: readonly string[];
  readonly orphans: number;
  readonly orphanBytes: number;
  readonly repaired: number;
}

/**
 * Allocated objects of a VDI, and how many of them no other VDI or snapshot refers to. A DiskVdi counts by the same size,
 * 2^blockSizeShift bytes.
 */
export interface Usage {
  readonly allocated: number;
  readonly exclusive: number;
  /** Why neither is known: a part of the map is lost. */
  readonly damage?: string;
  /** What is left to be merged of its objects, if anything. Only of one VDI, not in `usages`. */
  readonly merging?: { readonly overlays: number; readonly bytes: number };
}

/**
 * The VDIs and snapshots of a store. Each method succeeds or changes nothing. src/vdi runs one change at a time on each name;
 * changes on different names may run at the same time.
 */
export interface Catalog {
  /** Sorted by `inOrder`. The result does not change afterwards. */
  list(): Awaitable<readonly VdiRecord[]>;
  /** The records of one name, sorted. The cost depends on their number, not on the size of the store. */
  named(name: string): Awaitable<readonly VdiRecord[]>;
  record(vid: number): Awaitable<VdiRecord | undefined>;
  /** VDIs that `list` leaves out because they cannot be read; with `name`, those that may have that name. Absent: never any. */
  damaged?(name?: string): Promise<readonly DamagedVdi[]>;
  /** Other names whose records `remove(vid)` changes. Absent: none. */
  touchedBy?(vid: number): readonly string[];
  /** `unfinished`: the mark that the VDI has from its first moment on. `redundancy`: accepted by `mustHold` before. */
  create(
    name: string,
    size: number,
    blockSizeShift: number,
    unfinished?: Unfinished,
    redundancy?: Redundancy,
  ): Promise<VdiRecord>;
  /** Whether `create` was interrupted before it set the mark: the VDI is empty then. Absent: that cannot happen. */
  isBarelyMade?(record: VdiRecord): Promise<boolean>;
  /** Open for reading and, unless it is a snapshot, writing. Called again while a VDI is open, it may return the same object. */
  open(vid: number): Promise<OpenVdi>;
  /** Why a new snapshot cannot have this tag here; undefined if it can. */
  whyNoTag?(tag: string): string | undefined;
  /**
   * Temporary snapshots exist in the memory of this process only. src/vdi then takes them of a read-only store as well, and
   * removes stored snapshots with reserved tags: an earlier version has left them. Absent: they are stored.
   */
  readonly temporariesStoreNothing?: boolean;
  /** A new working VDI `name` that reads as snapshot `vid`, which is not temporary. */
  clone(vid: number, name: string): Promise<VdiRecord>;
  /**
   * Replace the working VDI `vid` by a new one that reads as the snapshot `snapshotVid`, which is not temporary, with the mark
   * `unfinished` or none.
   */
  rollback(vid: number, snapshotVid: number, unfinished?: Unfinished): Promise<VdiRecord>;
  /** Drop the record and all references. Objects without references are removed in the background: see `reclaimed`. */
  remove(vid: number): Promise<void>;
  /** Resolves when the space of everything removed so far is given back. */
  reclaimed(): Promise<void>;
  usage(vid: number): Awaitable<Usage>;
  /** Usage of all that `list` returns, by vid, in one pass. VDIs made or removed meanwhile may be missing. */
  usages(): Awaitable<ReadonlyMap<number, Usage>>;
  check(options: { readonly repair: boolean }): Promise<CheckReport>;
  /** Absent: the store keeps no locks. */
  readonly locks?: VdiLocks;
  /** Absent: the store keeps every object once, and takes no redundancy. Errors: LIMIT (not enough nodes for it). */
  mustHold?(redundancy: Redundancy): Promise<void>;
}
