/**
 * Sparse files of one kind, by vid and number: whole objects under objects/, segments of overlays under overlays/. DataObjects
 * defines each call, "object" meaning a file here. Decides what runs on the event
 * loop (reads and writes that the page cache can answer at once) and what goes to the thread pool. Names, opening and removal
 * are in object-names.ts, object-opening.ts and object-removal.ts. Knows nothing of maps, references or the order of
 * durability: callers decide what is synced, and that no map refers to an object that is removed.
 */
import type { ExtentSink } from '../open-vdi.js';
import { O_CREAT, O_RDWR, type HostDisk } from '../../system/disk.js';
import { readToEnd, writeFully } from '../../system/whole-io.js';
import { descriptorLimit } from '../../system/descriptor-limit.js';
import { StoreError } from '../store-error.js';
import type { Awaitable } from '../vdi-record.js';
import { DescriptorCache, type ObjectFile } from './descriptor-cache.js';
import type { CachedReads } from './cached-reads.js';
import type { FoundObject } from './data-objects.js';
import { abilitiesOf, type Abilities } from './filesystem-abilities.js';
import {
  FLAT_LAYOUT,
  makeFolders,
  OBJECT_LAYOUT,
  ObjectNames,
  type AsFailure,
  type FileLayout,
} from './object-names.js';
import { ObjectOpening } from './object-opening.js';
import { ObjectRemoval } from './object-removal.js';
import { idxOf, vidOf } from './reference-counts.js';
import { makeEmpty, SparseCopy, writeZeros } from './sparse-copy.js';
import { asStoreError, isDiskError } from './store-errors.js';
import { CHANGES, LOOKUPS, READS, SYNCS, type ThreadShare } from './thread-shares.js';
import type { WriteThrottle } from './write-throttle.js';

/** Writes up to this many bytes go to the page cache on the loop; longer ones would hold the loop for too long. */
export const MAX_LOOP_WRITE = 128 * 1024;
/** Reads up to this many bytes are copied out of the page cache on the loop. */
const MAX_LOOP_READ = 1024 * 1024;
const PAGE = 4096;
/** After this many contradictory answers the rest of a range counts as data: others may punch and write the range for ever. */
const MAX_CONTRADICTIONS = 16;
/** Descriptors of the process that are left for everything except object files. */
const DESCRIPTOR_HEADROOM = 512;
const MAX_DESCRIPTORS = 65_536;
const MIN_DESCRIPTORS = 64;
/** One for the new object, one for the object that it is copied from. */
const COPY_DESCRIPTORS = 2;

/** The limit for a command, which has the store to itself. A daemon passes its own (maxDescriptors). */
export function usualDescriptors(): number {
  const limit = descriptorLimit() ?? 2 * DESCRIPTOR_HEADROOM;
  return Math.max(MIN_DESCRIPTORS, Math.min(MAX_DESCRIPTORS, limit - DESCRIPTOR_HEADROOM));
}

/** Shared by all parts that read and write files on the disk of one store. */
export interface SharedByFiles {
  readonly disk: HostDisk;
  readonly reads: CachedReads;
  readonly throttle: WriteThrottle;
  /** Called when the disk has failed: data of other files that is not in memory may be lost as well. */
  readonly onDiskError: () => void;
}

export class ObjectFiles {
  readonly #disk: HostDisk;
  readonly #names: ObjectNames;
  readonly #cache: DescriptorCache;
  readonly #opening: ObjectOpening;
  readonly #removal: ObjectRemoval;
  readonly #copies: SparseCopy;
  readonly #abilities: Abilities;
  readonly #reads: CachedReads;
  readonly #throttle: WriteThrottle;
  readonly #failed: AsFailure;

  private constructor(
    root: string,
    { disk, reads, throttle, onDiskError }: SharedByFiles,
    abilities: Abilities,
    options: { readonly limit: number; readonly isReadOnly: boolean; readonly layout: FileLayout },
  ) {
    const failed = (error: unknown, doing: string): StoreError => {
      if (isDiskError(error)) onDiskError();
      return asStoreError(error, doing);
    };
    this.#disk = disk;
    this.#reads = reads;
    this.#throttle = throttle;
    this.#abilities = abilities;
    this.#failed = failed;
    this.#names = new ObjectNames(disk, root, options, failed);
    this.#cache = new DescriptorCache(disk, Math.max(COPY_DESCRIPTORS, options.limit));
    this.#opening = new ObjectOpening(disk, this.#names, this.#cache, options, failed);
    this.#removal = new ObjectRemoval(disk, this.#names, this.#cache, this.#opening, failed);
    this.#copies = new SparseCopy(disk);
  }

  /** `root`: the folder objects/; it and its folders are created durably if missing. `isReadOnly`: nothing is written. */
  static open(
    shared: SharedByFiles,
    root: string,
    options: { maxDescriptors?: number | undefined; isReadOnly?: boolean } = {},
  ): ObjectFiles {
    const { disk } = shared;
    const { isReadOnly = false } = options;
    const limit = options.maxDescriptors ?? usualDescriptors();
    const layout = OBJECT_LAYOUT;
    if (isReadOnly) {
      const none = { punchHole: false, zeroRange: false };
      return new ObjectFiles(root, shared, none, { limit, isReadOnly, layout });
    }
    makeFolders(disk, root, layout);
    return new ObjectFiles(root, shared, abilitiesOf(disk, root), { limit, isReadOnly, layout });
  }

  /**
   * Files of another kind on the same filesystem, all in the folder `root`, which need not exist while there are none. They are
   * named and found in the same way, and may be longer.
   */
  beside(
    shared: SharedByFiles,
    root: string,
    { maxDescriptors = usualDescriptors(), isReadOnly }: { maxDescriptors?: number | undefined; isReadOnly: boolean },
  ): ObjectFiles {
    return new ObjectFiles(root, shared, this.#abilities, { limit: maxDescriptors, isReadOnly, layout: FLAT_LAYOUT });
  }

  /** Create the folder of these files durably, if it is missing. Errors: those of the disk. */
  makeFolder(): void {
    this.#names.makeFolders();
  }

  canZeroFast(allocated: boolean): boolean {
    return allocated ? this.#abilities.zeroRange : this.#abilities.punchHole;
  }

  expectLength(vid: number, length: number): void {
    this.#names.expectLength(vid, length);
  }

  /** See ObjectNames.lengthOf. */
  lengthOf(vid: number): number {
    return this.#names.lengthOf(vid);
  }

  read(vid: number, idx: number, offset: number, into: Buffer, who: unknown = vid): Awaitable<void> {
    const file = this.#cache.get(vid, idx);
    let done = 0;
    if (file && into.length <= MAX_LOOP_READ) {
      try {
        done = this.#reads.read(file.fd, into, offset);
      } catch (error) {
        throw this.#failed(error, `reading object ${this.#names.path(file.key)}`);
      }
      if (done === into.length) return;
    }
    return this.#readLater(file, vid, idx, offset, into, done, who);
  }

  readCached(vid: number, idx: number, offset: number, into: Buffer): boolean {
    const file = this.#cache.get(vid, idx);
    return file !== undefined && this.#reads.read(file.fd, into, offset) === into.length;
  }

  write(vid: number, idx: number, offset: number, data: Buffer, who: unknown = vid): Awaitable<void> {
    const file = this.#cache.get(vid, idx);
    if (!file || data.length > MAX_LOOP_WRITE) return this.#writeLater(file, vid, idx, offset, data, false, who);
    if (!this.#throttle.mayWrite()) return this.#writeLater(file, vid, idx, offset, data, true, who);
    if (this.#writeOnLoop(file, offset, data)) return;
    return this.#writeLater(file, vid, idx, offset, data, false, who);
  }

  /** The same; false if it cannot be done at once. Then a part of the data may have been written. */
  writeNow(vid: number, idx: number, offset: number, data: Buffer): boolean {
    const file = this.#cache.get(vid, idx);
    if (!file || data.length > MAX_LOOP_WRITE || !this.#throttle.mayWrite()) return false;
    return this.#writeOnLoop(file, offset, data);
  }

  #writeOnLoop(file: ObjectFile, offset: number, data: Buffer): boolean {
    if (!this.#areEdgesCached(file, offset, data.length)) return false;
    const start = performance.now();
    try {
      const written = this.#disk.writeSync(file.fd, data, offset);
      this.#throttle.note(start);
      return written === data.length;
    } catch (error) {
      throw this.#failed(error, `writing object ${this.#names.path(file.key)}`);
    }
  }

  /** Whether the file is open, so that small requests may be answered at once. */
  isOpen(vid: number, idx: number): boolean {
    return this.#cache.get(vid, idx) !== undefined;
  }

  /** An existing file of this name is emptied without becoming shorter: the map on disk may still refer to it. */
  async create(
    key: number,
    size: number,
    offset: number,
    data: Buffer,
    from: number | undefined,
    who: unknown = vidOf(key),
  ): Promise<void> {
    await this.#removal.takeBack(key);
    const name = this.#names.path(key);
    this.#names.expectLength(vidOf(key), size);
    let file: ObjectFile | undefined;
    // Both descriptors together, and before the thread: an operation that has a file may wait for a thread, never the reverse.
    let owed = from === undefined ? 1 : COPY_DESCRIPTORS;
    const taking = this.#cache.take(owed, who);
    if (taking) await taking;
    // A removal of the old file has already had its thread: it was waited for above.
    const turn = CHANGES.enter(who);
    if (turn) await turn;
    try {
      const fd = await this.#disk.open(name, O_RDWR | O_CREAT, 0o600);
      owed--;
      file = this.#cache.insert(key, fd);
      file.isDense = false;
      await makeEmpty(this.#disk, file.fd, size);
      try {
        if (from !== undefined) {
          owed--;
          await this.#copy(from, file.fd, size, offset, data.length);
        }
        if (data.length > 0) await writeFully(this.#disk, file.fd, data, offset);
      } catch (error) {
        await makeEmpty(this.#disk, file.fd, size).catch(() => undefined);
        throw error;
      }
    } catch (error) {
      throw this.#failed(error, `creating object ${name}`);
    } finally {
      CHANGES.leave(who);
      if (owed > 0) this.#cache.giveBack(owed);
      if (file) this.#cache.end(file);
    }
  }

  async zero(
    vid: number,
    idx: number,
    offset: number,
    length: number,
    allocated: boolean,
    who: unknown = vid,
  ): Promise<void> {
    await this.#using(vid, idx, 'zeroing', { share: CHANGES, who }, async (file) => {
      const { fd } = file;
      this.#names.mustBeWhole(file.key, fd);
      file.isDense = false;
      const done = allocated
        ? await this.#disk.zeroRange(fd, offset, length)
        : await this.#disk.punchHole(fd, offset, length);
      // A search for holes during the call may have been too early, and have set it.
      file.isDense = false;
      if (!done) await writeZeros(this.#disk, fd, offset, length);
    });
  }

  async willNeed(vid: number, idx: number, offset: number, length: number, who: unknown = vid): Promise<void> {
    await this.#using(vid, idx, 'reading ahead', { share: LOOKUPS, who }, ({ fd }) =>
      this.#disk.willNeed(fd, offset, length),
    );
  }

  extents(
    vid: number,
    idx: number,
    offset: number,
    length: number,
    sink: ExtentSink,
    who: unknown = vid,
  ): Awaitable<void> {
    if (this.isDense(vid, idx)) {
      sink(offset, length, false);
      return;
    }
    return this.#using(vid, idx, 'mapping', { share: LOOKUPS, who }, async (file) => {
      const { fd } = file;
      // The part that a short file lacks would look like a hole.
      this.#names.mustBeWhole(file.key, fd);
      const end = offset + length;
      let contradictions = 0;
      for (let at = offset; at < end;) {
        const found = await this.#disk.nextData(fd, at);
        const data = found < 0 ? end : Math.min(found, end);
        if (data > at && !sink(at, data - at, true)) return;
        if (data >= end) return;
        const firstHole = await this.#disk.nextHole(fd, data);
        if (at === offset && data === offset && firstHole >= end) await this.#noteIfDense(file);
        if (firstHole <= data) {
          // Data at the first question, a hole at the second: it was punched in between.
          if (contradictions++ < MAX_CONTRADICTIONS) {
            at = data;
            continue;
          }
          sink(data, end - data, false);
          return;
        }
        const hole = Math.min(firstHole, end);
        if (!sink(data, hole - data, false)) return;
        at = hole;
      }
    });
  }

  isDense(vid: number, idx: number): boolean {
    return this.#cache.get(vid, idx)?.isDense === true;
  }

  /** A write makes no hole, and calls that make one clear isDense: a dense object stays dense until then. */
  async #noteIfDense(file: ObjectFile): Promise<void> {
    file.isDense = true;
    const { size } = this.#disk.fstatSync(file.fd);
    // Empty: the object is being created at this moment.
    if (size === 0 || (await this.#disk.nextHole(file.fd, 0)) < size) file.isDense = false;
  }

  async sync(key: number, who: unknown = vidOf(key)): Promise<void> {
    await this.#using(vidOf(key), idxOf(key), 'syncing', { share: SYNCS, who }, ({ fd }) => this.#disk.fdatasync(fd));
  }

  syncNames(keys: Iterable<number>): Promise<void> {
    return this.#names.sync(keys);
  }

  namesLostWith(keys: Iterable<number>): (key: number) => boolean {
    return this.#names.lostWith(keys);
  }

  remove(key: number, onError: (error: unknown) => void): void {
    this.#removal.remove(key, onError);
  }

  roomToRemove(): Promise<void> | undefined {
    return this.#removal.room();
  }

  removed(): Promise<void> {
    return this.#removal.removed();
  }

  idle(key: number): Promise<void> | undefined {
    return this.#opening.idle(key);
  }

  scan(): AsyncGenerator<FoundObject> {
    return this.#names.scan();
  }

  async removeFound({ key, name }: FoundObject): Promise<void> {
    await this.#disk.unlink(name);
    if (key >= 0) this.#names.noteRemoved(key);
  }

  syncRemovals(): Promise<void> {
    return this.#names.syncRemovals();
  }

  problemOf(key: number, length: number): string | undefined {
    return this.#names.problemOf(key, length);
  }

  async close(): Promise<void> {
    await this.#removal.removed();
    await this.#opening.allSettled();
    this.#cache.close();
  }

  /** An unaligned write reads its edge pages first; it stays on the loop only if they are in the page cache. */
  #areEdgesCached(file: ObjectFile, offset: number, length: number): boolean {
    if (offset % PAGE === 0 && length % PAGE === 0) return true;
    return this.#reads.has(file.fd, offset) && this.#reads.has(file.fd, offset + length - 1);
  }

  async #readLater(
    cached: ObjectFile | undefined,
    vid: number,
    idx: number,
    offset: number,
    into: Buffer,
    done: number,
    who: unknown,
  ): Promise<void> {
    const file = cached ? this.#cache.begin(cached) : await this.#opening.open(vid, idx, who);
    const turn = READS.enter(who);
    if (turn) await turn;
    try {
      const count = await readToEnd(this.#disk, file.fd, into, offset, done);
      if (count < into.length) {
        this.#names.mustBeWhole(file.key, file.fd);
        throw new StoreError('IO', `reading object ${this.#names.path(file.key)}: it ended at ${offset + count}`);
      }
    } catch (error) {
      throw this.#failed(error, `reading object ${this.#names.path(file.key)}`);
    } finally {
      READS.leave(who);
      this.#cache.end(file);
    }
  }

  async #writeLater(
    cached: ObjectFile | undefined,
    vid: number,
    idx: number,
    offset: number,
    data: Buffer,
    isHeldOff: boolean,
    who: unknown,
  ): Promise<void> {
    const file = cached ? this.#cache.begin(cached) : await this.#opening.open(vid, idx, who);
    const turn = CHANGES.enter(who);
    if (turn) await turn;
    try {
      this.#names.mustBeWhole(file.key, file.fd);
      const start = performance.now();
      await writeFully(this.#disk, file.fd, data, offset);
      if (isHeldOff) this.#throttle.noteOffLoop(start);
    } catch (error) {
      throw this.#failed(error, `writing object ${this.#names.path(file.key)}`);
    } finally {
      CHANGES.leave(who);
      this.#cache.end(file);
    }
  }

  /** Use the file on a thread of `share`. The file is busy from now on, also while this waits for the thread. */
  async #using(
    vid: number,
    idx: number,
    doing: string,
    { share, who }: { readonly share: ThreadShare; readonly who: unknown },
    use: (file: ObjectFile) => Promise<void>,
  ): Promise<void> {
    const cached = this.#cache.get(vid, idx);
    const file = cached ? this.#cache.begin(cached) : await this.#opening.open(vid, idx, who);
    const turn = share.enter(who);
    if (turn) await turn;
    try {
      await use(file);
    } catch (error) {
      throw this.#failed(error, `${doing} object ${this.#names.path(file.key)}`);
    } finally {
      share.leave(who);
      this.#cache.end(file);
    }
  }

  /** Copy object `from`; [skip, skip + skipLength) may be left out. */
  async #copy(from: number, to: number, size: number, skip: number, skipLength: number): Promise<void> {
    // It uses the thread of the creation.
    await this.#opening.usingSource(from, async (source) => {
      this.#names.mustBeWhole(from, source);
      const endedAt = await this.#copies.copy(source, to, size, skip, skipLength);
      if (endedAt === undefined) return;
      this.#names.mustBeWhole(from, source);
      throw new StoreError('IO', `copying object ${this.#names.path(from)}: it ended at ${endedAt}`);
    });
  }
}
