/**
 * Data objects as sparse files, one each, under objects/ (DataObjects says what each call means). Decides what may be done
 * on the event loop (what the page cache can answer at once) and what goes to the thread pool. Knows nothing of maps,
 * references or durability order: it syncs what it is told to sync, and a file is only removed when its caller has seen to
 * it that nobody refers to it.
 */
import path from 'node:path';
import { O_CREAT, O_RDONLY, O_RDWR, type HostDisk } from '../../system/disk.js';
import { readToEnd, writeFully } from '../../system/whole-io.js';
import { syncDirectory } from '../../system/durable-names.js';
import { descriptorLimit } from '../../system/descriptor-limit.js';
import { StoreError, type Awaitable } from '../object-store.js';
import { DescriptorCache, type ObjectFile } from './descriptor-cache.js';
import type { CachedReads } from './cached-reads.js';
import type { DataObjects, ExtentSink, FoundObject } from './data-objects.js';
import { abilitiesOf, type Abilities } from './filesystem-abilities.js';
import { makeDirectory } from '../../system/make-directory.js';
import { idxOf, objectKey, vidOf } from './reference-counts.js';
import { asStoreError, isDiskError } from './store-errors.js';
import { CHANGES, LOOKUPS, READS, SYNCS, type ThreadShare } from './thread-shares.js';
import { TimeSlice } from './time-slice.js';
import type { WriteThrottle } from './write-throttle.js';

const OBJECT_DIRECTORIES = 256;
/** Writes up to this size go straight to the page cache; longer ones would hold the loop for too long. */
const MAX_LOOP_WRITE = 128 * 1024;
/** Reads up to this size are copied out of the page cache on the loop. */
const MAX_LOOP_READ = 1024 * 1024;
const PAGE = 4096;
const PARALLEL_REMOVALS = 4;
/** Whoever has more to remove waits: a queue of a million names costs memory, and to grow it holds the loop. */
const MAX_QUEUED_REMOVALS = 4096;
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
  /** The folder OBJECTS. */
  readonly #root: string;
  readonly #disk: HostDisk;
  readonly #cache: DescriptorCache;
  /** vid -> how long the files of its objects are. */
  readonly #lengths = new Map<number, number>();
  readonly #opening = new Map<number, Promise<ObjectFile>>();
  readonly #removing = new Map<number, Promise<void>>();
  /** Waiting to be removed; creating an object of that name takes it out again. */
  readonly #toRemove = new Set<number>();
  #removers = 0;
  readonly #whenRemoved: (() => void)[] = [];
  readonly #whenRoom: (() => void)[] = [];
  readonly #abilities: Abilities;
  readonly #reads: CachedReads;
  readonly #isReadOnly: boolean;
  #reflinks = true;
  readonly #throttle: WriteThrottle;
  readonly #onDiskError: () => void;

  private constructor(
    root: string,
    { disk, reads, throttle, onDiskError }: SharedByFiles,
    abilities: Abilities,
    limit: number,
    isReadOnly: boolean,
  ) {
    this.#disk = disk;
    this.#root = root;
    this.#reads = reads;
    this.#throttle = throttle;
    this.#onDiskError = onDiskError;
    this.#abilities = abilities;
    this.#isReadOnly = isReadOnly;
    this.#cache = new DescriptorCache(disk, Math.max(COPY_DESCRIPTORS, limit));
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
      return new ObjectFiles(root, shared, { punchHole: false, zeroRange: false }, limit, true);
    }
    const made = [root, ...Array.from({ length: OBJECT_DIRECTORIES }, (_, n) => path.join(root, directoryName(n)))]
      .map((directory) => makeDirectory(disk, directory))
      .some((isNew) => isNew);
    if (made) for (const directory of [root, path.dirname(root)]) syncDirectory(disk, directory);
    return new ObjectFiles(root, shared, abilitiesOf(disk, root), limit, false);
  }

  canZeroFast(allocated: boolean): boolean {
    return allocated ? this.#abilities.zeroRange : this.#abilities.punchHole;
  }

  #path(key: number): string {
    const vid = vidOf(key);
    const idx = idxOf(key);
    const oid = vid.toString(16).padStart(8, '0') + idx.toString(16).padStart(8, '0');
    return path.join(this.#root, directoryName(directoryOf(vid, idx)), oid);
  }

  expectLength(vid: number, length: number): void {
    this.#lengths.set(vid, length);
  }

  /** How long the file of this object has to be; undefined if nobody has said. */
  #lengthOf(key: number): number | undefined {
    return this.#lengths.get(vidOf(key));
  }

  read(vid: number, idx: number, offset: number, into: Buffer, who: unknown = vid): Awaitable<void> {
    const file = this.#cache.get(vid, idx);
    let done = 0;
    if (file && into.length <= MAX_LOOP_READ) {
      try {
        done = this.#reads.read(file.fd, into, offset);
      } catch (error) {
        throw this.#failed(error, `reading object ${this.#path(file.key)}`);
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
        throw this.#failed(error, `writing object ${this.#path(objectKey(vid, idx))}`);
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
    this.#toRemove.delete(key);
    await this.#removing.get(key);
    const name = this.#path(key);
    this.expectLength(vidOf(key), size);
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
      await this.#makeEmpty(file.fd, size);
      try {
        if (from !== undefined) {
          owed--;
          await this.#copy(from, file.fd, size, offset, data.length);
        }
        if (data.length > 0) await writeFully(this.#disk, file.fd, data, offset);
      } catch (error) {
        await this.#makeEmpty(file.fd, size).catch(() => undefined);
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

  async #makeEmpty(fd: number, size: number): Promise<void> {
    const before = this.#disk.fstatSync(fd).size;
    if (before !== size) await this.#disk.truncate(fd, size);
    if (before > 0 && !(await this.#disk.punchHole(fd, 0, size))) await writeZeros(this.#disk, fd, 0, size);
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
      this.#mustBeWhole(file.key, fd);
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
      this.#mustBeWhole(file.key, fd);
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

  /** By their folders. */
  async syncNames(keys: Iterable<number>): Promise<void> {
    const folders = new Set<number>();
    const slice = new TimeSlice();
    let step = 0;
    for (const key of keys) {
      folders.add(directoryOf(vidOf(key), idxOf(key)));
      if (slice.isOver(++step)) await slice.next();
    }
    await Promise.all(
      [...folders].map(async (folder) => {
        const name = path.join(this.#root, directoryName(folder));
        const turn = SYNCS.enter(folders);
        if (turn) await turn;
        try {
          await this.#syncDirectory(name);
        } finally {
          SYNCS.leave(folders);
        }
      }),
    );
  }

  /** One fsync of a folder is told of a failure, and later ones are not. */
  namesLostWith(keys: Iterable<number>): (key: number) => boolean {
    const folders = new Set(Array.from(keys, (key) => directoryOf(vidOf(key), idxOf(key))));
    return (key) => folders.has(directoryOf(vidOf(key), idxOf(key)));
  }

  async #syncDirectory(name: string): Promise<void> {
    try {
      const fd = await this.#disk.open(name, O_RDONLY);
      try {
        await this.#disk.fsync(fd);
      } finally {
        await this.#disk.close(fd);
      }
    } catch (error) {
      throw this.#failed(error, `syncing ${name}`);
    }
  }

  /** A few at a time; readers that are under way finish on the open descriptor. */
  remove(key: number, onError: (error: unknown) => void): void {
    this.#toRemove.add(key);
    if (this.#removers >= PARALLEL_REMOVALS) return;
    this.#removers++;
    void this.#removeQueued(onError);
  }

  roomToRemove(): Promise<void> | undefined {
    if (this.#toRemove.size < MAX_QUEUED_REMOVALS) return undefined;
    return new Promise<void>((resolve) => this.#whenRoom.push(resolve));
  }

  async removed(): Promise<void> {
    while (this.#removers > 0) await new Promise<void>((resolve) => this.#whenRemoved.push(resolve));
  }

  async #removeQueued(onError: (error: unknown) => void): Promise<void> {
    for (const key of this.#toRemove) {
      this.#toRemove.delete(key);
      const removal = this.#unlink(key, onError).finally(() => this.#removing.delete(key));
      this.#removing.set(key, removal);
      await removal;
      if (this.#whenRoom.length > 0 && this.#toRemove.size <= MAX_QUEUED_REMOVALS / 2) wakeAll(this.#whenRoom);
    }
    wakeAll(this.#whenRoom);
    if (--this.#removers > 0) return;
    wakeAll(this.#whenRemoved);
  }

  async #unlink(key: number, onError: (error: unknown) => void): Promise<void> {
    const turn = CHANGES.enter(REMOVALS);
    if (turn) await turn;
    try {
      await this.#disk.unlink(this.#path(key));
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') {
        onError(this.#failed(error, `removing object ${this.#path(key)}`));
      }
    } finally {
      CHANGES.leave(REMOVALS);
    }
    // Not before: whoever opened it until now has a file without a name, which must not pass for a new one that bears it.
    await this.#opening.get(key)?.catch(() => undefined);
    const file = this.#cache.get(vidOf(key), idxOf(key));
    if (file) this.#cache.retire(file);
  }

  idle(key: number): Promise<void> | undefined {
    const opening = this.#opening.get(key);
    if (opening)
      return opening.then(
        () => this.idle(key),
        () => undefined,
      );
    const file = this.#cache.get(vidOf(key), idxOf(key));
    if (!file || file.busy === 0) return undefined;
    return new Promise((resolve) => (file.waiters ??= []).push(resolve));
  }

  async *scan(): AsyncGenerator<FoundObject> {
    for (let n = 0; n < OBJECT_DIRECTORIES; n++) {
      const directory = path.join(this.#root, directoryName(n));
      for (const entry of await this.#namesIn(directory)) {
        const name = path.join(directory, entry);
        const oid = /^([0-9a-f]{8})([0-9a-f]{8})$/.exec(entry);
        const named = oid ? objectKey(parseInt(oid[1] ?? '', 16), parseInt(oid[2] ?? '', 16)) : -1;
        const status = await this.#disk.lstat(name).catch(() => undefined);
        if (!status) continue;
        const key = named >= 0 && this.#path(named) === name ? named : -1;
        const isWhole = key < 0 || status.size === this.#lengthOf(key);
        const damage = isWhole ? undefined : `object file is ${status.size} bytes long`;
        yield { key, bytes: status.blocks * 512, name, uid: status.uid, damage };
      }
    }
  }

  removeFound({ name }: FoundObject): Promise<void> {
    return this.#disk.unlink(name);
  }

  problemOf(key: number, length: number): string | undefined {
    const name = this.#path(key);
    const status = this.#disk.lstatSync(name);
    if (!status) return `the object ${name} is missing`;
    if (status.size !== length) return `the object ${name} is ${status.size} bytes long`;
    return undefined;
  }

  async #namesIn(directory: string): Promise<string[]> {
    try {
      return await this.#disk.readdir(directory);
    } catch (error) {
      // Tools that copy files leave out empty folders, and on a read-only filesystem nobody can make them.
      if (this.#isReadOnly && (error as NodeJS.ErrnoException).code === 'ENOENT') return [];
      throw error;
    }
  }

  async close(): Promise<void> {
    await this.removed();
    await Promise.allSettled(this.#opening.values());
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
    const file = cached ? this.#cache.begin(cached) : await this.#open(vid, idx, who);
    const turn = READS.enter(who);
    if (turn) await turn;
    try {
      const count = await readToEnd(this.#disk, file.fd, into, offset, done);
      if (count < into.length) {
        this.#mustBeWhole(file.key, file.fd);
        throw new StoreError('IO', `reading object ${this.#path(file.key)}: it ended at ${offset + count}`);
      }
    } catch (error) {
      throw this.#failed(error, `reading object ${this.#path(file.key)}`);
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
    const file = cached ? this.#cache.begin(cached) : await this.#open(vid, idx, who);
    const turn = CHANGES.enter(who);
    if (turn) await turn;
    try {
      this.#mustBeWhole(file.key, file.fd);
      const start = performance.now();
      await writeFully(this.#disk, file.fd, data, offset);
      if (isHeldOff) this.#throttle.noteOffLoop(start);
    } catch (error) {
      throw this.#failed(error, `writing object ${this.#path(file.key)}`);
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
    const file = cached ? this.#cache.begin(cached) : await this.#open(vid, idx, who);
    const turn = share.enter(who);
    if (turn) await turn;
    try {
      await use(file);
    } catch (error) {
      throw this.#failed(error, `${doing} object ${this.#path(file.key)}`);
    } finally {
      share.leave(who);
      this.#cache.end(file);
    }
  }

  /** Open an object that is not in the cache; it is busy on the caller's behalf, who must end that. */
  async #open(vid: number, idx: number, who: unknown): Promise<ObjectFile> {
    const key = objectKey(vid, idx);
    for (let pending = this.#opening.get(key); pending; pending = this.#opening.get(key)) {
      const file = await pending;
      // Between its opening and our turn it may have had to make way for another.
      if (!file.retired) return this.#cache.begin(file);
    }
    const cached = this.#cache.get(vid, idx);
    if (cached) return this.#cache.begin(cached);
    return this.#openWith(key, this.#turnToOpen(who), () => READS.leave(who));
  }

  /** A descriptor, and then a thread of those for reads: to open a file that nobody has open may be a look at the disk. */
  #turnToOpen(who: unknown): Promise<void> | undefined {
    const taking = this.#cache.take(1, who);
    return taking ? taking.then(() => READS.enter(who)) : READS.enter(who);
  }

  /**
   * Open the object with a descriptor that has been taken for it, or will be when `turn` resolves; `opened` is called when that
   * is over. Nobody else may be opening it.
   */
  #openWith(key: number, turn?: Promise<void>, opened?: () => void): Promise<ObjectFile> {
    const name = this.#path(key);
    const flags = this.#isReadOnly ? O_RDONLY : O_RDWR;
    const opening = (turn ? turn.then(() => this.#disk.open(name, flags)) : this.#disk.open(name, flags))
      .finally(opened)
      .then(
        (fd) => {
          this.#opening.delete(key);
          try {
            this.#mustBeWhole(key, fd);
          } catch (error) {
            const giveBack = (): void => this.#cache.giveBack(1);
            this.#disk.close(fd).then(giveBack, giveBack);
            throw error;
          }
          return this.#cache.insert(key, fd);
        },
        (error: NodeJS.ErrnoException) => {
          this.#opening.delete(key);
          this.#cache.giveBack(1);
          if (error.code !== 'ENOENT') throw this.#failed(error, `opening object ${this.#path(key)}`);
          throw new StoreError(
            'DAMAGED',
            `the map refers to object ${this.#path(key)}, which does not exist; 'sheepgate check' lists what is missing`,
          );
        },
      );
    this.#opening.set(key, opening);
    return opening;
  }

  /**
   * Like `#using`, with a descriptor that was taken already. Not to wait for another one who is opening the object and waits
   * for a descriptor: they may all be those of copies.
   */
  async #usingSource(key: number, use: (fd: number) => Promise<void>): Promise<void> {
    const cached = this.#cache.get(vidOf(key), idxOf(key));
    if (cached) this.#cache.giveBack(1);
    else if (this.#opening.has(key)) return this.#usingApart(key, use);
    const file = cached ? this.#cache.begin(cached) : await this.#openWith(key);
    try {
      await use(file.fd);
    } catch (error) {
      throw this.#failed(error, `copying object ${this.#path(key)}`);
    } finally {
      this.#cache.end(file);
    }
  }

  /** With a file that the cache knows nothing of: whoever is opening the object may find that its name is gone. */
  async #usingApart(key: number, use: (fd: number) => Promise<void>): Promise<void> {
    try {
      const fd = await this.#disk.open(this.#path(key), O_RDONLY);
      try {
        await use(fd);
      } finally {
        await this.#disk.close(fd);
      }
    } catch (error) {
      throw this.#failed(error, `copying object ${this.#path(key)}`);
    } finally {
      this.#cache.giveBack(1);
    }
  }

  /** `error` as this layer's, saying what was being done. */
  #failed(error: unknown, doing: string): StoreError {
    if (isDiskError(error)) this.#onDiskError();
    return asStoreError(error, doing);
  }

  /** Errors: DAMAGED if the file that is open as `fd` is not as long as the object. What it lacks must not pass for zeros. */
  #mustBeWhole(key: number, fd: number): void {
    const expected = this.#lengthOf(key);
    const { size } = this.#disk.fstatSync(fd);
    if (expected === undefined || size === expected) return;
    throw new StoreError(
      'DAMAGED',
      `object ${this.#path(key)} is ${size} bytes long and has to be ${expected}; 'sheepgate check' lists what is damaged`,
    );
  }

  /** Copy the data ranges of `from` into `to`, leaving holes holes; what [skip, skip+skipLength) holds may be left out. */
  async #copy(from: number, to: number, size: number, skip: number, skipLength: number): Promise<void> {
    // Its thread is that of the creation.
    await this.#usingSource(from, async (source) => {
      this.#mustBeWhole(from, source);
      if (this.#reflinks) {
        if (await this.#disk.clone(source, to)) return;
        this.#reflinks = false;
      }
      for (let at = 0; at < size;) {
        if (at >= skip && at < skip + skipLength) {
          at = skip + skipLength;
          continue;
        }
        const data = await this.#disk.nextData(source, at);
        if (data < 0 || data >= size) return;
        let end = Math.min(await this.#disk.nextHole(source, data), size);
        if (data < skip && end > skip && skipLength > 0) end = skip;
        for (at = data; at < end;) {
          let count = await this.#disk.copyRange(source, to, at, end - at);
          if (count <= 0) count = await copyByHand(this.#disk, source, to, at, end - at);
          if (count === 0) {
            this.#mustBeWhole(from, source);
            throw new StoreError('IO', `copying object ${this.#path(from)}: it ended at ${at}`);
          }
          at += count;
        }
      }
    });
  }
}

async function writeZeros(disk: HostDisk, fd: number, offset: number, length: number): Promise<void> {
  for (let at = offset; at < offset + length; at += ZEROS.length) {
    await writeFully(disk, fd, ZEROS.subarray(0, Math.min(ZEROS.length, offset + length - at)), at);
  }
}

function wakeAll(waiting: (() => void)[]): void {
  for (const wake of waiting.splice(0)) wake();
}

const ZEROS = Buffer.alloc(1024 * 1024);
/** For whom removals take their threads: nobody's disk waits for them. */
const REMOVALS = Symbol('removals');

/** 256 neighbouring objects share a folder, so that flushing a sequential write syncs one folder and not 256. */
function directoryOf(vid: number, idx: number): number {
  return ((idx >>> 8) ^ vid) & (OBJECT_DIRECTORIES - 1);
}

function directoryName(n: number): string {
  return n.toString(16).padStart(2, '0');
}

async function copyByHand(disk: HostDisk, from: number, to: number, offset: number, length: number): Promise<number> {
  const buffer = Buffer.allocUnsafe(Math.min(length, ZEROS.length));
  const count = await disk.read(from, buffer, 0, offset);
  await writeFully(disk, to, buffer.subarray(0, count), offset);
  return count;
}
