/**
 * What src/vdi asks of a store: objects addressed by (vid, idx), and the records of VDIs. Implemented by the local store
 * and the sheep store. Nothing here knows about exports, names with tags in them, or NBD.
 */

export type Awaitable<T> = T | Promise<T>;

/** The data object of VDI `vid` at index `idx` within the disk. */
export interface Owner {
  readonly vid: number;
  readonly idx: number;
}

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

/** The order of `Catalog.list`: by name, then as snapshots were taken. */
export function inOrder(a: VdiRecord, b: VdiRecord): number {
  return a.name < b.name ? -1 : a.name > b.name ? 1 : a.snapId - b.snapId;
}

/**
 * A VDI that is open: its record and its object map. The map is the truth about who owns what; the store persists it
 * with `flush`. Held by src/vdi for as long as anybody has the VDI open.
 */
export interface OpenVdi {
  readonly record: VdiRecord;
  /** idx -> vid of the object's owner, 0 = unallocated. Length is the number of objects of the disk. */
  readonly map: Uint32Array;
  /** The vid that createObject makes objects under now: the record's, or one that no snapshot has seen. */
  readonly creationVid: number;
  /** Reads its objects, if they are not what the store's own reading would say. */
  readonly reader?: ObjectReader;
  /** Why it can be read no more: a temporary snapshot that has ended, or a VDI that somebody else has deleted or taken. */
  readonly failure?: Error | undefined;
  /**
   * Where others may change what is open here: see what they have made of it. `record`, `map` and `failure` say so after it.
   * Errors: `failure`, and the store's.
   */
  look?(): Promise<void>;
  /**
   * A snapshot by copy-before-write only: the first index in [idx, end) whose object was changed in place since, and has the
   * same owner; `end` if there is none.
   */
  nextOverwritten?(idx: number, end: number): number;
  /** No other VDI or snapshot refers to the object at idx, so it may be written in place. Only for allocated idx. */
  exclusive(idx: number): boolean;
  /** Before the exclusive object at idx is changed in place, what is there is kept aside for a temporary snapshot. */
  isKeptAside?(idx: number): boolean;
  /**
   * Point idx at the object that `createObject` has just made for it, or at nothing with 0. Durable with the next flush,
   * never before the data is.
   */
  setOwner(idx: number, owner: number): Awaitable<void>;
  /** All data and map changes that were complete when it was called are durable when it resolves. */
  flush(): Promise<void>;
  /** Like flush, for what was written to one object: cheap if its map entry is already durable. */
  flushObject(idx: number): Promise<void>;
  /** Nobody has the VDI open any more; unflushed changes are flushed first. */
  close(): Promise<void>;
}

export interface ZeroOptions {
  /** Keep the range allocated. */
  readonly noHole: boolean;
}

/** A snapshot in two steps, so that writers are held for the first only. */
export interface Switch {
  /**
   * Writers held: from here on the present content is the snapshot's. The local store does it synchronously, so that its
   * writers wait for nothing; a cluster needs requests. If it fails nothing has changed.
   */
  switchOver(): Awaitable<void>;
  /** Make that durable. On failure it is undone as if the snapshot had been deleted at once. */
  finish(): Promise<VdiRecord>;
  /**
   * Writers need not be held: `switchOver` is synchronous, and what is being written at that moment may be in the snapshot, in
   * part too, until it is answered. `finish` is called when all of that is.
   */
  readonly holdsNobody?: boolean;
}

/** How objects are read. `vid` is what the map of whoever reads says about idx, and not 0. */
export interface ObjectReader {
  /** Fill `into` from the object; absent bytes read as zeros. The object must exist. */
  readObject(vid: number, idx: number, offset: number, into: Buffer): Awaitable<void>;
  /** Bring a range into the operating system's cache; a hint. */
  cacheObject(vid: number, idx: number, offset: number, length: number): Awaitable<void>;
  /** Report the data and hole ranges of an object, in order, without reading data. */
  objectExtents(
    vid: number,
    idx: number,
    offset: number,
    length: number,
    sink: (offset: number, length: number, hole: boolean) => boolean,
  ): Awaitable<void>;
  /** Whether objectExtents would say at once that all of the object is data. Absent: of no object is that known. */
  isAllData?(vid: number, idx: number): boolean;
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

/** Reads of a disk that are under way: one more when a read begins, one less when it has ended. */
export interface ReadCount {
  inFlight: number;
}

export interface ObjectStore extends ObjectReader {
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
  /** A client is about to read this range of the disk: a hint for stores that read ahead, and want to be told the end too. */
  noteRead?(vdi: OpenVdi, offset: number, length: number): ReadCount;
  /** In place, into an existing exclusive object. */
  writeObject(vdi: OpenVdi, idx: number, offset: number, data: Buffer): Awaitable<void>;
  /**
   * Make the object (vdi's creationVid, idx): all zeros, or reading as `copyOf`, with `data` laid over it at `offset`. Replaces
   * leftovers of that name. The map is not touched: the caller swings it after this has succeeded.
   */
  createObject(vdi: OpenVdi, idx: number, offset: number, data: Buffer, copyOf?: Owner): Awaitable<void>;
  /** Copying an object is expensive enough for first writes to wait a moment for more of the same object (first-writes.ts). */
  readonly gathersFirstWrites?: boolean;
  /** Zero a range of an existing exclusive object, giving its space back unless noHole. */
  zeroObject(vdi: OpenVdi, idx: number, offset: number, length: number, options: ZeroOptions): Awaitable<void>;
  /**
   * Objects may vanish while they are read, because their last reference is given up meanwhile (GONE), and a VDI's map
   * may be replaced under a write (MOVED): src/vdi then looks at the map again.
   */
  readonly objectsMove: boolean;
  /** Whether zeroObject does its work without writing zeros. */
  canZeroFast(options: ZeroOptions): boolean;
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
  /** Set the mark of a working VDI, or take it away; durable when it resolves. */
  mark(vdi: OpenVdi, unfinished: Unfinished | undefined): Promise<VdiRecord>;
  /** Whether `create` was cut off before it could set the mark, if that can be: nothing is in the VDI then. */
  isBarelyMade?(record: VdiRecord): Promise<boolean>;
  /** Open for reading and, if it is not a snapshot, writing. */
  open(vid: number): Promise<OpenVdi>;
  /**
   * Prepare to make the present content of `vdi` a snapshot. Nothing has happened until `switchOver` is called. `takenAt`: what
   * it shall say of when it was taken, if that is not now. A mark of being unfinished stays with the working VDI.
   */
  prepareSwitch(vdi: OpenVdi, tag: string, takenAt?: number): Switch;
  /** Why a new snapshot cannot have this tag here; undefined if it can. */
  whyNoTag?(tag: string): string | undefined;
  /** The same for a snapshot that soon goes again, if the store has a cheaper way; `remove` drops it. */
  prepareTemporary?(vdi: OpenVdi, tag: string): Promise<Switch>;
  /** Those are in memory only: they can be taken of a store that must not be changed, too. */
  readonly temporariesStoreNothing?: boolean;
  /** A new working VDI `name` that reads as snapshot `vid`. */
  clone(vid: number, name: string): Promise<VdiRecord>;
  /** The working VDI `vid` becomes a fresh one that reads as `snapshotVid`, and bears no mark but `unfinished`. */
  rollback(vid: number, snapshotVid: number, unfinished?: Unfinished): Promise<VdiRecord>;
  resize(vdi: OpenVdi, size: number): Promise<VdiRecord>;
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

export type StoreErrorCode =
  | 'NO_STORE'
  | 'NO_SPACE'
  | 'IO'
  | 'LOCKED'
  | 'FORMAT'
  | 'DAMAGED'
  | 'PERMISSION'
  | 'LIMIT'
  | 'CLOSED'
  | 'SLOW'
  /** The object is not there. */
  | 'GONE'
  /** The VDI has a new vid and a new map: decide again. */
  | 'MOVED'
  /** The object belongs to a snapshot by now. */
  | 'READONLY'
  /** The disk has become smaller, and what is asked for is not within it any more. A write gets NO_SPACE. */
  | 'BEHIND_END'
  /** Not what this store, or this version, can do. */
  | 'UNSUPPORTED'
  /** Where a store is was not said clearly. */
  | 'ADDRESS';

/** `message` is for the operator: it names files and nodes. */
export class StoreError extends Error {
  /** In words for whoever uses the disk, if there is more to tell than the code: it can do something about it. */
  readonly forClients: string | undefined;

  constructor(
    readonly code: StoreErrorCode,
    message: string,
    options?: ErrorOptions & { readonly forClients?: string },
  ) {
    super(message, options);
    this.name = 'StoreError';
    this.forClients = options?.forClients;
  }
}

/** Somebody else has shrunk the disk while it was in use. */
export function behindEndError({ name, size }: VdiRecord, code: 'BEHIND_END' | 'NO_SPACE'): StoreError {
  return new StoreError(code, `${name} was shrunk to ${size} bytes while it was in use, and this is behind its end`, {
    forClients: `the disk was shrunk to ${size} bytes while it was in use`,
  });
}
