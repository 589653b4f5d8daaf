/**
 * The contract of an open VDI: what a store hands out for one VDI or snapshot, and what src/vdi may call on it. Nothing here
 * knows exports, names with tags in them, or NBD.
 *
 * There are two kinds. An ObjectVdi is a map of objects: src/vdi splits requests into objects and does copy-on-write over
 * them. A DiskVdi takes requests as they are, because its store does copy-on-write itself. Both answer the questions of
 * VdiControl. src/vdi makes every data call through store-calls.ts, which checks the caller's half of this contract.
 */
import type { Awaitable, Unfinished, VdiRecord } from './vdi-record.js';

/** What src/vdi/catalog.ts needs of an open VDI of either kind. */
export interface VdiControl {
  readonly record: VdiRecord;
  /**
   * Why the VDI cannot be used any more: a temporary snapshot that has ended, or a VDI that another client has deleted or
   * replaced. Set once; data calls fail with it from then on.
   */
  readonly failure?: Error | undefined;
  /**
   * Only of stores that others change at the same time. Learns what they have made of this VDI; afterwards `record`, `failure`
   * and the data are up to date. Called before a VDI that is open is opened once more. Errors: `failure`, and the store's.
   */
  look?(): Promise<void>;
  /** Set the mark of an unfinished VDI, or remove it. Durable when it resolves. Only of a working VDI. */
  mark(unfinished: Unfinished | undefined): Promise<VdiRecord>;
  /**
   * Only of a working VDI. Before it shrinks, what is cut off is zeroed; zeros that a snapshot shares may still be allocated
   * there. An ObjectVdi is resized while no write is under way. A DiskVdi may be written meanwhile, but only when it grows.
   */
  resize(size: number): Promise<VdiRecord>;
  /**
   * Prepare to make the present content a snapshot. Nothing has happened until `switchOver` is called. `takenAt`: the time
   * that the snapshot shall bear, if that is not now. A mark of an unfinished VDI stays with the working VDI.
   */
  prepareSwitch(tag: string, takenAt?: number): Switch;
  /**
   * The same for a temporary snapshot: its record has `isTemporary`, and `Catalog.remove` drops it soon. A store without a cheaper
   * way takes a snapshot like any other and keeps that mark with it.
   */
  prepareTemporary(tag: string): Awaitable<Switch>;
  /** Called once nobody has the VDI open any more. Changes that are not durable are flushed first. */
  close(): Promise<void>;
}

/** A snapshot in two steps, so that writers wait for the first one only. */
export interface Switch {
  /**
   * The first step: from here on the present content is the snapshot's. If this fails, nothing has changed. src/vdi holds the
   * writers of an ObjectVdi meanwhile, so a store should be quick, or do it at once (undefined). It holds no writers of a
   * DiskVdi: every write answered before this call is in the snapshot, none that begins after `finish` has resolved is, and a
   * write in between is in it or not.
   */
  switchOver(): Awaitable<void>;
  /**
   * The second step, writers running again: make the snapshot durable. If this fails, the result is as if the snapshot had
   * been deleted at once.
   */
  finish(): Promise<VdiRecord>;
  /**
   * Promise of the store: `switchOver` is synchronous, and a write in flight at that moment may be in the snapshot or not, or
   * in part. src/vdi then holds no writer: it starts a new epoch at the gate (write-gate.ts) and calls `finish` when the
   * writers of the previous epoch have been answered.
   */
  readonly needsNoPause?: boolean;
}

/** Receives data and holes of a range, in order. Returns false to end the question. */
export type ExtentSink = (offset: number, length: number, hole: boolean) => boolean;

export interface ZeroOptions {
  /** Keep the range allocated. */
  readonly noHole: boolean;
}

/** Reads of one disk that are under way. The caller of `noteRead` adds one when a read begins and takes it away at its end. */
export interface ReadCount {
  inFlight: number;
}

/**
 * Reading of objects by the vid of their owner, which the map of the reader names; it is not 0. Offsets and lengths are bytes
 * within the object.
 */
export interface ObjectReader {
  /**
   * Fill `into`; holes read as zeros. At once (undefined) if that is possible without waiting. Errors: GONE (only with
   * `objectsMove`), IO, DAMAGED.
   */
  readObject(vid: number, idx: number, offset: number, into: Buffer): Awaitable<void>;
  /** A hint: the range will be read soon. */
  cacheObject(vid: number, idx: number, offset: number, length: number): Awaitable<void>;
  /** Report data and holes of the range without reading data. May end early; what is missing counts as data. */
  objectExtents(vid: number, idx: number, offset: number, length: number, sink: ExtentSink): Awaitable<void>;
  /** Whether `objectExtents` would say at once that all of the object is data. Absent: never known. */
  isAllData?(vid: number, idx: number): boolean;
}

/** A VDI as a map of objects. The map is the truth about the owner of each object; the store makes it durable by `flush`. */
export interface ObjectVdi extends VdiControl, ObjectReader {
  readonly kind: 'objects';
  /** idx -> vid of the object's owner, 0 = not allocated. Its length is the number of objects of the disk. */
  readonly map: Uint32Array;
  /** The vid under which `createObject` makes objects now: no snapshot refers to any object of this vid. */
  readonly creationVid: number;
  /**
   * What other clients do to a store may become visible during a request. A read fails with GONE if the object lost its last
   * reference meanwhile: src/vdi looks at the map again and repeats the read. A change fails with MOVED if the VDI continues
   * under another vid with another map: src/vdi decides again by the new map. False: neither error occurs, and src/vdi does not
   * look for them.
   */
  readonly objectsMove: boolean;
  /**
   * Copying an object is so expensive that the first write to a shared object shall wait some milliseconds for more of the
   * same object (src/vdi/first-writes.ts).
   */
  readonly gathersFirstWrites?: boolean;
  /** A client is about to read this range of the disk, bytes: for stores that read ahead. Called once for each read. */
  noteRead?(offset: number, length: number): ReadCount;
  /** `createObject` with `copyOf` copies the blocks around the edges of the data only. Absent: it copies the object. */
  readonly copiesBlocks?: boolean;
  /** No other VDI or snapshot refers to the object at idx: it may be changed in place. Only for an allocated idx. */
  exclusive(idx: number): boolean;
  /**
   * Changing the exclusive object at idx costs a copy all the same, because a temporary snapshot still needs its content.
   * src/vdi then looks whether a range is zeros already before it zeroes it. Absent: never.
   */
  isKeptAside?(idx: number): boolean;
  /**
   * Of a temporary snapshot whose objects the working VDI continues to change in place: the first index in [idx, end) whose
   * object was changed since, although both maps name the same owner; `end` if there is none. Absent: there are none.
   */
  nextOverwritten?(idx: number, end: number): number;
  /**
   * What differs at idx between the object of `owner` and that of `before`, the entries of two maps: the sink gets `changed` in
   * place of `hole`, for all of the range. False if the store does not know: all of it counts as changed. Absent: never known.
   */
  changedBlocks?(owner: number, before: number, idx: number, offset: number, length: number, sink: ExtentSink): boolean;
  /** In place, into an exclusive object. Errors: NO_SPACE, MOVED, IO. */
  writeObject(idx: number, offset: number, data: Buffer): Awaitable<void>;
  /**
   * Make the object (creationVid, idx): zeros, or the content of the object (`copyOf`, idx) unless that is 0, with `data` laid
   * over it at `offset`. Replaces what an operation that failed has left under that name. The map is not touched: `setOwner`
   * follows. Errors: NO_SPACE, MOVED, GONE, IO.
   */
  createObject(idx: number, offset: number, data: Buffer, copyOf: number): Awaitable<void>;
  /** Zero a range of an exclusive object; its space is given back unless `noHole`. Errors: NO_SPACE, MOVED, IO. */
  zeroObject(idx: number, offset: number, length: number, options: ZeroOptions): Awaitable<void>;
  /** Whether `zeroObject` works without writing zeros. */
  canZeroFast(options: ZeroOptions): boolean;
  /**
   * Point idx at the object that `createObject` has just made under the vid `owner`, or at nothing with 0. Durable with the
   * next flush, never before the object's data is. Errors: MOVED, and the store's.
   */
  setOwner(idx: number, owner: number): Awaitable<void>;
  /** All data and map changes that were complete when it was called are durable when it resolves. */
  flush(): Promise<void>;
  /** The same for the data of one object and its map entry: cheap if the entry is durable already. */
  flushObject(idx: number): Promise<void>;
}

/**
 * A VDI whose store does copy-on-write itself. Offsets and lengths are bytes within the disk; a request lies within the disk
 * as `record.size` says.
 */
export interface DiskVdi extends VdiControl {
  readonly kind: 'disk';
  readDisk(offset: number, into: Buffer): Awaitable<void>;
  /** With `fua`, durable when it answers. Errors: NO_SPACE, IO. */
  writeDisk(offset: number, data: Buffer, fua: boolean): Awaitable<void>;
  /**
   * The range reads as zeros afterwards. Its space is given back unless `noHole`; zeros that a snapshot shares may stay as they
   * are. With `fastZero` it fails (StoreError SLOW) before anything has changed where zeros would have to be written.
   */
  zeroDisk(
    offset: number,
    length: number,
    options: ZeroOptions & { readonly fua: boolean; readonly fastZero?: boolean },
  ): Awaitable<void>;
  /** Every change answered before is durable when it resolves. */
  flushDisk(): Awaitable<void>;
  /** A hint: the range will be read soon. Absent: of no use here. */
  cacheDisk?(offset: number, length: number): Awaitable<void>;
  /** Report data and holes. May end early; what is missing counts as data. Absent: all of the disk counts as data. */
  diskExtents?(offset: number, length: number, sink: ExtentSink): Awaitable<void>;
  /**
   * Where this VDI may differ from `base`, a snapshot of the same line; the sink gets `changed` in place of `hole`. May end
   * early; what is missing counts as changed. Absent: all of it may have changed.
   */
  diskChanges?(base: VdiRecord, offset: number, length: number, sink: ExtentSink): Awaitable<void>;
}

export type OpenVdi = ObjectVdi | DiskVdi;
