/**
 * The one door to the data of objects: VDIs, temporary snapshots, copies, extents, recovery and check use objects by vid and
 * idx or by key (localObjectKey), never by file. An object is a file of its own (object-files.ts), or an overlay, whose blocks
 * are in a segment file with those of others (layered-objects.ts). What is synced are files: `fileOf` an object.
 *
 * `who`: the VDI or snapshot that a call works for, which has a share of threads and descriptors of its own.
 */
import type { ExtentSink } from '../open-vdi.js';
import type { Awaitable } from '../vdi-record.js';

/** The folder of objects in a store. */
export const OBJECTS = 'objects';

/** An entry of the objects folder that a scan has found. */
export interface FoundObject {
  /** -1 if it is no object. */
  readonly key: number;
  /** For people, and for `removeFound`. */
  readonly name: string;
  /** Bytes that it takes on the disk. */
  readonly bytes: number;
  readonly uid: number;
  /** Why it cannot be the object of its name; undefined if it can. */
  readonly damage: string | undefined;
}

/** A segment file that a scan has found. Its key is that of a segment (segmentOf). */
export interface FoundSegment extends FoundObject {
  /** Whether an overlay is in it. */
  readonly isUsed: boolean;
  /** Keys of objects that are no overlays and have data in it. */
  readonly leftovers: readonly number[];
}

/**
 * Who makes the changes of an overlay durable. Data comes first: a block is in its file before the overlay has it, and both are
 * stored by one flush, the data before the overlay.
 */
export interface OverlayChanges {
  /** Called before the base or the blocks of the overlay change: a flush in progress must store what they were. */
  willChange(key: number): void;
  /** The overlay has the blocks [first, end) from here on, or with `has` false has them not. Resolves when it is in the log. */
  changed(key: number, first: number, end: number, has: boolean): Awaitable<void>;
  /** The overlay lies over another object from here on, or over nothing. The reference to `before` is the caller's to give up. */
  rebased(key: number, before: number): Awaitable<void>;
  /** The file (`fileOf`) has new data. */
  wrote(file: number): void;
  /** The file is being made. */
  making(file: number): void;
  /** It is made. Its name is not durable. */
  made(file: number): void;
}

export interface DataObjects {
  /** Objects of `vid` have `length` bytes: an object of another length is damaged. */
  expectLength(vid: number, length: number): void;

  /** At once (undefined) if the page cache has it. Errors: IO, DAMAGED. */
  read(vid: number, idx: number, offset: number, into: Buffer, who?: unknown): Awaitable<void>;
  /** The same; false if it cannot be answered at once. */
  readCached(vid: number, idx: number, offset: number, into: Buffer): boolean;
  /** In place. Errors: NO_SPACE, IO, DAMAGED. */
  write(vid: number, idx: number, offset: number, data: Buffer, who?: unknown): Awaitable<void>;
  /**
   * Makes an object of `size` bytes with `data` at `offset`, the rest zeros or the content of the object `from`. Replaces an
   * object of that name, which must be the caller's. If this fails, an empty object is left for the caller to `remove`.
   */
  create(
    key: number,
    size: number,
    offset: number,
    data: Buffer,
    from: number | undefined,
    who?: unknown,
  ): Promise<void>;
  /** Whether the object is an overlay: then it is written by `writeOver` and zeroed by `zeroOver`. */
  isOverlay(vid: number, idx: number): boolean;
  /** What to sync for the data of the object itself, without what is below. */
  fileOf(key: number): number;
  /** In place. No other VDI may have the overlay. Errors: as `write`. */
  writeOver(
    vid: number,
    idx: number,
    offset: number,
    data: Buffer,
    changes: OverlayChanges,
    who?: unknown,
  ): Awaitable<void>;
  /** As `zero`, under the same condition. */
  zeroOver(
    vid: number,
    idx: number,
    offset: number,
    length: number,
    allocated: boolean,
    changes: OverlayChanges,
    who?: unknown,
  ): Promise<void>;
  /**
   * Makes the object (vid, idx), of `size` bytes, an overlay over (base, idx), or over something further down with the same
   * content, with `data` at `offset`. If `base` is `vid`, nothing is below. Counts its reference to what is below. Only `wrote`,
   * `making` and `made` are called: who enters it in a map notes the rest. If this fails, an overlay may be left for the caller
   * to `remove`.
   */
  createOver(
    vid: number,
    idx: number,
    base: number,
    size: number,
    offset: number,
    data: Buffer,
    changes: OverlayChanges,
    who?: unknown,
  ): Awaitable<void>;
  /** Zeroes a range; gives its space back, or keeps it allocated (`allocated`). */
  zero(vid: number, idx: number, offset: number, length: number, allocated: boolean, who?: unknown): Promise<void>;
  /** Whether `zero` works without writing zeros. */
  canZeroFast(allocated: boolean): boolean;
  /** A hint: the range will be read soon. */
  willNeed(vid: number, idx: number, offset: number, length: number, who?: unknown): Promise<void>;
  /** Data and holes of the range. At once if the object is known to have no holes. */
  extents(vid: number, idx: number, offset: number, length: number, sink: ExtentSink, who?: unknown): Awaitable<void>;
  /**
   * Which blocks of the objects of `owner` and `before` at idx may differ: the sink gets `changed` in place of `hole`. False if
   * nothing is known, because neither lies over the other, or over the same.
   */
  changes(owner: number, before: number, idx: number, offset: number, length: number, sink: ExtentSink): boolean;
  /** Whether the object is known to have no hole. */
  isDense(vid: number, idx: number): boolean;

  /** Data of the file is on stable storage when this resolves. */
  sync(file: number, who?: unknown): Promise<void>;
  /** Whether nothing refers to what is in the file: it needs no sync, and may be gone. */
  isUnneeded(file: number): boolean;
  /** The names of these files are on stable storage when this resolves. */
  syncNames(files: Iterable<number>): Promise<void>;
  /** After a failed sync of the names of `files`: whether the name of a file may be lost with them. */
  namesLostWith(files: Iterable<number>): (file: number) => boolean;

  /** Resolves when no operation on the object is in flight; undefined if none is. */
  idle(key: number): Promise<void> | undefined;
  /**
   * In the background, after reads in flight. Errors go to `onError`: check finds what is left over. Returns the key of the object
   * below to which this one has given up its reference, if there is one.
   */
  remove(key: number, onError: (error: unknown) => void): number | undefined;
  /** Resolves when more objects may be removed; undefined if they may be now. */
  roomToRemove(): Promise<void> | undefined;
  /** Resolves when all removals have ended. */
  removed(): Promise<void>;

  /** Why the object cannot be whole, with `length` bytes, as far as is known without reading it; undefined if it can. */
  problemOf(key: number, length: number): string | undefined;
  /** All entries of the objects folder, in no order. For check, and for recovery after a crash. */
  scan(): AsyncGenerator<FoundObject>;
  /** Removes an entry that no map refers to. Errors: those of the disk. */
  removeFound(found: FoundObject | FoundSegment): Promise<void>;
  /** When this resolves, nothing that was removed until now can be back after a power loss. Errors: IO. */
  syncRemovals(): Promise<void>;
  /** All segment files, with what is in them and belongs to no overlay. */
  scanSegments(): AsyncGenerator<FoundSegment>;
  /** Gives back, in the background, the space of objects that are no overlays (FoundSegment.leftovers). */
  freeLeftovers(keys: readonly number[], onError: (error: unknown) => void): void;

  close(): Promise<void>;
}
