/**
 * The contract of a store as a whole: its catalog, its identity and its limits. The data of one VDI is behind what
 * `Catalog.open` hands out (open-vdi.ts). Nothing here knows exports, names with tags in them, or NBD.
 */
import type { OpenVdi } from './open-vdi.js';
import type { Awaitable, Redundancy, Unfinished, VdiRecord } from './vdi-record.js';

export * from './open-vdi.js';
export * from './store-error.js';
export * from './vdi-record.js';

/** A VDI or snapshot that is known to be there, and cannot be read: nothing but what is said here is known of it. */
export interface DamagedVdi {
  readonly vid: number;
  /** Whose it was, going by what else there is; undefined if that tells nothing. */
  readonly likelyName: string | undefined;
  /** Undefined if nothing tells. */
  readonly isSnapshot: boolean | undefined;
  /** For people. */
  readonly why: string;
}

/**
 * Small facts that are to outlive the process, few and short, for src/vdi: keys of less than 1900 bytes, values that JSON can
 * say. The store does not know what they mean.
 */
export interface StoreState {
  /** Other processes may store something at the same time: `entries` is to be asked again. */
  readonly isShared: boolean;
  entries(): ReadonlyMap<string, unknown>;
  /** Durable when it resolves; undefined forgets. Errors: StoreError. */
  commit(changes: ReadonlyMap<string, unknown>): Promise<void>;
}

export interface ObjectStore {
  /** For messages: where the store is. */
  readonly location: string;
  /** Tells this store from all others, however it is reached. */
  readonly identity: string;
  /** Why nothing may be changed; undefined if it may. */
  readonly readOnlyBecause: string | undefined;
  /** Of VDIs that are made and do not say otherwise; DEFAULT_BLOCK_SIZE_SHIFT if the store has none of its own. */
  readonly defaultBlockSizeShift?: number;
  /** Undefined if nothing can be stored. */
  readonly state: StoreState | undefined;
  readonly catalog: Catalog;
  close(): Promise<void>;
}

/** A lock that the nodes of a cluster have on a VDI: `shared` ones are iSCSI targets', which know of each other. */
export interface VdiLock {
  /** Which may be a snapshot's by now. */
  readonly vid: number;
  /** There is no such VDI any more, but who made one that gets this id would find it locked. */
  readonly isDeleted: boolean;
  readonly kind: 'exclusive' | 'shared';
  readonly holders: readonly LockHolder[];
}

/** The node that was asked for the lock. Nodes do not know which client that was, nor whether it is still there. */
export interface LockHolder {
  /** HOST:PORT, as the cluster knows it. */
  readonly node: string;
  readonly isMember: boolean;
}

/** Locks that a cluster's nodes keep; a local store has none. */
export interface VdiLocks {
  /** Whether they keep anybody out. */
  readonly areEnforced: boolean;
  list(): Promise<readonly VdiLock[]>;
  /** Take this one away from this holder, whoever relies on it. Errors: StoreError IO if it is still there then. */
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

/** Allocated objects of a VDI, and how many of them no other VDI or snapshot refers to. */
export interface Usage {
  readonly allocated: number;
  readonly exclusive: number;
  /** Why neither can be told: a part of its map is lost. */
  readonly damage?: string;
}

/**
 * VDI records and maps. Each method is all or nothing. Callers (src/vdi) see to it that what changes something is the only
 * one at work on the names that it touches; on different names several may be at work at a time.
 */
export interface Catalog {
  /** In the order of names, and of one name in that of snapIds. What is returned does not change afterwards. */
  list(): Awaitable<readonly VdiRecord[]>;
  /** Those of one name, in that order: costs as much as there are of it, and not what the store has. */
  named(name: string): Awaitable<readonly VdiRecord[]>;
  record(vid: number): Awaitable<VdiRecord | undefined>;
  /** What `list` cannot have, because it cannot be read; with `name`, what may be of that name. Absent: nothing ever is. */
  damaged?(name?: string): Promise<readonly DamagedVdi[]>;
  /** Other names whose records change when this one is removed. */
  touchedBy?(vid: number): readonly string[];
  /** With the mark `unfinished` from its first moment on, if that is given. `redundancy`: one that `mustHold` has let pass. */
  create(
    name: string,
    size: number,
    blockSizeShift: number,
    unfinished?: Unfinished,
    redundancy?: Redundancy,
  ): Promise<VdiRecord>;
  /** Whether `create` was cut off before it could set the mark, if that can be: nothing is in the VDI then. */
  isBarelyMade?(record: VdiRecord): Promise<boolean>;
  /** Open for reading and, if it is not a snapshot, writing. */
  open(vid: number): Promise<OpenVdi>;
  /** Why a new snapshot cannot have this tag here; undefined if it can. */
  whyNoTag?(tag: string): string | undefined;
  /** Those are in memory only: they can be taken of a store that must not be changed, too. */
  readonly temporariesStoreNothing?: boolean;
  /** A new working VDI `name` that reads as snapshot `vid`. */
  clone(vid: number, name: string): Promise<VdiRecord>;
  /** The working VDI `vid` becomes a fresh one that reads as `snapshotVid`, and bears no mark but `unfinished`. */
  rollback(vid: number, snapshotVid: number, unfinished?: Unfinished): Promise<VdiRecord>;
  /** Drop the record and all references; objects that nobody refers to are removed, `reclaimed` tells when. */
  remove(vid: number): Promise<void>;
  /** Resolves when the space of all that was dropped so far is given back. */
  reclaimed(): Promise<void>;
  usage(vid: number): Awaitable<Usage>;
  /** Of all that `list` has, by vid, in one pass; what comes or goes meanwhile may be missing. */
  usages(): Awaitable<ReadonlyMap<number, Usage>>;
  check(options: { readonly repair: boolean }): Promise<CheckReport>;
  /** Of a cluster. */
  readonly locks?: VdiLocks;
  /** Of a cluster: whether it has nodes enough for this. Errors: LIMIT if not. */
  mustHold?(redundancy: Redundancy): Promise<void>;
}
