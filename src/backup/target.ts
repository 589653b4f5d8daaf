/**
 * A backup target: a directory with the backups of one VDI, or a raw image kept up to date with such a directory beside
 * it. Owns the files and the order in which they change, so that whatever happens every backup in the manifest can be
 * read: a new one is whole before it is named, an old one is named no more before its data goes. Asks nobody about VDIs.
 *
 *   manifest.json                  what there is
 *   base-C.img                     raw image: the oldest backup of chain C, or the image FILE itself instead
 *   NNNN-TIME.qcow2                one per backup, over the one before it; the oldest holds nothing and is over the image
 *   NNNN-TIME.hashes               SHA-256 of the blocks of the disk
 */
import { randomBytes } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { OperationError } from '../daemon/operations.js';
import { punchHole, tryLock } from '../store/local/libc.js';
import { BlockHashes } from './block-hashes.js';
import { Chain } from './chain.js';
import { moveFile, syncDirectory, writeFully } from './file-io.js';
import { MANIFEST, newManifest, readManifest, writeManifest, type Manifest, type Point } from './manifest.js';
import { CLUSTER_BYTES, IncrementReader, IncrementWriter, type Backing } from './qcow2-file.js';

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
/** May be in a directory that is otherwise empty. */
const EMPTY_ENOUGH = new Set([LOCK, 'lost+found', `${MANIFEST}${PARTIAL}`]);

export interface Place {
  /** The directory that holds the manifest. */
  readonly home: string;
  /** The raw image that is kept up to date; undefined if the target is the directory. */
  readonly image: string | undefined;
}

/** Which target a path names. Errors: BAD_TARGET. */
export function placeOf(given: string): Place {
  const absolute = path.resolve(given);
  // What a link points to: a new image would take the place of the link.
  const where = fs.existsSync(absolute) ? fs.realpathSync(absolute) : absolute;
  const status = fs.statSync(where, { throwIfNoEntry: false });
  if (status?.isDirectory()) return { home: where, image: undefined };
  if (status && !status.isFile()) {
    throw new OperationError('BAD_TARGET', `${given} is neither a file nor a directory; give one to keep backups in`);
  }
  const beside = `${where}${BESIDE}`;
  const isImage =
    status !== undefined ||
    fs.existsSync(beside) ||
    (!given.endsWith('/') && IMAGE_ENDINGS.some((ending) => where.endsWith(ending)));
  return isImage ? { home: beside, image: where } : { home: where, image: undefined };
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

export class BackupTarget {
  readonly home: string;
  readonly image: string | undefined;
  #manifest: Manifest;
  readonly #lock: fs.promises.FileHandle | undefined;

  private constructor(place: Place, manifest: Manifest, lock: fs.promises.FileHandle | undefined) {
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
    { log, isFull }: { readonly log: (line: string) => void; readonly isFull: boolean },
  ): Promise<BackupTarget> {
    const place = placeOf(given);
    const isNew = makeHome(place, given);
    const lock = await lockOf(place.home, 'r+');
    try {
      let manifest = await readManifest(place.home);
      if (manifest && manifest.vdi !== vdi) {
        const them = manifest.vdi;
        throw new OperationError(
          'BAD_TARGET',
          `${given} holds backups of "${them}", not of "${vdi}"; give another place`,
        );
      }
      if (!manifest) {
        refuseForeign(place, given, isNew);
        manifest = newManifest(randomBytes(4).toString('hex'), vdi, store);
        await writeManifest(place.home, manifest);
        await syncDirectory(path.dirname(place.home));
      }
      const target = new BackupTarget(place, manifest, lock);
      await target.#recover(log, isFull);
      return target;
    } catch (error) {
      await lock?.close();
      throw error;
    }
  }

  /** Open it to read, on a read-only filesystem too. Errors: BAD_TARGET, BUSY, DAMAGED, FORMAT. */
  static async openToRead(given: string): Promise<BackupTarget> {
    const place = placeOf(given);
    const manifest = await readManifest(place.home);
    if (!manifest) throw notATarget(given, place);
    const lock = await lockOf(place.home, 'r');
    try {
      // Again: it may have changed until we had the lock.
      return new BackupTarget(place, (await readManifest(place.home)) ?? manifest, lock);
    } catch (error) {
      await lock?.close();
      throw error;
    }
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

  /** What a backup's files are, the raw image first; each reads over the ones before it. */
  filesOf(point: Point): string[] {
    const below = this.points.filter(({ chain, id }) => chain === point.chain && id <= point.id);
    return [this.baseFile(point.chain), ...below.map((each) => this.fileOf(each))];
  }

  /** For qemu, and for people. */
  fileOf(point: Point): string {
    return path.join(this.home, `${stemOf(point)}.qcow2`);
  }

  hashesFileOf(point: Point): string {
    return path.join(this.home, `${stemOf(point)}.hashes`);
  }

  baseFile(chain: number): string {
    const { installing } = this.#manifest;
    if (this.image === undefined) return path.join(this.home, `base-${chain}.img`);
    const waiting = installing === null ? undefined : path.join(this.home, installing);
    return waiting !== undefined && fs.existsSync(waiting) ? waiting : this.image;
  }

  openChain(point: Point): Promise<Chain> {
    const [base, ...increments] = this.filesOf(point);
    return Chain.open(base as string, increments, point.size);
  }

  hashesOf(point: Point): Promise<BlockHashes> {
    return BlockHashes.load(this.hashesFileOf(point), point.size, point.blockBytes, point.sha256).catch(
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
   * with its hashes; that is how a copied target goes on being one. Errors: DAMAGED.
   */
  async checkUntouched(log: (line: string) => void): Promise<void> {
    const touched: string[] = [];
    const chain = this.last?.chain;
    for (const name of this.#names(this.points.filter((point) => point.chain === chain))) {
      const file = path.join(this.home, name);
      const stamp = this.#manifest.stamps[name];
      const found = await stampOf(file).catch(() => undefined);
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
    const damage: Damage[] = [];
    for await (const found of this.verify()) damage.push(found);
    const first = damage.find(({ id }) => this.points.some((each) => each.id === id && each.chain === chain));
    if (first) throw new OperationError('DAMAGED', first.message);
    log(`not as the last run left it: ${touched.join(', ')}; compared with the hashes, it is right`);
    await this.#write({ stamps: await this.#stamps(this.points) });
  }

  /**
   * Read everything that is kept and compare it with its hashes, each byte once; backups over a damaged one as a whole,
   * because they may be damaged with it, or have a copy of their own of what is. Yields the first finding in each backup.
   */
  async *verify(advance: (bytes: number) => void = () => undefined, signal?: AbortSignal): AsyncGenerator<Damage> {
    const damaged = new Set<number>();
    for (const point of this.points) {
      const isOldest = this.points.find(({ chain }) => chain === point.chain) === point;
      const readsAll = isOldest || damaged.has(point.chain);
      try {
        const hashes = await this.hashesOf(point);
        const chain = await this.openChain(point);
        try {
          await chain.dropCached();
          for (let index = 0; index < hashes.count; index++) {
            signal?.throwIfAborted();
            const isHere = readsAll || (await hasOwn(chain.top, index * hashes.blockBytes, hashes.lengthOf(index)));
            if (isHere) await chain.readChecked(hashes, index);
            advance(hashes.lengthOf(index));
          }
        } finally {
          await chain.close();
        }
      } catch (error) {
        if (!(error instanceof OperationError) || error.code !== 'DAMAGED') throw error;
        damaged.add(point.chain);
        yield { id: point.id, message: error.message };
      }
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
    await syncDirectory(this.home);
    const stamps = replaces ? {} : await this.#stamps(points);
    await this.#write({ points, store, installing: replaces ? newBase : null, stamps });
    if (replaces) {
      await this.#install();
      await this.removeLeftovers();
    }
  }

  /**
   * Keep the newest `count`. The oldest of the newest chain go by having the next one written into the image below it;
   * an older chain goes as a whole, when none of it is wanted. Returns the ids of those that went. Errors: DAMAGED.
   */
  async keep(count: number): Promise<number[]> {
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
      await this.#checkIncrement(next);
      await this.#write({ points: this.points.slice(1), folding: next.id, stamps: {} });
      await this.#fold(next);
      dropped.push(oldest.id);
    }
    if (dropped.length > 0) await this.removeLeftovers();
    return dropped;
  }

  /** Remove files of ours that belong to no backup. Returns whether there were any. */
  async removeLeftovers(): Promise<boolean> {
    // A write that failed may have taken place.
    this.#manifest = (await readManifest(this.home)) ?? this.#manifest;
    const { installing } = this.#manifest;
    const named = new Set([MANIFEST, ...this.#names(this.points), installing]);
    let found = false;
    for (const name of await fs.promises.readdir(this.home)) {
      if (!OUR_FILES.test(name) || named.has(name)) continue;
      await fs.promises.unlink(path.join(this.home, name));
      found = true;
    }
    return found;
  }

  /** A new chain must not fail for what is wrong with the one that it leaves: a fold that is not finished harms nothing. */
  async #recover(log: (line: string) => void, isFull: boolean): Promise<void> {
    const { folding, installing } = this.#manifest;
    if (installing !== null) await this.#install();
    const folded = this.points.find(({ id }) => id === folding);
    if (folded && !isFull && folded.chain === this.last?.chain) {
      log('the last run was interrupted while it dropped an old backup; finishing that');
      await this.#fold(folded);
    }
    if (await this.removeLeftovers()) log('the last run was interrupted; what it left behind is removed');
  }

  async #install(): Promise<void> {
    const { installing } = this.#manifest;
    if (installing === null || this.image === undefined) return;
    const waiting = path.join(this.home, installing);
    if (fs.existsSync(waiting)) await moveFile(waiting, this.image);
    await this.#write({ installing: null, stamps: await this.#stamps(this.points) });
  }

  /** It must not carry damage into the image below it, on which others stand. */
  async #checkIncrement(point: Point): Promise<void> {
    const hashes = await this.hashesOf(point);
    const chain = await this.openChain(point);
    try {
      for (let index = 0; index < hashes.count; index++) {
        if (await hasOwn(chain.top, index * hashes.blockBytes, hashes.lengthOf(index))) {
          await chain.readChecked(hashes, index);
        }
      }
    } finally {
      await chain.close();
    }
  }

  /**
   * Write an increment into the image below it. Done again from the beginning if it was interrupted: until the increment
   * is replaced by one that holds nothing it hides what changes below.
   */
  async #fold(point: Point): Promise<void> {
    const baseFile = this.baseFile(point.chain);
    const increment = await IncrementReader.open(this.fileOf(point));
    const base = await fs.promises.open(baseFile, 'r+');
    try {
      await base.truncate(point.size);
      for (let offset = 0; offset < point.size; offset += point.blockBytes) {
        for (const run of await increment.runs(offset, point.blockBytes)) {
          if (run.kind === 'zeros') await zeroOut(base.fd, run.offset, run.length);
          if (run.kind !== 'data') continue;
          const data = Buffer.allocUnsafe(run.length);
          await increment.read(run, data);
          await writeFully(base.fd, data, run.offset);
        }
      }
      await base.sync();
    } finally {
      await base.close();
      await increment.close();
    }
    await this.writeEmpty(this.fileOf(point), point.size, point.chain);
    await this.#write({ folding: null, stamps: await this.#stamps(this.points) });
  }

  /** An increment that holds nothing, over the image of the chain: so that every backup has a file of its own. */
  async writeEmpty(file: string, size: number, chain: number): Promise<void> {
    const name = this.image === undefined ? `base-${chain}.img` : path.join('..', path.basename(this.image));
    const partial = `${file}${PARTIAL}`;
    const writer = await IncrementWriter.create(partial, size, { name, format: 'raw' });
    try {
      await writer.finish();
    } finally {
      await writer.close();
    }
    await moveFile(partial, file);
  }

  async #write(change: Partial<Manifest>): Promise<void> {
    const manifest = { ...this.#manifest, ...change };
    await writeManifest(this.home, manifest);
    this.#manifest = manifest;
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
    const stamps: Record<string, { bytes: number; mtimeMs: number }> = {};
    for (const name of this.#names(points)) {
      const stamp = await stampOf(path.join(this.home, name)).catch((error: NodeJS.ErrnoException) => {
        if (error.code !== 'ENOENT') throw error;
        return undefined; // of an older chain; verify says so
      });
      if (stamp) stamps[name] = stamp;
    }
    return stamps;
  }
}

/** Whether the increment itself says anything about the range. */
async function hasOwn(increment: IncrementReader | undefined, offset: number, length: number): Promise<boolean> {
  const runs = (await increment?.runs(offset, length)) ?? [];
  return runs.some(({ kind }) => kind !== 'below');
}

async function zeroOut(fd: number, offset: number, length: number): Promise<void> {
  if (await punchHole(fd, offset, length)) return;
  const zeros = Buffer.alloc(Math.min(length, CLUSTER_BYTES));
  for (let done = 0; done < length; done += zeros.length) {
    await writeFully(fd, zeros.subarray(0, Math.min(zeros.length, length - done)), offset + done);
  }
}

async function stampOf(file: string): Promise<{ bytes: number; mtimeMs: number }> {
  const { size, mtimeMs } = await fs.promises.stat(file);
  return { bytes: size, mtimeMs: Math.floor(mtimeMs) };
}

/** Make the directory, but not those above it: a backup disk that is not mounted must not be taken for an empty one. */
function makeHome({ home, image }: Place, given: string): boolean {
  if (fs.existsSync(home)) return false;
  if (image !== undefined && fs.existsSync(image)) {
    throw new OperationError(
      'BAD_TARGET',
      `${given} exists and is no backup target: ${home} is missing; give another name, or remove the file`,
    );
  }
  const parent = path.dirname(home);
  if (!fs.existsSync(parent)) {
    throw new OperationError('BAD_TARGET', `${parent} does not exist; make it, or mount the disk that belongs there`);
  }
  fs.mkdirSync(home, { mode: 0o700 });
  return true;
}

function refuseForeign({ home, image }: Place, given: string, isNew: boolean): void {
  if (isNew) return;
  const names = fs.readdirSync(home);
  if (names.some((name) => OUR_FILES.test(name) && name.endsWith('.hashes'))) {
    throw new OperationError(
      'DAMAGED',
      `${path.join(home, MANIFEST)} is missing: put it back from a copy, or give another place; ` +
        `the backups in ${home} can be read with qemu-img`,
    );
  }
  const foreign = names.find((name) => !EMPTY_ENOUGH.has(name));
  if (foreign !== undefined || (image !== undefined && fs.existsSync(image))) {
    throw new OperationError(
      'BAD_TARGET',
      `${given} holds no backups, but other things (${foreign ?? path.basename(image ?? '')}); ` +
        `give a directory of its own, for example ${path.join(given, 'NAME')}`,
    );
  }
}

function notATarget(given: string, { home, image }: Place): OperationError {
  if (image !== undefined && fs.existsSync(image)) {
    return new OperationError(
      'BAD_TARGET',
      `${given} is no backup target: ${home} is missing; a plain image goes in with 'sheepgate import ${given} NAME'`,
    );
  }
  const within = fs.existsSync(home)
    ? fs.readdirSync(home).filter((name) => fs.existsSync(path.join(home, name, MANIFEST)))
    : [];
  const hint =
    within.length === 0 ? '' : `; there are some in ${within.map((name) => path.join(given, name)).join(', ')}`;
  return new OperationError('BAD_TARGET', `there are no backups in ${given}${hint}`);
}

/** One run at a time. undefined where a target that is only read has no lock that could be taken. */
async function lockOf(home: string, flags: 'r' | 'r+'): Promise<fs.promises.FileHandle | undefined> {
  const file = path.join(home, LOCK);
  let handle: fs.promises.FileHandle;
  try {
    handle = await fs.promises.open(file, flags === 'r' ? 'r' : 'a', 0o600);
  } catch (error) {
    if (flags === 'r' && (error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
  let isOurs: boolean;
  try {
    isOurs = tryLock(handle.fd);
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
