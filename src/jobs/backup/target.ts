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
import { imageSha256 } from '../image-sha256.js';
import type { JobContext } from '../reporting.js';
import { moveFile, removeFile, statRegular, syncDirectory } from '../target-files.js';
import { Chain, type Link } from './chain.js';
import { checkIncrement, checkWritable, foldIntoImage } from './fold.js';
import {
  MANIFEST,
  newManifest,
  readManifest,
  writeManifest,
  type Manifest,
  type Point,
  type Stamp,
} from './manifest.js';
import { IncrementWriter, type Backing } from './qcow2-file.js';
import { isOurFile, lockTarget, makeHome, namesIn, notATarget, PARTIAL, refuseForeign } from './target-directory.js';
import { pathsOf, stemOf, type TargetPaths } from './target-paths.js';
import { imageOf, verifyBackups, type Damage } from './verify-stored.js';

/** Files that a message names. */
const MAX_NAMED = 5;
/** Times that are further apart are not the same: who copies a file may round its time. */
const TIME_SLACK_MS = 1;

export class BackupTarget {
  /** The disk that the target is on. */
  readonly disk: HostDisk;
  readonly home: string;
  readonly image: string | undefined;
  #manifest: Manifest;
  readonly #lock: OpenFile | undefined;
  /** The new image that waits for the place of the old one, if it is still there. */
  #waiting: string | undefined;

  private constructor(disk: HostDisk, place: TargetPaths, manifest: Manifest, lock: OpenFile | undefined) {
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
    const lock = await lockTarget(disk, place.home, 'r+');
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
    const lock = await lockTarget(disk, place.home, 'r');
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
    place: TargetPaths,
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
      (error: unknown) => {
        if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
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

  /** See verifyBackups. */
  verify(
    points: readonly Point[],
    advance?: (bytes: number) => void,
    signal?: AbortSignal,
    options?: { readonly sha256?: boolean },
  ): AsyncGenerator<Damage> {
    return verifyBackups(this, points, advance, signal, options);
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
      await checkIncrement(await this.hashesOf(next), await this.openChain(next), work.signal);
      await checkWritable(this.disk, this.baseFile(next.chain));
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
      if (!isOurFile(name) || named.has(name)) continue;
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

  async #fold(point: Point, work: JobContext): Promise<void> {
    const file = this.fileOf(point);
    const { size, blockBytes } = point;
    await foldIntoImage({ disk: this.disk, file, baseFile: this.baseFile(point.chain), size, blockBytes }, work);
    await this.writeEmpty(file, size, point.chain);
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

/** Of the disks, together. */
export function bytesOf(points: readonly Point[]): number {
  return points.reduce((sum, { size }) => sum + size, 0);
}

/** undefined if there is no such file. Errors: BAD_TARGET. */
async function stampOf(disk: HostDisk, file: string): Promise<Stamp | undefined> {
  const found = await statRegular(disk, file);
  return found && { bytes: found.size, mtimeMs: Math.floor(found.mtimeMs) };
}
