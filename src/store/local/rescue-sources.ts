/**
 * What is left of a store, for `store rescue`: the state in meta.mdb or in a copy of it, the changes recorded since, and the object
 * files. Owns how each is read and what counts as readable. Writes nothing, and does not use LMDB: any of it may be damaged.
 */
import path from 'node:path';
import { O_NONBLOCK, O_RDONLY, type HostDisk } from '../../system/disk.js';
import { StoreError } from '../store-error.js';
import { MAX_BLOCK_SIZE_SHIFT, MAX_DATA_OBJECTS, MIN_BLOCK_SIZE_SHIFT, type VdiRecord } from '../vdi-record.js';
import { MAX_VID } from '../../sheepdog/object-ids.js';
import type { NumberedChange } from './change-format.js';
import { changesFiles, readChanges } from './change-record.js';
import { OBJECTS } from './data-objects.js';
import { databasesOf, entriesOf, pagesOfFile, readAll, readMeta, type LmdbState } from './lmdb-pages.js';
import { META_FILE } from './metadata.js';
import { readCopy, type CopyHeader } from './metadata-copy-format.js';
import { COPIES, copyFiles, CREATION_VIDS, MERGED_VIDS } from './metadata-copies.js';
import { FLAT_LAYOUT, OBJECT_LAYOUT, ObjectNames, type FileLayout } from './object-names.js';
import { OVERLAYS } from './open-layers.js';
import { decodeGroup, GROUP_OBJECTS, OVERLAY_BLOCK } from './overlay-records.js';
import { openPlainFile } from './plain-file.js';
import { asStoreError } from './store-errors.js';
import { localObjectKey } from './reference-counts.js';
import { PAGE_ENTRIES } from './map-pages.js';

/** Unit of st_blocks, stat(2). */
const STATUS_BLOCK = 512;
/** Formats whose objects and maps a rescue understands; not FORMAT_VERSION, which may be ahead of it. */
const KNOWN_FORMATS = new Set(['1', '2']);
/** Damaged parts that are listed. */
const MAX_PROBLEMS = 20;
/** Databases of meta.mdb that a rescue understands, or need not: `state` is about clients that are gone. */
const KNOWN_DATABASES = new Set(['', 'vdis', 'pages', 'flushed', 'overlays', 'state', CREATION_VIDS, MERGED_VIDS]);

/** The content of meta.mdb at one moment. */
export class MetadataState {
  /** The entries of the main database: format, session, and so on. */
  readonly info = new Map<string, string>();
  readonly records = new Map<number, VdiRecord>();
  readonly flushed = new Map<number, number>();
  /** vid without a record -> the vid of the working VDI that made objects under it; in the order in which they were given. */
  readonly creationVids = new Map<number, number>();
  /** Vids whose overlays had given blocks to the objects below. */
  readonly merged = new Set<number>();
  readonly problems: string[] = [];
  /** vid -> group -> the record of the overlays of that group (overlay-records.ts). */
  readonly overlays = new Map<number, Map<number, Buffer>>();
  readonly #pages = new Map<number, Map<number, Buffer>>();

  problem(text: string): void {
    if (this.problems.length < MAX_PROBLEMS) this.problems.push(text);
  }

  /** One entry, as LMDB has it; key and value are copied. */
  add(database: string, key: Buffer, value: Buffer): void {
    switch (database) {
      case '':
        this.info.set(key.toString(), value.toString());
        return;
      case 'vdis': {
        const record = recordIn(value);
        if (record === undefined) this.problem('the record of a VDI cannot be read');
        else this.records.set(record.vid, record);
        return;
      }
      case 'pages': {
        const [vid, page] = numbersIn(key);
        if (vid === undefined || page === undefined || !isPage(value))
          return this.problem('a page of a map cannot be read');
        let pages = this.#pages.get(vid);
        if (!pages) this.#pages.set(vid, (pages = new Map<number, Buffer>()));
        pages.set(page, Buffer.from(value));
        return;
      }
      case 'overlays': {
        const [vid, group] = numbersIn(key);
        if (vid === undefined || !(vid > 0 && vid <= MAX_VID) || group === undefined || !isGroup(group, value))
          return this.problem('a record of overlays cannot be read');
        let groups = this.overlays.get(vid);
        if (!groups) this.overlays.set(vid, (groups = new Map<number, Buffer>()));
        groups.set(group, Buffer.from(value));
        return;
      }
      case 'flushed': {
        const [vid] = numbersIn(key);
        const generation = Number(value.toString());
        if (vid !== undefined && Number.isSafeInteger(generation)) this.flushed.set(vid, generation);
        return;
      }
      case CREATION_VIDS:
        this.creationVids.set(Number(key.toString()), Number(value.toString()));
        return;
      case MERGED_VIDS:
        this.merged.add(Number(key.toString()));
        return;
      default:
        if (!KNOWN_DATABASES.has(database)) this.problem(`this version does not know the database ${database}`);
    }
  }

  /** The map of a VDI, with an entry for each object of its size. */
  mapOf(record: VdiRecord): Uint32Array {
    const map = new Uint32Array(Math.ceil(record.size / 2 ** record.blockSizeShift));
    const bytes = Buffer.from(map.buffer);
    for (const [page, entries] of this.#pages.get(record.vid) ?? [])
      if (page * PAGE_ENTRIES < map.length) entries.copy(bytes, page * 4 * PAGE_ENTRIES);
    return map;
  }

  /** Errors: FORMAT (of another format than a rescue knows). */
  mustBeKnown(file: string): void {
    const format = this.info.get('format');
    if (format === undefined || KNOWN_FORMATS.has(format)) return;
    throw new StoreError(
      'FORMAT',
      `${file} has store format ${format}, and this sheepgate can rescue format ${[...KNOWN_FORMATS].join()}; use a newer sheepgate`,
    );
  }
}

/** meta.mdb, as it is. */
export interface FoundMetadata {
  readonly file: string;
  /** Undefined if nothing of it can be read. */
  readonly state: MetadataState | undefined;
  readonly transaction: number;
  /** Why it cannot be used; undefined if it is whole, as far as LMDB's structure tells. */
  readonly problem: string | undefined;
}

export async function readMetadata(disk: HostDisk, directory: string): Promise<FoundMetadata> {
  const file = path.join(directory, META_FILE);
  const nothing = { file, state: undefined, transaction: 0 };
  const status = disk.statSync(file);
  if (status === undefined) return { ...nothing, problem: 'it is missing' };
  if (!status.isFile()) return { ...nothing, problem: 'it is not a file' };
  if (status.size === 0) return { ...nothing, problem: 'it is empty' };
  try {
    const fd = disk.openSync(file, O_RDONLY | O_NONBLOCK);
    try {
      const { states, problem } = readMeta(disk, fd);
      const [newest] = states;
      if (newest === undefined) return { ...nothing, problem };
      const state = await readState(disk, fd, newest);
      const found = problem ?? state.problems[0];
      return { file, state, transaction: newest.transaction, problem: found };
    } finally {
      disk.closeSync(fd);
    }
  } catch (error) {
    return { ...nothing, problem: `it cannot be read: ${(error as Error).message}` };
  }
}

async function readState(disk: HostDisk, fd: number, from: LmdbState): Promise<MetadataState> {
  const state = new MetadataState();
  const damaged = (problem: string): void => state.problem(problem);
  for (const { name, entries } of databasesOf(pagesOfFile(disk, fd, from.pageSize), from, damaged))
    for await (const { key, value } of entries()) state.add(name, key, value);
  await readAll(entriesOf(pagesOfFile(disk, fd, from.pageSize), from, from.free, damaged));
  return state;
}

/** A copy that is whole. */
export interface FoundCopy {
  readonly file: string;
  readonly header: CopyHeader;
  readonly state: MetadataState;
}

/** The newest whole copy, and what is wrong with newer ones. */
export async function readNewestCopy(
  disk: HostDisk,
  directory: string,
): Promise<{ readonly copy: FoundCopy | undefined; readonly problems: readonly string[] }> {
  const problems: string[] = [];
  for (const { name } of copyFiles(namesIn(disk, path.join(directory, COPIES), problems))) {
    const file = path.join(directory, COPIES, name);
    try {
      const copy = await readWholeCopy(disk, file);
      if (copy.state.problems.length === 0) return { copy, problems };
      problems.push(`${file}: ${copy.state.problems[0]}`);
    } catch (error) {
      problems.push(`${file}: ${(error as Error).message}`);
    }
  }
  return { copy: undefined, problems };
}

async function readWholeCopy(disk: HostDisk, file: string): Promise<FoundCopy> {
  const fd = openPlainFile(disk, file);
  try {
    const state = new MetadataState();
    const entries = readCopy(disk, fd);
    for (;;) {
      const next = await entries.next();
      if (next.done) return { file, header: next.value, state };
      state.add(next.value.database, next.value.key, next.value.value);
    }
  } finally {
    await disk.close(fd);
  }
}

/** The changes with numbers above a copy's, in their order. */
export interface FoundChanges {
  readonly changes: readonly NumberedChange[];
  /** Why changes may be missing; undefined if all of them are there. */
  readonly gap: string | undefined;
  /** The last session that has recorded something. */
  readonly session: string | undefined;
  readonly store: string | undefined;
}

/** `above`: the number of the last change that is known otherwise; 0 if none is. */
export function readChangesAbove(disk: HostDisk, directory: string, above: number): FoundChanges {
  const folder = path.join(directory, COPIES);
  const problems: string[] = [];
  const changes: NumberedChange[] = [];
  let session: string | undefined;
  let store: string | undefined;
  const files = changesFiles(namesIn(disk, folder, problems));
  for (const [n, { name, first, isIncomplete }] of files.entries()) {
    // Another file goes on within the copy: nothing of this one is needed.
    if ((files[n + 1]?.first ?? Infinity) <= above + 1) continue;
    try {
      const found = readChanges(disk, path.join(folder, name));
      const last = found.changes.at(-1)?.number ?? 0;
      const isOld = last <= above && first <= above;
      if (!isOld && found.problem !== undefined) problems.push(`${name}: ${found.problem}`);
      if (isIncomplete && (first > above || last >= above))
        problems.push(`${name}: changes after it were not recorded`);
      session = found.header?.session ?? session;
      store = found.header?.store ?? store;
      changes.push(...found.changes.filter(({ number }) => number > above));
    } catch (error) {
      problems.push(`${name}: ${(error as Error).message}`);
    }
  }
  let next = above + 1;
  for (const { number, change } of changes) {
    if (number !== next) problems.push(`changes ${next} to ${number - 1} are missing`);
    next = number + 1;
    if ('gap' in change) problems.push(change.gap);
  }
  return { changes, gap: problems[0], session, store };
}

function namesIn(disk: HostDisk, directory: string, problems: string[]): string[] {
  try {
    return disk.existsSync(directory) ? disk.readdirSync(directory) : [];
  } catch (error) {
    problems.push((error as Error).message);
    return [];
  }
}

/** The file of an object or of a segment. */
export interface ObjectFile {
  /** Its length. */
  readonly size: number;
  /** Bytes that it takes on the disk. */
  readonly bytes: number;
}

/** Files of one kind, by key. */
export interface FoundFiles {
  readonly files: ReadonlyMap<number, ObjectFile>;
  /** The path of the file of a key, whether it exists or not. */
  readonly pathOf: (key: number) => string;
}

/** Object files by key (localObjectKey). Errors: those of the disk. */
export function readObjects(disk: HostDisk, directory: string): Promise<FoundFiles> {
  return readFiles(disk, path.join(directory, OBJECTS), OBJECT_LAYOUT);
}

/** Segment files by key (segmentOf). Errors: those of the disk. */
export function readSegments(disk: HostDisk, directory: string): Promise<FoundFiles> {
  return readFiles(disk, path.join(directory, OVERLAYS), FLAT_LAYOUT);
}

async function readFiles(disk: HostDisk, root: string, layout: FileLayout): Promise<FoundFiles> {
  const names = new ObjectNames(disk, root, { isReadOnly: true, layout }, asStoreError);
  const files = new Map<number, ObjectFile>();
  const pathOf = (key: number): string => names.path(key);
  if (!disk.existsSync(root)) return { files, pathOf };
  const folders = layout.folders.length === 1 ? layout.folders : await disk.readdir(root);
  for (const folder of folders) {
    if (!layout.folders.includes(folder) || !isDirectory(disk, path.join(root, folder))) continue;
    for (const name of await disk.readdir(path.join(root, folder))) {
      const oid = /^([0-9a-f]{8})([0-9a-f]{8})$/.exec(name);
      const [vid, idx] = [parseInt(oid?.[1] ?? '', 16), parseInt(oid?.[2] ?? '', 16)];
      if (!(vid > 0 && vid <= MAX_VID && idx < MAX_DATA_OBJECTS)) continue;
      const key = localObjectKey(vid, idx);
      const file = path.join(root, folder, name);
      if (pathOf(key) !== file) continue;
      const status = await disk.lstat(file).catch(() => undefined);
      if (status?.isFile()) files.set(key, { size: status.size, bytes: status.blocks * STATUS_BLOCK });
    }
  }
  return { files, pathOf };
}

function isDirectory(disk: HostDisk, directory: string): boolean {
  return disk.statSync(directory)?.isDirectory() ?? false;
}

function isPage(bytes: Buffer): boolean {
  if (bytes.length !== 4 * PAGE_ENTRIES) return false;
  for (let at = 0; at < bytes.length; at += 4) if (bytes.readUInt32LE(at) > MAX_VID) return false;
  return true;
}

function isGroup(group: number, bytes: Buffer): boolean {
  const stored = decodeGroup(bytes);
  if (stored === undefined || !isObjectSize(stored.blocks * OVERLAY_BLOCK)) return false;
  return group * GROUP_OBJECTS < MAX_DATA_OBJECTS && stored.members.every((each) => (each?.base ?? 0) <= MAX_VID);
}

/** Whether an object may have this length. */
export function isObjectSize(size: number): boolean {
  const shift = Math.log2(size);
  return Number.isInteger(shift) && shift >= MIN_BLOCK_SIZE_SHIFT && shift <= MAX_BLOCK_SIZE_SHIFT;
}

/** Undefined if the bytes are no record that this version could have stored. */
function recordIn(value: Buffer): VdiRecord | undefined {
  try {
    const record = JSON.parse(value.toString()) as VdiRecord;
    return isRecord(record) ? record : undefined;
  } catch {
    return undefined;
  }
}

/** Whether what JSON or a change says is a record. */
export function isRecord(record: VdiRecord): boolean {
  const { vid, name, tag, isSnapshot, snapId, size, blockSizeShift, parentVid, createdAt } = record;
  const numbers: readonly unknown[] = [vid, snapId, size, blockSizeShift, parentVid, createdAt];
  return (
    numbers.every((number) => Number.isSafeInteger(number) && (number as number) >= 0) &&
    typeof (name as unknown) === 'string' &&
    typeof (tag as unknown) === 'string' &&
    typeof (isSnapshot as unknown) === 'boolean' &&
    vid > 0 &&
    vid <= MAX_VID &&
    blockSizeShift >= MIN_BLOCK_SIZE_SHIFT &&
    blockSizeShift <= MAX_BLOCK_SIZE_SHIFT &&
    size <= MAX_DATA_OBJECTS * 2 ** blockSizeShift
  );
}

/**
 * The numbers in a key of lmdb-js (ordered-binary): each a double whose bits are moved by four so that keys sort, without its
 * last bytes where they are zero; separated by a zero byte. Empty if it is no such key.
 */
export function numbersIn(key: Buffer): number[] {
  const numbers: number[] = [];
  const double = Buffer.alloc(8);
  for (let at = 0; at < key.length; at += 10) {
    const part = Buffer.alloc(9);
    key.copy(part, 0, at, Math.min(at + 9, key.length));
    const [high, low] = [part.readUInt32BE(0), part.readUInt32BE(4)];
    if (high >>> 28 !== 1) return [];
    double.writeUInt32BE((((high & 0x0fffffff) << 4) | (low >>> 28)) >>> 0, 0);
    double.writeUInt32BE(((low << 4) | ((part[8] ?? 0) >>> 4)) >>> 0, 4);
    const number = double.readDoubleBE(0);
    if (!Number.isSafeInteger(number) || number < 0) return [];
    numbers.push(number);
  }
  return numbers;
}
