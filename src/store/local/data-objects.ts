/**
 * The one door to the data of objects: VDIs, temporary snapshots, copies, extents, recovery and check use objects by vid and
 * idx or by key (localObjectKey), never by file. Today an object is one file (object-files.ts). It may become more than one file
 * without a change in any caller.
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
  /** Zeroes a range; gives its space back, or keeps it allocated (`allocated`). */
  zero(vid: number, idx: number, offset: number, length: number, allocated: boolean, who?: unknown): Promise<void>;
  /** Whether `zero` works without writing zeros. */
  canZeroFast(allocated: boolean): boolean;
  /** A hint: the range will be read soon. */
  willNeed(vid: number, idx: number, offset: number, length: number, who?: unknown): Promise<void>;
  /** Data and holes of the range. At once if the object is known to have no holes. */
  extents(vid: number, idx: number, offset: number, length: number, sink: ExtentSink, who?: unknown): Awaitable<void>;
  /** Whether the object is known to have no hole. */
  isDense(vid: number, idx: number): boolean;

  /** Data of the object is on stable storage when this resolves. */
  sync(key: number, who?: unknown): Promise<void>;
  /** The same for the names of these objects. */
  syncNames(keys: Iterable<number>): Promise<void>;
  /** After a failed sync of the names of `keys`: whether the name of an object may be lost with them. */
  namesLostWith(keys: Iterable<number>): (key: number) => boolean;

  /** Resolves when no operation on the object is in flight; undefined if none is. */
  idle(key: number): Promise<void> | undefined;
  /** In the background, after reads in flight. Errors go to `onError`: check finds what is left over. */
  remove(key: number, onError: (error: unknown) => void): void;
  /** Resolves when more objects may be removed; undefined if they may be now. */
  roomToRemove(): Promise<void> | undefined;
  /** Resolves when all removals have ended. */
  removed(): Promise<void>;

  /** Why the object cannot be whole, with `length` bytes, as far as is known without reading it; undefined if it can. */
  problemOf(key: number, length: number): string | undefined;
  /** All entries of the objects folder, in no order. For check, and for recovery after a crash. */
  scan(): AsyncGenerator<FoundObject>;
  /** Removes an entry that no map refers to. Errors: those of the disk. */
  removeFound(found: FoundObject): Promise<void>;
  /** When this resolves, no object removed until now can be back after a power loss. Errors: IO. */
  syncRemovals(): Promise<void>;

  close(): Promise<void>;
}
