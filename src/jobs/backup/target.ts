/**
 * A backup target: a directory with the backups of one VDI, or a raw image that is kept up to date, with such a directory beside
 * it. Owns the files and the order in which they change, so that every backup in the manifest can be read at any time: a new
 * backup is complete before the manifest lists it, and an old one is removed from the manifest before its data goes. Never
 * opens a store. Other users may be able to write there: files are opened by target-files.ts only, and their names are made of
 * numbers and times in the manifest, never of text in it or in another file.
 *
 *   manifest.json                  the list of backups
 *   base-C.img                     raw image: the oldest backup of chain C; of an image target, FILE itself
 *   NNNN-TIME.qcow2                one per backup, on top of the one before it; the oldest is empty and on top of the image
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
/** Times that differ by no more are taken as equal: programs that copy a file may round its time. */
const TIME_SLACK_MS = 1;

export class BackupTarget {
  /** The disk that the target is on. */
  readonly disk: HostDisk;
  readonly home: string;
  readonly image: string | undefined;
  #manifest: Manifest;
  readonly #lock: OpenFile | undefined;
  /** A new image that has not yet replaced the old one. */
  #waiting: string | undefined;

  private constructor(disk: HostDisk, place: TargetPaths, manifest: Manifest, lock: OpenFile | undefined) {
    this.disk = disk;
    this.home = place.home;
    this.image = place.image;
    this.#manifest = manifest;
    this.#lock = lock;
  }

  /**
   * Open the target for a backup of `vdi`, or make it. The rest of an interrupted run is finished or removed first. Errors:
   * BAD_TARGET, BUSY, DAMAGED, FORMAT.
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
      }
      // Also if an earlier run has made it: that run may have ended before this.
      if (manifest.points.length === 0) await syncDirectory(disk, path.dirname(place.home));
      const target = await BackupTarget.#at(disk, place, manifest, lock);
      await target.#recover(work, isFull);
      return target;
    } catch (error) {
      await lock?.close();
      throw error;
    }
  }

  /** Open the target to read, also on a read-only filesystem. Errors: BAD_TARGET, BUSY, DAMAGED, FORMAT. */
  static async openToRead(given: string, disk = hostDisk): Promise<BackupTarget> {
    const place = pathsOf(disk, given);
    const manifest = await readManifest(disk, place.home);
    if (!manifest) throw notATarget(disk, given, place);
    const lock = await lockTarget(disk, place.home, 'r');
    try {
      // Read again: it may have changed before we had the lock.
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

  /** The file of a backup, which qemu can open. */
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

  /** The raw image, and the increments on top of it. */
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

  /** The backing file of the next increment. */
  backingOf(point: Point): Backing {
    return { name: path.basename(this.fileOf(point)), format: 'qcow2' };
  }

  /**
   * Check, before a backup is added, that all files are there and as the last run left them. If a time differs, as in a copied
   * target, everything is read and compared with its hashes. Errors: DAMAGED, BAD_TARGET.
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
        touched.push(file); // a run was interrupted before it noted the time
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
    work.log(
      `changed since the last run: ${which}; comparing the stored backups with their hashes, which takes a while`,
    );
    const progress = work.progress('comparing with the hashes', bytesOf(points));
    try {
      for await (const { message } of this.verify(points, progress.advance, work.signal)) {
        throw new OperationError('DAMAGED', message);
      }
    } finally {
      progress.end();
    }
    work.log('the stored backups match their hashes');
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

  /** Compute the SHA-256 of a backup's image, as sha256sum does, and note it in the manifest. Errors: DAMAGED. */
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
   * Add a backup, whose files are complete, to the manifest. `newBase` is the complete image of a full backup, under a name of
   * its own in the target's directory.
   */
  async commit(point: Point, newBase: string | undefined, store: string): Promise<void> {
    // A new image replaces the old one, and with it all old backups.
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
   * Keep the newest `count` backups. In the newest chain the oldest backup is dropped by writing the next one into the image
   * below it; an older chain is dropped as a whole, when none of its backups is wanted. If it is stopped, the next run
   * continues. Returns the ids of dropped backups. Errors: DAMAGED, BAD_TARGET.
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
    // A write of the manifest that failed may still have taken effect.
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

  /** A full backup must not fail because of damage in the old chain: it leaves a fold unfinished, which harms nothing. */
  async #recover(work: JobContext, isFull: boolean): Promise<void> {
    const { folding, installing } = this.#manifest;
    if (installing !== null) await this.#install();
    const folded = this.points.find(({ id }) => id === folding);
    if (folded && !isFull && folded.chain === this.last?.chain) {
      work.log('the last run was interrupted while it dropped an old backup; completing that');
      await this.#fold(folded, work);
    }
    if (await this.removeLeftovers()) work.log('the last run was interrupted; its partial files were removed');
  }

  async #install(): Promise<void> {
    if (this.#manifest.installing === null || this.image === undefined) return;
    if (this.#waiting !== undefined) await moveFile(this.disk, this.#waiting, this.image);
    this.#waiting = undefined;
    await this.#write({ installing: null, stamps: await this.#stamps(this.points) });
  }

  /** Find out whether a new image still has to be installed. Errors: BAD_TARGET. */
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

  /** Write an empty increment on top of the image of the chain, so that every backup has a file. */
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
      if (stamp) stamps[name] = stamp; // else a file of an older chain is missing, which verify reports
    }
    return stamps;
  }
}

/** The sizes of the disks, together. */
export function bytesOf(points: readonly Point[]): number {
  return points.reduce((sum, { size }) => sum + size, 0);
}

/** undefined if there is no such file. Errors: BAD_TARGET. */
async function stampOf(disk: HostDisk, file: string): Promise<Stamp | undefined> {
  const found = await statRegular(disk, file);
  return found && { bytes: found.size, mtimeMs: Math.floor(found.mtimeMs) };
}
