/**
 * The one door to the data of objects: VDIs, temporary snapshots, copies, extents, recovery and check ask here, by vid and
 * idx or by key (localObjectKey), and know nothing of files. Today an object is one file (object-files.ts). It may become more
 * than one file without a change in any caller.
 *
 * `who`, below: whose work it is, for its share of threads and descriptors. Disks that share objects are several.
 */
import type { ExtentSink } from '../open-vdi.js';
import type { Awaitable } from '../vdi-record.js';

/** The folder of a store that they are in. */
export const OBJECTS = 'objects';

/** What a scan has found in the place where objects are stored. */
export interface FoundObject {
  /** -1 if it is no object, whatever it is. */
  readonly key: number;
  /** For people, and for `removeFound`. */
  readonly name: string;
  /** What it takes of the disk. */
  readonly bytes: number;
  readonly uid: number;
  /** Why it cannot be the object that it is called; undefined if it can. */
  readonly damage: string | undefined;
}

export interface DataObjects {
  /** Objects that bear `vid` in their name have `length` bytes; any that has not is damaged. */
  expectLength(vid: number, length: number): void;

  /** At once (undefined) if the page cache has it. Errors: IO, DAMAGED. */
  read(vid: number, idx: number, offset: number, into: Buffer, who?: unknown): Awaitable<void>;
  /** The same; false if it cannot be answered at once. */
  readCached(vid: number, idx: number, offset: number, into: Buffer): boolean;
  /** In place. Errors: NO_SPACE, IO, DAMAGED. */
  write(vid: number, idx: number, offset: number, data: Buffer, who?: unknown): Awaitable<void>;
  /**
   * A new object of `size` bytes with `data` at `offset`, over what the object `from` holds, if given. If there is one of
   * that name it is emptied first: it belongs to whoever creates. If this fails an empty object is left, for `remove`.
   */
  create(
    key: number,
    size: number,
    offset: number,
    data: Buffer,
    from: number | undefined,
    who?: unknown,
  ): Promise<void>;
  /** Zero a range, with its space given back or (`allocated`) kept. */
  zero(vid: number, idx: number, offset: number, length: number, allocated: boolean, who?: unknown): Promise<void>;
  /** Whether that costs no writing of zeros. */
  canZeroFast(allocated: boolean): boolean;
  /** Have the range read ahead. */
  willNeed(vid: number, idx: number, offset: number, length: number, who?: unknown): Promise<void>;
  /** Data and holes of the range. At once if the object is known to have no holes. */
  extents(vid: number, idx: number, offset: number, length: number, sink: ExtentSink, who?: unknown): Awaitable<void>;
  /** Whether the object is known to have no hole. */
  isDense(vid: number, idx: number): boolean;

  /** Data of the object is on stable storage when this resolves. */
  sync(key: number, who?: unknown): Promise<void>;
  /** ... and here the names of these objects: that they exist. */
  syncNames(keys: Iterable<number>): Promise<void>;
  /** A sync of the names of `keys` has failed: tells of an object whether its name may be lost with it. */
  namesLostWith(keys: Iterable<number>): (key: number) => boolean;

  /** Resolves when no operation on the object is under way; undefined if none is. */
  idle(key: number): Promise<void> | undefined;
  /** In the background; reads that are under way finish. Errors go to `onError`: what stays, check finds. */
  remove(key: number, onError: (error: unknown) => void): void;
  /** Resolves when more may be removed; undefined if that is now. */
  roomToRemove(): Promise<void> | undefined;
  /** Resolves when all that was to be removed is gone. */
  removed(): Promise<void>;

  /** Why this cannot be a whole object of `length` bytes, as far as that is known without reading; undefined if it can. */
  problemOf(key: number, length: number): string | undefined;
  /** Everything that is stored, in no order. For check, and for a start after a crash. */
  scan(): AsyncGenerator<FoundObject>;
  /** Remove what a scan has found and nobody refers to. Errors: those of the disk. */
  removeFound(found: FoundObject): Promise<void>;

  close(): Promise<void>;
}
