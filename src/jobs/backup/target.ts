/**
 * A backup target: a directory with the backups of one VDI, or a raw image kept up to date with such a directory beside
 * it. Owns the files and the order in which they change, so that whatever happens every backup in the manifest can be
 * read: a new one is whole before it is named, an old one is named no more before its data goes. Asks nobody about VDIs.
 * Others may be able to write there: files are opened by target-files.ts only, and their names come from numbers and times
 * of the manifest, never from the text in it or in another file.
 *
 *   manifest.json                  what there is
 *   base-C.img                     raw image: the oldest backup of chain C, or the image FILE itself instead
 *   NNNN-TIME.qcow2                one per backup, over the one before it; the oldest holds nothing and is over the image
 *   NNNN-TIME.hashes               SHA-256 of the blocks of the disk
 */
import { randomBytes } from 'node:crypto';
import path from 'node:path';
import { OperationError } from '../../operations/operations.js';
import type { HostDisk } from '../../system/disk.js';
import type { OpenFile } from '../../system/open-file.js';
import { hostDisk } from '../../system/real-disk.js';
import { BlockHashes } from '../block-hashes.js';
import { Chain, type Link } from './chain.js';
import { imageSha256, type Image } from '../image-sha256.js';
import {
  MANIFEST,
  newManifest,
  readManifest,
  writeManifest,
  type Manifest,
  type Point,
  type Stamp,
} from './manifest.js';
import { CLUSTER_BYTES, IncrementReader, IncrementWriter, type Backing } from './qcow2-file.js';
import type { JobContext } from '../reporting.js';
import {
  inDirectory,
  moveFile,
  openLock,
  openRegular,
  removeFile,
  statRegular,
  syncDirectory,
} from '../target-files.js';

/** Beside an image, what belongs to it. */
const BESIDE = '.sheepgate';
/** A name with one of these endings that does not exist yet is an image's; any other is a directory's. */
const IMAGE_ENDINGS = ['.img', '.raw'];
const LOCK = 'lock';
export const PARTIAL = '.partial';
/** What we make, and nothing else, is removed when the manifest does not name it. */
const OUR_FILES = /^(\d{4,}-\d{8}T\d{6}Z\.(qcow2|hashes)|base-\d+\.img|manifest\.json)(\.partial)?$/;
/** Times that are further apart are not the same: who copies a file may round its time. */
const TIME_SLACK_MS = 1;
/** Files that a message names. */
const MAX_NAMED = 5;
/** May be in a directory that is otherwise empty. */
const EMPTY_ENOUGH = new Set([LOCK, 'lost+found', `${MANIFEST}${PARTIAL}`]);

export interface Place {
  /** The directory that holds the manifest. */
  readonly home: string;
  /** The raw image that is kept up to date; undefined if the target is the directory. */
  readonly image: string | undefined;
}

/** Which target a path names. Errors: BAD_TARGET. */
export function pathsOf(disk: HostDisk, given: string): Place {
  const where = realPath(disk, path.resolve(given));
  const status = disk.statSync(where);
  if (status?.isDirectory()) return { home: where, image: undefined };
  if (status && !status.isFile()) {
    throw new OperationError('BAD_TARGET', `${given} is neither a file nor a directory; give one to keep backups in`);
  }
  const beside = `${where}${BESIDE}`;
  const isImage =
    status !== undefined ||
    disk.existsSync(beside) ||
    (!given.endsWith('/') && IMAGE_ENDINGS.some((ending) => where.endsWith(ending)));
  return isImage ? { home: beside, image: where } : { home: where, image: undefined };
}

/** What links on the way point to: a new image would take the place of the last one, and target-files.ts follows none. */
function realPath(disk: HostDisk, absolute: string): string {
  if (disk.existsSync(absolute)) return disk.realpathSync(absolute);
  const parent = path.dirname(absolute);
  return disk.existsSync(parent) ? path.join(disk.realpathSync(parent), path.basename(absolute)) : absolute;
}

/** The part of a backup's file names before the ending. */
export function stemOf({ id, time }: Pick<Point, 'id' | 'time'>): string {
  const compact = new Date(time).toISOString().replaceAll(/[-:]|\.\d+/g, '');
  return `${String(id).padStart(4, '0')}-${compact}`;
}

interface Damage {
  readonly id: number;
  readonly message: string;
}

/** Blocks between two looks at whether to stop, where nothing else is waited for. */
const BLOCKS_AT_ONCE = 2 ** 16;

export class BackupTarget {
  /** The disk that the target is on. */
  readonly disk: HostDisk;
  readonly home: string;
  readonly image: string | undefined;
  #manifest: Manifest;
  readonly #lock: OpenFile | undefined;
  /** The new image that waits for the place of the old one, if it is still there. */
  #waiting: string | undefined;

  private constructor(disk: HostDisk, place: Place, manifest: Manifest, lock: OpenFile | undefined) {
    this.disk = disk;
    this.home = place.home;
    this.image = place.image;
    this.#manifest = manifest;
    this.#lock = lock;
  }

  /**
   * Open it for a backup of `vdi`, made anew if it is not there: what an interrupted run left behind is finished or
   * removed first. Errors: BAD_TARGET, BUSY, DAMAGED, FORMAT.
   */
  static async openForBackup(
    given: string,
    vdi: string,
    store: string,
    work: JobContext,
    isFull: boolean,
    disk = hostDisk,
  ): Promise<BackupTarget> {
    const place = pathsOf(disk, given);
    const isNew = await makeHome(disk, place, given);
    const lock = await lockOf(disk, place.home, 'r+');
    try {
      let manifest = await readManifest(disk, place.home);
      if (manifest && manifest.vdi !== vdi) {
        const them = manifest.vdi;
        throw new OperationError(
          'BAD_TARGET',
          `${given} holds backups of "${them}", not of "${vdi}"; give another place`,
        );
      }
      if (!manifest) {
        await refuseForeign(disk, place, given, isNew);
        manifest = newManifest(randomBytes(4).toString('hex'), vdi, store);
        await writeManifest(disk, place.home, manifest);
        await syncDirectory(disk, path.dirname(place.home));
      }
      const target = await BackupTarget.#at(disk, place, manifest, lock);
      await target.#recover(work, isFull);
      return target;
    } catch (error) {
      await lock?.close();
      throw error;
    }
  }

  /** Open it to read, on a read-only filesystem too. Errors: BAD_TARGET, BUSY, DAMAGED, FORMAT. */
  static async openToRead(given: string, disk = hostDisk): Promise<BackupTarget> {
    const place = pathsOf(disk, given);
    const manifest = await readManifest(disk, place.home);
    if (!manifest) throw notATarget(disk, given, place);
    const lock = await lockOf(disk, place.home, 'r');
    try {
      // Again: it may have changed until we had the lock.
      return await BackupTarget.#at(disk, place, (await readManifest(disk, place.home)) ?? manifest, lock);
    } catch (error) {
      await lock?.close();
      throw error;
    }
  }

  static async #at(
    disk: HostDisk,
    place: Place,
    manifest: Manifest,
    lock: OpenFile | undefined,
  ): Promise<BackupTarget> {
    const target = new BackupTarget(disk, place, manifest, lock);
    await target.#look();
    return target;
  }

  get manifest(): Manifest {
    return this.#manifest;
  }

  get points(): readonly Point[] {
    return this.#manifest.points;
  }

  get last(): Point | undefined {
    return this.points.at(-1);
  }

  async close(): Promise<void> {
    await this.#lock?.close();
  }

  /** For qemu, and for people. */
  fileOf(point: Point): string {
    return path.join(this.home, `${stemOf(point)}.qcow2`);
  }

  hashesFileOf(point: Point): string {
    return path.join(this.home, `${stemOf(point)}.hashes`);
  }

  baseFile(chain: number): string {
    if (this.image === undefined) return path.join(this.home, `base-${chain}.img`);
    return this.#waiting ?? this.image;
  }

  openChain(point: Point): Promise<Chain> {
    return Chain.open(this.disk, ...this.linksOf(point));
  }

  /** The raw image, and what is over it. */
  linksOf(point: Point): [image: Link, increments: Link[]] {
    const below = this.points.filter(({ chain, id }) => chain === point.chain && id <= point.id);
    const links = below.map((each) => ({ file: this.fileOf(each), size: each.size }));
    return [{ file: this.baseFile(point.chain), size: (below[0] ?? point).size }, links];
  }

  hashesOf(point: Point): Promise<BlockHashes> {
    return BlockHashes.load(this.disk, this.hashesFileOf(point), point.size, point.blockBytes, point.treeHash).catch(
      (error: NodeJS.ErrnoException) => {
        if (error.code !== 'ENOENT') throw error;
        throw new OperationError('DAMAGED', `${this.hashesFileOf(point)} is missing`);
      },
    );
  }

  /** What the next increment is over. */
  backingOf(point: Point): Backing {
    return { name: path.basename(this.fileOf(point)), format: 'qcow2' };
  }

  /**
   * Before something is added: all files are there and as they were left. One with another time is read and compared
   * with its hashes; that is how a copied target goes on being one. Errors: DAMAGED, BAD_TARGET.
   */
  async checkUntouched(work: JobContext): Promise<void> {
    const touched: string[] = [];
    const chain = this.last?.chain;
    const points = this.points.filter((point) => point.chain === chain);
    for (const name of this.#names(points)) {
      const file = path.join(this.home, name);
      const stamp = this.#manifest.stamps[name];
      const found = await stampOf(this.disk, file);
      if (!found) throw new OperationError('DAMAGED', `${file} is missing`);
      if (!stamp) {
        touched.push(file); // a run was interrupted before it was written down
        continue;
      }
      if (found.bytes !== stamp.bytes) {
        throw new OperationError('DAMAGED', `${file} is damaged: it has ${found.bytes} bytes, not ${stamp.bytes}`);
      }
      if (Math.abs(found.mtimeMs - stamp.mtimeMs) > TIME_SLACK_MS) touched.push(file);
    }
    if (touched.length === 0) return;
    const more = touched.length > MAX_NAMED ? ` and ${touched.length - MAX_NAMED} more` : '';
    const which = `${touched.slice(0, MAX_NAMED).join(', ')}${more}`;
    work.log(`not as the last run left it: ${which}; what is stored is compared with the hashes, which takes a while`);
    const progress = work.progress('comparing with the hashes', bytesOf(points));
    try {
      for await (const { message } of this.verify(points, progress.advance, work.signal)) {
        throw new OperationError('DAMAGED', message);
      }
    } finally {
      progress.end();
    }
    work.log('compared with the hashes, it is right');
    await this.#write({ stamps: await this.#stamps(this.points) });
  }

  /**
   * Read what is stored for these backups, which are in their order, and compare it with its hashes, each byte once;
   * backups over a damaged one as a whole, because they may be damaged with it, or have a copy of their own of what is.
   * Where nothing is stored nothing is read: the hashes must say zeros there, or the same as in the backup before. Yields
   * the first finding in each backup. With `sha256` the hash of the image is computed where the manifest has one, which
   * takes reading all of it once more.
   */
  async *verify(
    points: readonly Point[],
    advance: (bytes: number) => void = () => undefined,
    signal?: AbortSignal,
    { sha256 = false } = {},
  ): AsyncGenerator<Damage> {
    let chain: Chain | undefined;
    /** What is wrong with the files of the chain that is open, for all that come after in it. */
    let broken: OperationError | undefined;
    let before: { readonly point: Point; readonly hashes: BlockHashes | undefined } | undefined;
    try {
      for (const point of points) {
        signal?.throwIfAborted();
        if (before?.point.chain !== point.chain) {
          await chain?.close();
          chain = broken = before = undefined;
        }
        let hashes: BlockHashes | undefined;
        try {
          if (broken) throw broken;
          try {
            chain ??= await Chain.openImage(this.disk, this.baseFile(point.chain), point.size);
            await chain.add({ file: this.fileOf(point), size: point.size });
          } catch (error) {
            if (isDamage(error)) broken = error;
            throw error;
          }
          await chain.dropCached();
          const found = await this.hashesOf(point);
          await verifyStored(chain, found, before?.hashes, advance, signal);
          hashes = found;
          if (sha256) await this.#verifySha256(point, chain, advance, signal);
        } catch (error) {
          if (!isDamage(error)) throw error;
          yield { id: point.id, message: error.message };
        }
        before = { point, hashes };
      }
    } finally {
      await chain?.close();
    }
  }

  /** Errors: DAMAGED if the manifest says another one than the image has. */
  async #verifySha256(
    { id, sha256 }: Point,
    chain: Chain,
    advance: (bytes: number) => void,
    signal: AbortSignal | undefined,
  ): Promise<void> {
    if (sha256 === undefined) return;
    const found = await imageSha256(imageOf(chain), { progress: { advance }, signal });
    if (found === sha256) return;
    const file = path.join(this.home, MANIFEST);
    throw new OperationError(
      'DAMAGED',
      `${file} is damaged: it says that the SHA-256 of backup ${id} is ${sha256}, and its image, which is as its hashes say, ` +
        `has ${found}`,
    );
  }

  /** The SHA-256 of a backup's image, as sha256sum says it, noted down. Reads what is stored, hashes the zeros too. */
  async addSha256(point: Point, work: JobContext): Promise<string> {
    const chain = await this.openChain(point);
    const progress = work.progress('SHA-256 of the image', chain.size);
    try {
      const sha256 = await imageSha256(imageOf(chain), { progress, signal: work.signal });
      await this.#write({ points: this.points.map((each) => (each.id === point.id ? { ...each, sha256 } : each)) });
      return sha256;
    } finally {
      progress.end();
      await chain.close();
    }
  }

  /**
   * The finished files become a backup: from here on it is one, whatever happens. `newBase` is the complete image of a
   * full one, under a name of its own in the target's directory.
   */
  async commit(point: Point, newBase: string | undefined, store: string): Promise<void> {
    // A new image takes the place of the old one: nothing is left for the old backups to be read from.
    const replaces = newBase !== undefined && this.image !== undefined;
    const points = [...(replaces ? [] : this.points), point];
    await syncDirectory(this.disk, this.home);
    const stamps = replaces ? {} : await this.#stamps(points);
    await this.#write({ points, store, installing: replaces ? newBase : null, stamps });
    if (replaces) {
      await this.#install();
      await this.removeLeftovers();
    }
  }

  /**
   * Keep the newest `count`. The oldest of the newest chain go by having the next one written into the image below it;
   * an older chain goes as a whole, when none of it is wanted. Told to stop, it leaves what the next run goes on with.
   * Returns the ids of those that went. Errors: DAMAGED, BAD_TARGET.
   */
  async keep(count: number, work: JobContext): Promise<number[]> {
    const dropped: number[] = [];
    for (;;) {
      const [oldest, next] = this.points;
      const last = this.last;
      if (!oldest || !last || this.points.length <= count) break;
      const excess = this.points.slice(0, this.points.length - count);
      if (oldest.chain !== last.chain) {
        const whole = this.points.filter(({ chain }) => chain === oldest.chain);
        if (!whole.every((point) => excess.includes(point))) break;
        const points = this.points.filter((point) => !whole.includes(point));
        await this.#write({ points, stamps: await this.#stamps(points) });
        dropped.push(...whole.map(({ id }) => id));
        continue;
      }
      if (!next) break;
      work.signal.throwIfAborted();
      await this.#checkIncrement(next, work.signal);
      await this.#checkFoldable(next);
      await this.#write({ points: this.points.slice(1), folding: next.id, stamps: {} });
      await this.#fold(next, work);
      dropped.push(oldest.id);
    }
    if (dropped.length > 0) await this.removeLeftovers();
    return dropped;
  }

  /** Remove files of ours that belong to no backup. Returns whether there were any. */
  async removeLeftovers(): Promise<boolean> {
    // A write that failed may have taken place.
    this.#manifest = (await readManifest(this.disk, this.home)) ?? this.#manifest;
    await this.#look();
    const { installing } = this.#manifest;
    const named = new Set([MANIFEST, ...this.#names(this.points), installing]);
    let found = false;
    for (const name of await namesIn(this.disk, this.home)) {
      if (!OUR_FILES.test(name) || named.has(name)) continue;
      await removeFile(this.disk, path.join(this.home, name));
      found = true;
    }
    return found;
  }

  /** A new chain must not fail for what is wrong with the one that it leaves: a fold that is not finished harms nothing. */
  async #recover(work: JobContext, isFull: boolean): Promise<void> {
    const { folding, installing } = this.#manifest;
    if (installing !== null) await this.#install();
    const folded = this.points.find(({ id }) => id === folding);
    if (folded && !isFull && folded.chain === this.last?.chain) {
      work.log('the last run was interrupted while it dropped an old backup; finishing that');
      await this.#fold(folded, work);
    }
    if (await this.removeLeftovers()) work.log('the last run was interrupted; what it left behind is removed');
  }

  async #install(): Promise<void> {
    if (this.#manifest.installing === null || this.image === undefined) return;
    if (this.#waiting !== undefined) await moveFile(this.disk, this.#waiting, this.image);
    this.#waiting = undefined;
    await this.#write({ installing: null, stamps: await this.#stamps(this.points) });
  }

  /** Whether the image that is to be installed still waits. Errors: BAD_TARGET. */
  async #look(): Promise<void> {
    const { installing } = this.#manifest;
    const waiting = installing === null || this.image === undefined ? undefined : path.join(this.home, installing);
    this.#waiting = waiting !== undefined && (await statRegular(this.disk, waiting)) ? waiting : undefined;
  }

  /** It must not carry damage into the image below it, on which others stand. */
  async #checkIncrement(point: Point, signal: AbortSignal): Promise<void> {
    const hashes = await this.hashesOf(point);
    const chain = await this.openChain(point);
    try {
      for (let index = 0; index < hashes.count; index++) {
        index = Math.floor((await chain.nextStored(index * hashes.blockBytes, chain.top)) / hashes.blockBytes);
        signal.throwIfAborted();
        if (index < hashes.count) await chain.readChecked(hashes, index);
      }
    } finally {
      await chain.close();
    }
  }

  /** Before anything is written down that only writing into the image can finish. Errors: BAD_TARGET. */
  async #checkFoldable(point: Point): Promise<void> {
    await (await openRegular(this.disk, this.baseFile(point.chain), 'r+')).close();
  }

  /**
   * Write an increment into the image below it. Done again from the beginning if it was interrupted: until the increment
   * is replaced by one that holds nothing it hides what changes below.
   */
  async #fold(point: Point, work: JobContext): Promise<void> {
    const baseFile = this.baseFile(point.chain);
    const increment = await IncrementReader.open(this.disk, this.fileOf(point));
    const progress = work.progress('dropping an old backup', point.size);
    let base: OpenFile | undefined;
    try {
      base = await openRegular(this.disk, baseFile, 'r+');
      await base.truncate(point.size);
      for (let offset = 0; offset < point.size;) {
        work.signal.throwIfAborted();
        const next = await increment.nextOwn(offset);
        const length = Math.min(point.blockBytes, point.size - next);
        for (const run of await increment.runs(next, length)) {
          if (run.kind === 'zeros') await zeroOut(base, run.offset, run.length);
          if (run.kind !== 'data') continue;
          const data = Buffer.allocUnsafe(run.length);
          await increment.read(run, data);
          await base.write(data, run.offset);
        }
        progress.advance(next + length - offset);
        offset = next + length;
      }
      await base.sync();
    } finally {
      progress.end();
      await base?.close();
      await increment.close();
    }
    await this.writeEmpty(this.fileOf(point), point.size, point.chain);
    await this.#write({ folding: null, stamps: await this.#stamps(this.points) });
  }

  /** An increment that holds nothing, over the image of the chain: so that every backup has a file of its own. */
  async writeEmpty(file: string, size: number, chain: number): Promise<void> {
    const name = this.image === undefined ? `base-${chain}.img` : path.join('..', path.basename(this.image));
    const partial = `${file}${PARTIAL}`;
    const writer = await IncrementWriter.create(this.disk, partial, size, { name, format: 'raw' });
    try {
      await writer.finish();
    } finally {
      await writer.close();
    }
    await moveFile(this.disk, partial, file);
  }

  async #write(change: Partial<Manifest>): Promise<void> {
    const manifest = { ...this.#manifest, ...change };
    await writeManifest(this.disk, this.home, manifest);
    this.#manifest = manifest;
    await this.#look();
  }

  /** Names, relative to the directory, of the files that backups are made of. */
  #names(points: readonly Point[]): string[] {
    const names = new Set<string>();
    for (const point of points) {
      const files = [this.baseFile(point.chain), this.fileOf(point), this.hashesFileOf(point)];
      for (const file of files) names.add(path.relative(this.home, file));
    }
    return [...names];
  }

  async #stamps(points: readonly Point[]): Promise<Manifest['stamps']> {
    const stamps: Record<string, Stamp> = {};
    for (const name of this.#names(points)) {
      const stamp = await stampOf(this.disk, path.join(this.home, name));
      if (stamp) stamps[name] = stamp; // else it is of an older chain; verify says so
    }
    return stamps;
  }
}

/** Compare what is stored with its hashes; `before`: the hashes of the backup below the uppermost increment, if right. */
async function verifyStored(
  chain: Chain,
  hashes: BlockHashes,
  before: BlockHashes | undefined,
  advance: (bytes: number) => void,
  signal: AbortSignal | undefined,
): Promise<void> {
  const only = before && chain.top;
  /** The block that the next stored byte is in. */
  let stored = -1;
  let looked = 0;
  for (let index = 0; index < hashes.count; index++) {
    if (stored < index) {
      const next = await chain.nextStored(index * hashes.blockBytes, only);
      stored = next >= hashes.size ? hashes.count : Math.floor(next / hashes.blockBytes);
    }
    const isExpected = before ? hashes.agrees(index, before) : hashes.isZero(index);
    if (stored === index || !isExpected) {
      signal?.throwIfAborted();
      await chain.readChecked(hashes, index);
    } else if (++looked % BLOCKS_AT_ONCE === 0) {
      // Promises alone never let a signal in.
      await new Promise((resolve) => setImmediate(resolve));
      signal?.throwIfAborted();
    }
    advance(hashes.lengthOf(index));
  }
}

/** What is stored of it is read, the rest is zeros. */
function imageOf(chain: Chain): Image {
  return {
    size: chain.size,
    isData: async (offset, length) => (await chain.nextStored(offset)) < offset + length,
    read: (offset, into) => chain.read(offset, into),
  };
}

function isDamage(error: unknown): error is OperationError {
  return error instanceof OperationError && error.code === 'DAMAGED';
}

/** Of the disks, together. */
export function bytesOf(points: readonly Point[]): number {
  return points.reduce((sum, { size }) => sum + size, 0);
}

function namesIn(disk: HostDisk, directory: string): Promise<string[]> {
  return inDirectory(disk, directory, (at) => disk.readdir(at('.')));
}

async function zeroOut(image: OpenFile, offset: number, length: number): Promise<void> {
  if (await image.punchHole(offset, length)) return;
  const zeros = Buffer.alloc(Math.min(length, CLUSTER_BYTES));
  for (let done = 0; done < length; done += zeros.length) {
    await image.write(zeros.subarray(0, Math.min(zeros.length, length - done)), offset + done);
  }
}

/** undefined if there is no such file. Errors: BAD_TARGET. */
async function stampOf(disk: HostDisk, file: string): Promise<Stamp | undefined> {
  const found = await statRegular(disk, file);
  return found && { bytes: found.size, mtimeMs: Math.floor(found.mtimeMs) };
}

/** Make the directory, but not those above it: a backup disk that is not mounted must not be taken for an empty one. */
async function makeHome(disk: HostDisk, { home, image }: Place, given: string): Promise<boolean> {
  if (disk.lstatSync(home)) {
    await namesIn(disk, home); // it is a directory, and not a link to one
    return false;
  }
  if (image !== undefined && disk.existsSync(image)) {
    throw new OperationError(
      'BAD_TARGET',
      `${given} exists and is no backup target: ${home} is missing; give another name, or remove the file`,
    );
  }
  const parent = path.dirname(home);
  if (!disk.existsSync(parent)) {
    throw new OperationError('BAD_TARGET', `${parent} does not exist; make it, or mount the disk that belongs there`);
  }
  disk.mkdirSync(home, 0o700);
  return true;
}

async function refuseForeign(disk: HostDisk, { home, image }: Place, given: string, isNew: boolean): Promise<void> {
  if (isNew) return;
  const names = await namesIn(disk, home);
  if (names.some((name) => OUR_FILES.test(name) && name.endsWith('.hashes'))) {
    throw new OperationError(
      'DAMAGED',
      `${path.join(home, MANIFEST)} is missing: put it back from a copy, or give another place; ` +
        `the backups in ${home} can be read with qemu-img`,
    );
  }
  const foreign = names.find((name) => !EMPTY_ENOUGH.has(name));
  if (foreign !== undefined || (image !== undefined && disk.existsSync(image))) {
    throw new OperationError(
      'BAD_TARGET',
      `${given} holds no backups, but other things (${foreign ?? path.basename(image ?? '')}); ` +
        `give a directory of its own, for example ${path.join(given, 'NAME')}`,
    );
  }
}

function notATarget(disk: HostDisk, given: string, { home, image }: Place): OperationError {
  if (image !== undefined && disk.existsSync(image)) {
    return new OperationError(
      'BAD_TARGET',
      `${given} is no backup target: ${home} is missing; a plain image goes in with 'sheepgate import ${given} NAME'`,
    );
  }
  const within = disk.existsSync(home)
    ? disk.readdirSync(home).filter((name) => disk.existsSync(path.join(home, name, MANIFEST)))
    : [];
  const named = within.slice(0, MAX_NAMED).map((name) => path.join(given, name));
  const hint =
    within.length === 0 ? '' : `; there are some in ${named.join(', ')}${within.length > MAX_NAMED ? ', …' : ''}`;
  return new OperationError('BAD_TARGET', `there are no backups in ${given}${hint}`);
}

/** One run at a time. undefined where a target that is only read has no lock that could be taken. */
async function lockOf(disk: HostDisk, home: string, flags: 'r' | 'r+'): Promise<OpenFile | undefined> {
  const file = path.join(home, LOCK);
  let handle: OpenFile;
  try {
    handle = await openLock(disk, file, flags);
  } catch (error) {
    if (flags === 'r' && (error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
  let isOurs: boolean;
  try {
    isOurs = handle.tryLock();
  } catch (error) {
    // A network filesystem locks only what is open for writing, which a read-only one cannot be.
    if (flags === 'r') isOurs = true;
    else {
      await handle.close();
      throw error;
    }
  }
  if (isOurs) return handle;
  await handle.close();
  throw new OperationError('BUSY', `another sheepgate is at work on the backups in ${home}; wait for it to end`);
}
