/**
 * Data objects as sparse files, one each, under objects/ (DataObjects says what each call means). Decides what may be done
 * on the event loop (what the page cache can answer at once) and what goes to the thread pool. Which file is which object is
 * in object-names.ts; opening and removing are in object-opening.ts and object-removal.ts. Knows nothing of maps, references
 * or durability order: it syncs what it is told to sync, and a file is only removed when its caller has seen to it that
 * nobody refers to it.
 */
import { O_CREAT, O_RDWR, type HostDisk } from '../../system/disk.js';
import { readToEnd, writeFully } from '../../system/whole-io.js';
import { descriptorLimit } from '../../system/descriptor-limit.js';
import { StoreError, type Awaitable } from '../object-store.js';
import { DescriptorCache, type ObjectFile } from './descriptor-cache.js';
import type { CachedReads } from './cached-reads.js';
import type { DataObjects, ExtentSink, FoundObject } from './data-objects.js';
import { abilitiesOf, type Abilities } from './filesystem-abilities.js';
import { makeObjectFolders, ObjectNames, type AsFailure } from './object-names.js';
import { ObjectOpening } from './object-opening.js';
import { ObjectRemoval } from './object-removal.js';
import { idxOf, objectKey, vidOf } from './reference-counts.js';
import { makeEmpty, SparseCopy, writeZeros } from './sparse-copy.js';
import { asStoreError, isDiskError } from './store-errors.js';
import { CHANGES, LOOKUPS, READS, SYNCS, type ThreadShare } from './thread-shares.js';
import type { WriteThrottle } from './write-throttle.js';

/** Writes up to this size go straight to the page cache; longer ones would hold the loop for too long. */
const MAX_LOOP_WRITE = 128 * 1024;
/** Reads up to this size are copied out of the page cache on the loop. */
const MAX_LOOP_READ = 1024 * 1024;
const PAGE = 4096;
/** After so many contradicting answers the rest of a range counts as data: a range may be punched and written for ever. */
const MAX_CONTRADICTIONS = 16;
/** Of the process's descriptors, for all else that a command has open. */
const DESCRIPTOR_HEADROOM = 512;
const MAX_DESCRIPTORS = 65_536;
const MIN_DESCRIPTORS = 64;
/** For an object, and for the one that it is copied from. */
const COPY_DESCRIPTORS = 2;

/** For a process that has the store to itself. A daemon has others to think of. */
function usualDescriptors(): number {
  const limit = descriptorLimit() ?? 2 * DESCRIPTOR_HEADROOM;
  return Math.max(MIN_DESCRIPTORS, Math.min(MAX_DESCRIPTORS, limit - DESCRIPTOR_HEADROOM));
}

/** What all share that read and write files on the disk of one store. */
export interface SharedByFiles {
  readonly disk: HostDisk;
  readonly reads: CachedReads;
  readonly throttle: WriteThrottle;
  /** Called when the disk has failed: what is not in memory of other files may be lost as well. */
  readonly onDiskError: () => void;
}

export class ObjectFiles implements DataObjects {
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
    options: { readonly limit: number; readonly isReadOnly: boolean },
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

  /** `root` is the folder objects/; made with its subfolders where missing, durably. `isReadOnly`: nothing is written. */
  static open(
    shared: SharedByFiles,
    root: string,
    options: { maxDescriptors?: number | undefined; isReadOnly?: boolean } = {},
  ): ObjectFiles {
    const { disk } = shared;
    const limit = options.maxDescriptors ?? usualDescriptors();
    if (options.isReadOnly) {
      const none = { punchHole: false, zeroRange: false };
      return new ObjectFiles(root, shared, none, { limit, isReadOnly: true });
    }
    makeObjectFolders(disk, root);
    return new ObjectFiles(root, shared, abilitiesOf(disk, root), { limit, isReadOnly: false });
  }

  canZeroFast(allocated: boolean): boolean {
    return allocated ? this.#abilities.zeroRange : this.#abilities.punchHole;
  }

  expectLength(vid: number, length: number): void {
    this.#names.expectLength(vid, length);
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
    if (this.#areEdgesCached(file, offset, data.length)) {
      const start = performance.now();
      try {
        const written = this.#disk.writeSync(file.fd, data, offset);
        this.#throttle.note(start);
        if (written === data.length) return;
      } catch (error) {
        throw this.#failed(error, `writing object ${this.#names.path(objectKey(vid, idx))}`);
      }
    }
    return this.#writeLater(file, vid, idx, offset, data, false, who);
  }

  /** A file that has the name is emptied, never by making it shorter: the map on disk may still refer to it. */
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
    // Both at once, and before anything else that others may have: who has a file may wait for a thread, not the other way.
    let owed = from === undefined ? 1 : COPY_DESCRIPTORS;
    const taking = this.#cache.take(owed, who);
    if (taking) await taking;
    // Not before the removal of the old one has had its own.
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
      // Whoever looked for holes meanwhile may have looked too early.
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
      // Behind its end there would be nothing but a hole.
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
          // Data a moment ago, a hole by now: it was punched out between the two questions.
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

  /** Writes never make a hole, and those who do say so: what is dense once stays it until then. */
  async #noteIfDense(file: ObjectFile): Promise<void> {
    file.isDense = true;
    const { size } = this.#disk.fstatSync(file.fd);
    // Empty: it is being made anew this moment, and what it will be nobody knows.
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

  removeFound({ name }: FoundObject): Promise<void> {
    return this.#disk.unlink(name);
  }

  problemOf(key: number, length: number): string | undefined {
    return this.#names.problemOf(key, length);
  }

  async close(): Promise<void> {
    await this.#removal.removed();
    await this.#opening.allSettled();
    this.#cache.close();
  }

  /** An unaligned write reads its edge pages first; it stays on the loop only if they are in the cache. */
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

  /** `share`: whose threads it takes. The file is in use from now on, while it waits for one too. */
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

  /** What [skip, skip + skipLength) of `from` holds may be left out. */
  async #copy(from: number, to: number, size: number, skip: number, skipLength: number): Promise<void> {
    // Its thread is that of the creation.
    await this.#opening.usingSource(from, async (source) => {
      this.#names.mustBeWhole(from, source);
      const endedAt = await this.#copies.copy(source, to, size, skip, skipLength);
      if (endedAt === undefined) return;
      this.#names.mustBeWhole(from, source);
      throw new StoreError('IO', `copying object ${this.#names.path(from)}: it ended at ${endedAt}`);
    });
  }
}
