/**
 * The content of meta.mdb: VDI records, map pages, the format version. Only this file knows keys and encodings (FORMAT.md).
 * A call is one LMDB transaction, durable when its promise resolves. Decides nothing about objects.
 */
import { randomUUID } from 'node:crypto';
import path from 'node:path';
import type { Database } from 'lmdb';
import { removeIfThereSync, type HostDisk } from '../../system/disk.js';
import { syncDirectory } from '../../system/durable-names.js';
import type { Usage } from '../object-store.js';
import { StoreError } from '../store-error.js';
import type { VdiRecord } from '../vdi-record.js';
import type { Environment } from './lmdb-environment.js';
import { lmdbFileProblem } from './lmdb-file.js';
import { asMetadataError } from './lmdb-failures.js';
import { rescueOf } from './rescue-advice.js';
import { isEmptyPage, PAGE_ENTRIES, storedBytes, type PageWrite } from './map-pages.js';
import {
  decodeGroup,
  encodeGroup,
  GROUP_OBJECTS,
  GROUP_SHIFT,
  damagedGroup,
  type OverlayWrite,
  type StoredOverlay,
} from './overlay-records.js';
import { MetadataFile, type FileSnapshot } from './metadata-file.js';
import { makeRoomIn } from './metadata-reserve.js';
import { RecordIndex } from './record-index.js';
import { idxOf, localObjectKey, vidOf } from './reference-counts.js';
import { TimeSlice } from './time-slice.js';

/** Of a store without overlays: earlier versions can open it. */
export const FORMAT_WITHOUT_OVERLAYS = 1;
/** Of a store that has had an overlay. */
export const FORMAT_VERSION = 2;
const KNOWN_FORMATS = new Set([FORMAT_WITHOUT_OVERLAYS, FORMAT_VERSION].map(String));
/** Overlays that are stored in one transaction: it holds the loop for about a millisecond. */
export const OVERLAYS_PER_TRANSACTION = 256;
/** Pages per transaction when a whole map is stored: each transaction holds the loop for about a millisecond. */
const PAGES_PER_TRANSACTION = 128;
const PAGES_PER_READ = 64;
export const META_FILE = 'meta.mdb';
/** The name of meta.mdb until it is complete. */
export const NEW_META_FILE = 'new.mdb';
/** LMDB's lock file of earlier versions, which did not have it in memory. */
const OLD_LOCK_FILE = 'meta.mdb-lock';

/** Why unreferenced object files are kept, and the vids in their names, which no new object may have. */
export interface KeptObjects {
  readonly since: number;
  readonly why: string;
  readonly vids: readonly number[];
}

export interface MetadataChange {
  readonly records?: readonly VdiRecord[];
  /** The flushes that the stored maps contain with this change. */
  readonly flushed?: readonly { readonly vid: number; readonly generation: number }[];
  /** Vids of records to remove, with all their pages. */
  readonly removed?: readonly number[];
  readonly pages?: readonly PageWrite[];
  /** By key (localObjectKey); undefined: the object is no overlay. */
  readonly overlays?: ReadonlyMap<number, OverlayWrite | undefined>;
}

export interface OpenMetadata {
  readonly readOnly?: boolean;
  /** Throws if it is not the metadata of this store; called before it is changed. */
  readonly mustFit?: (metadata: Metadata) => void;
}

/** Is told what `commit` is about to store, for the change record; `note` never fails. */
export interface ChangeNoter {
  note(change: MetadataChange): Noted | undefined;
  /** From here on changes of the overlays of this vid may mean that they have given blocks to the objects below. */
  merges(vid: number): void;
}

export interface Noted {
  /** The change is stored. Resolves when it is recorded durably, or cannot be. */
  stored(): Promise<void>;
  /** The change is not stored. */
  failed(): void;
}

/** `flushed` of a removed VDI: all entries of its log are older than this. */
const REMOVED = Number.MAX_SAFE_INTEGER;

export class Metadata {
  #env!: Environment;
  #vdis!: Database<VdiRecord, number>;
  #pages!: Database<Buffer, [number, number]>;
  /** vid -> the last flush that its stored map contains. Older stores lack the database; read-only ones cannot get it. */
  #flushed: Database<number, number> | undefined;
  #state: Database<unknown, string> | undefined;
  /** [vid, group] -> the overlays of a group of objects (overlay-records.ts). */
  #overlays: Database<Buffer, [number, number]> | undefined;
  #format = FORMAT_WITHOUT_OVERLAYS;
  readonly #file: MetadataFile;
  /** The stored records: read far more often than changed. */
  readonly #records = new RecordIndex();
  noter: ChangeNoter | undefined;

  private constructor(disk: HostDisk, file: string, readOnly: boolean) {
    this.#file = new MetadataFile(disk, file, { readOnly }, (env) => this.#use(env));
  }

  /** All or nothing: if this throws, the former environment stays in use. */
  #use(env: Environment): void {
    const vdis = env.openDB<VdiRecord, number>({ name: 'vdis', encoding: 'json' });
    const pages = env.openDB<Buffer, [number, number]>({ name: 'pages', encoding: 'binary' });
    const flushed = env.openDB<number, number>({ name: 'flushed', encoding: 'json' });
    const state = env.openDB<unknown, string>({ name: 'state', encoding: 'json' });
    const overlays = env.openDB<Buffer, [number, number]>({ name: 'overlays', encoding: 'binary' });
    const records = Array.from(vdis.getRange({}), ({ value }) => value);
    this.#env = env;
    this.#vdis = vdis;
    this.#pages = pages;
    this.#flushed = flushed;
    this.#state = state;
    this.#overlays = overlays;
    this.#records.reset(records);
  }

  /** Create the metadata of a new store in `directory`. It is complete when it has its final name. Errors: IO, NO_SPACE. */
  static async create(disk: HostDisk, directory: string): Promise<{ metadata: Metadata; clean: boolean }> {
    const file = path.join(directory, NEW_META_FILE);
    const doing = `making ${path.join(directory, META_FILE)}`;
    removeIfThereSync(disk, file);
    let made: Metadata | undefined;
    try {
      makeRoomIn(disk, file);
      const metadata = new Metadata(disk, file, false);
      made = metadata;
      metadata.#file.keepReserve();
      await metadata.#markOpen();
      disk.renameSync(file, path.join(directory, META_FILE));
      metadata.#file.renamed(path.join(directory, META_FILE));
      syncDirectory(disk, directory);
      return { metadata, clean: true };
    } catch (error) {
      await made?.close({ clean: false }).catch(() => undefined);
      throw asMetadataError(error, doing);
    }
  }

  #markOpen(): Promise<void> {
    return this.#file.transaction(() => {
      this.#putInfo('format', String(this.#format));
      this.#putInfo('clean', 'no');
    });
  }

  /**
   * Open the metadata of the store in `directory`. `readOnly`: the filesystem is read-only, and nothing changes the store.
   * Errors: FORMAT (a newer format), DAMAGED, IO, NO_SPACE.
   */
  static async open(
    disk: HostDisk,
    directory: string,
    { readOnly = false, mustFit = () => undefined }: OpenMetadata = {},
  ): Promise<{ metadata: Metadata; clean: boolean }> {
    const file = path.join(directory, META_FILE);
    let metadata: Metadata;
    try {
      const problem = await lmdbFileProblem(disk, file);
      if (problem !== undefined) {
        throw new StoreError('DAMAGED', `${file} cannot be used: ${problem}; ${rescueOf(directory)}`);
      }
      metadata = new Metadata(disk, file, readOnly);
    } catch (error) {
      throw asMetadataError(error, `opening ${file}`);
    }
    const format = metadata.#env.get('format')?.toString();
    if (format !== undefined && !KNOWN_FORMATS.has(format)) {
      await metadata.close({ clean: false });
      throw new StoreError(
        'FORMAT',
        `${directory} has store format ${format}, this sheepgate knows format ${FORMAT_VERSION}; use the newer sheepgate`,
      );
    }
    if (format !== undefined) metadata.#format = Number(format);
    try {
      mustFit(metadata);
    } catch (error) {
      await metadata.close({ clean: false });
      throw error;
    }
    const clean = format === undefined || metadata.#env.get('clean')?.toString() === 'yes';
    if (readOnly) return { metadata, clean };
    try {
      // On a full disk, removing it may free the space that is needed next.
      removeIfThereSync(disk, path.join(directory, OLD_LOCK_FILE));
      metadata.#file.keepReserve();
      // After a crash it says so already, and a full disk may have no room to write it again.
      if (clean) await metadata.#markOpen();
    } catch (error) {
      await metadata.close({ clean: false }).catch(() => undefined);
      throw asMetadataError(error, `opening ${file}`);
    }
    return { metadata, clean };
  }

  /** Whether overlays may be stored. */
  get hasOverlayFormat(): boolean {
    return this.#format === FORMAT_VERSION;
  }

  /** From here on earlier versions refuse the store. To be called before there is an overlay. Errors: NO_SPACE, IO, CLOSED. */
  async beginOverlays(): Promise<void> {
    await this.#file.transaction(() => this.#putInfo('format', String(FORMAT_VERSION)));
    this.#format = FORMAT_VERSION;
  }

  /** All records of overlays. Errors: IO. */
  *overlayGroups(): Generator<{ readonly vid: number; readonly group: number; readonly record: Uint8Array }> {
    this.#file.mustBeReadable();
    for (const { key, value } of this.#overlays?.getRange({}) ?? [])
      yield { vid: key[0], group: key[1], record: value };
  }

  /** The record of a group; undefined if there is none. Errors: IO. */
  overlayGroup(vid: number, group: number): Uint8Array | undefined {
    this.#file.mustBeReadable();
    return this.#overlays?.get([vid, group]);
  }

  /**
   * Store overlays, in several transactions and in this order: for overlays that no stored map names yet, and for blocks whose data
   * is durable. `of` is asked for each key at the moment when it is stored.
   */
  async storeOverlays(keys: readonly number[], of: (key: number) => OverlayWrite | undefined): Promise<void> {
    for (let from = 0; from < keys.length; from += OVERLAYS_PER_TRANSACTION) {
      const part = keys.slice(from, from + OVERLAYS_PER_TRANSACTION);
      await this.commit({ overlays: new Map(part.map((key) => [key, of(key)])) });
    }
  }

  /**
   * The same, before the map that refers to them is stored, if they are many. Returns those that are to be stored with the map:
   * few, and those that are gone.
   */
  async storeOverlaysAhead(
    keys: readonly number[],
    of: (key: number) => OverlayWrite | undefined,
  ): Promise<Map<number, OverlayWrite | undefined>> {
    if (keys.length <= OVERLAYS_PER_TRANSACTION) return new Map(keys.map((key) => [key, of(key)]));
    const gone = new Map<number, undefined>();
    const isThere = (key: number): boolean => {
      if (of(key) !== undefined) return true;
      gone.set(key, undefined);
      return false;
    };
    await this.storeOverlays(keys.filter(isThere), of);
    return gone;
  }

  /** The disk of the store has failed on another file. */
  suspectDisk(): void {
    this.#file.suspectDisk();
  }

  /** In the order of listings; the array does not change. */
  records(): readonly VdiRecord[] {
    return this.#records.all();
  }

  recordsNamed(name: string): VdiRecord[] {
    return this.#records.named(name);
  }

  childrenOf(vid: number): VdiRecord[] {
    return this.#records.childrenOf(vid);
  }

  record(vid: number): VdiRecord | undefined {
    return this.#records.get(vid);
  }

  /** Resolves when LMDB is not being opened again, whatever came of that. */
  settled(): Promise<void> {
    return this.#file.settled();
  }

  /** The last flush that the stored map of `vid` contains; 0 if none, REMOVED if the VDI was removed in this session. */
  flushedGeneration(vid: number): number {
    this.#file.mustBeReadable();
    return this.#flushed?.get(vid) ?? 0;
  }

  /** The last session of the store, as `begin` stored it. */
  get session(): string | undefined {
    this.#file.mustBeReadable();
    return this.#env.get('session')?.toString();
  }

  /** Names the store: its copies are of no other. Earlier versions did not give a store one. */
  get identity(): string | undefined {
    this.#file.mustBeReadable();
    return this.#env.get('store')?.toString();
  }

  /** Whether the last session was one of a version that keeps the change record, or there was none. */
  get wasRecorded(): boolean {
    this.#file.mustBeReadable();
    return this.#env.get('recorded')?.toString() === this.session;
  }

  /** LMDB's number of the last transaction. */
  get transaction(): number {
    return this.#file.transactions;
  }

  /** The length of meta.mdb. */
  get bytes(): number {
    return this.#file.bytes;
  }

  /** See MetadataFile. */
  snapshot(): FileSnapshot {
    return this.#file.snapshot();
  }

  /** Unreferenced object files that an earlier start has kept, if any. */
  get kept(): KeptObjects | undefined {
    this.#file.mustBeReadable();
    const json = this.#env.get('kept');
    return json === undefined ? undefined : (JSON.parse(json.toString()) as KeptObjects);
  }

  /** From now on only logs of `session` count. `kept`: the new value of `kept`; undefined removes it. */
  async begin(session: string, kept: KeptObjects | undefined): Promise<void> {
    await this.#file.transaction(() => {
      this.#putInfo('session', session);
      this.#putInfo('recorded', session);
      if (this.#env.get('store') === undefined) this.#putInfo('store', randomUUID());
      for (const { key, value } of [...(this.#flushed?.getRange({}) ?? [])])
        if (value === REMOVED) void this.#flushed?.remove(key);
      this.#putKept(kept);
    });
  }

  /** Set `kept`; undefined removes it. */
  async keep(kept: KeptObjects | undefined): Promise<void> {
    await this.#file.transaction(() => this.#putKept(kept));
  }

  /** The stored map of a VDI, with an entry for each object of its size. */
  map(record: VdiRecord): Uint32Array {
    this.#file.mustBeReadable();
    const map = new Uint32Array(Math.ceil(record.size / 2 ** record.blockSizeShift));
    this.#readPages(record.vid, map, 0, Math.ceil(map.length / PAGE_ENTRIES));
    return map;
  }

  /** The same, in parts between which the loop serves others. The map of this vid must not be stored meanwhile. */
  async loadMap(record: VdiRecord): Promise<Uint32Array> {
    const map = new Uint32Array(Math.ceil(record.size / 2 ** record.blockSizeShift));
    const slice = new TimeSlice();
    for (let page = 0; page * PAGE_ENTRIES < map.length; page += PAGES_PER_READ) {
      await this.#file.settled();
      this.#file.mustBeReadable();
      this.#readPages(record.vid, map, page, page + PAGES_PER_READ);
      if (slice.isOver(0)) await slice.next();
    }
    return map;
  }

  #readPages(vid: number, map: Uint32Array, from: number, to: number): void {
    const bytes = new Uint8Array(map.buffer);
    for (const { key, value } of this.#pages.getRange({ start: [vid, from], end: [vid, to] })) {
      const at = key[1] * PAGE_ENTRIES * Uint32Array.BYTES_PER_ELEMENT;
      if (at < bytes.length) bytes.set(value.subarray(0, bytes.length - at), at);
    }
  }

  /**
   * How many entries of each stored map are allocated, and how many of those are exclusive; by vid, without empty maps. In
   * parts: changes that are stored meanwhile are counted or not.
   */
  async countEntries(isExclusive: (owner: number, idx: number) => boolean): Promise<Map<number, Usage>> {
    const counts = new Map<number, { allocated: number; exclusive: number }>();
    const slice = new TimeSlice();
    for (let start: [number, number] | undefined = [0, 0]; start;) {
      this.#file.mustBeReadable();
      let last: [number, number] | undefined;
      for (const { key, value } of this.#pages.getRange({ start, limit: PAGES_PER_READ })) {
        last = key;
        const [vid, page] = key;
        let count = counts.get(vid);
        if (!count) counts.set(vid, (count = { allocated: 0, exclusive: 0 }));
        for (let at = 0; at < value.length; at += Uint32Array.BYTES_PER_ELEMENT) {
          const owner = value.readUInt32LE(at);
          if (owner === 0) continue;
          count.allocated++;
          if (isExclusive(owner, page * PAGE_ENTRIES + at / Uint32Array.BYTES_PER_ELEMENT)) count.exclusive++;
        }
        if (slice.isOver(0)) break;
      }
      start = last && [last[0], last[1] + 1];
      if (slice.isOver(0)) await slice.next();
    }
    return counts;
  }

  /** Vids that have pages but no record: left by a catalog operation that a crash interrupted. */
  strayVids(): number[] {
    const strays: number[] = [];
    this.#file.mustBeReadable();
    for (let from = 0; ;) {
      const [first] = [...this.#pages.getKeys({ start: [from, 0], limit: 1 })];
      if (!first) return strays;
      if (!this.#records.get(first[0])) strays.push(first[0]);
      from = first[0] + 1;
    }
  }

  /** Store pages of a vid that has no record yet; invisible until `commit` stores the record. */
  async preparePages(pages: readonly PageWrite[]): Promise<void> {
    for (let from = 0; from < pages.length; from += PAGES_PER_TRANSACTION) {
      const part = pages.slice(from, from + PAGES_PER_TRANSACTION);
      await this.#file.transaction(() => this.#putPages(part));
    }
  }

  /**
   * To be called before an operation that makes the metadata grow for good, by storing copies of `maps`. Deleting must stay
   * possible after it, also on a full disk. Errors: NO_SPACE, with nothing changed.
   */
  mustHaveRoom(...maps: readonly Uint32Array[]): void {
    this.#file.mustHaveRoom(maps.reduce((sum, map) => sum + storedBytes(map), 0));
  }

  /** One transaction: all or nothing. Errors: NO_SPACE, IO, CLOSED. */
  async commit(change: MetadataChange): Promise<void> {
    const gone = (change.removed ?? []).map((vid) => ({ vid, keys: this.#pageKeys(vid) }));
    const noted = this.noter?.note(change);
    const stored = this.#file.transaction(() => {
      for (const { vid, keys } of gone) {
        void this.#vdis.remove(vid);
        void this.#flushed?.put(vid, REMOVED);
        for (const key of keys) void this.#pages.remove(key);
      }
      this.#putPages(change.pages ?? []);
      if (change.overlays) this.#putOverlays(change.overlays);
      for (const record of change.records ?? []) {
        void this.#vdis.put(record.vid, record);
        if (this.#flushed?.get(record.vid) === REMOVED) void this.#flushed.remove(record.vid);
      }
      for (const { vid, generation } of change.flushed ?? []) void this.#flushed?.put(vid, generation);
    });
    try {
      await stored;
    } catch (error) {
      noted?.failed();
      throw error;
    }
    for (const { vid } of gone) this.#records.delete(vid);
    for (const record of change.records ?? []) this.#records.set(record);
    await noted?.stored();
  }

  /** The state of clients; see StoreState. */
  state(): Map<string, unknown> {
    this.#file.mustBeReadable();
    return new Map(Array.from(this.#state?.getRange({}) ?? [], ({ key, value }) => [key, value]));
  }

  /** One transaction; the value undefined removes a key. Errors: NO_SPACE, IO, CLOSED. */
  async storeState(changes: ReadonlyMap<string, unknown>): Promise<void> {
    await this.#file.transaction(() => {
      for (const [key, value] of changes) {
        if (value === undefined) void this.#state?.remove(key);
        else void this.#state?.put(key, value);
      }
    });
  }

  /** `clean`: all answered writes are stored, and the file is marked so. Errors: if the mark fails; it is closed in any case. */
  async close(options: { clean: boolean }): Promise<void> {
    await this.#file.close(options.clean && !this.#file.readOnly ? () => this.#putInfo('clean', 'yes') : undefined);
  }

  #putInfo(key: string, value: string): void {
    void this.#env.put(key, Buffer.from(value));
  }

  #putKept(kept: KeptObjects | undefined): void {
    if (kept) this.#putInfo('kept', JSON.stringify(kept));
    else void this.#env.remove('kept');
  }

  #putPages(pages: readonly PageWrite[]): void {
    for (const { vid, page, entries } of pages) {
      if (isEmptyPage(entries)) void this.#pages.remove([vid, page]);
      else void this.#pages.put([vid, page], entries);
    }
  }

  /** Overlays of a group that are not in `overlays` stay as they are stored: other VDIs may have changed them. */
  #putOverlays(overlays: ReadonlyMap<number, OverlayWrite | undefined>): void {
    const groups = new Map<number, number[]>();
    for (const key of overlays.keys()) {
      const id = localObjectKey(vidOf(key), idxOf(key) >>> GROUP_SHIFT);
      const keys = groups.get(id);
      if (keys) keys.push(key);
      else groups.set(id, [key]);
    }
    for (const [id, keys] of groups) {
      const place: [number, number] = [vidOf(id), idxOf(id)];
      const record = this.#overlays?.get(place);
      const stored = record === undefined ? undefined : decodeGroup(record);
      if (record !== undefined && stored === undefined) throw damagedGroup(...place);
      const members = stored ? [...stored.members] : new Array<StoredOverlay | undefined>(GROUP_OBJECTS);
      let blocks = stored?.blocks ?? 0;
      for (const key of keys) {
        const overlay = overlays.get(key);
        members[idxOf(key) & (GROUP_OBJECTS - 1)] = overlay;
        if (overlay) ({ blocks } = overlay);
      }
      const bytes = encodeGroup(blocks, members);
      if (bytes) void this.#overlays?.put(place, bytes);
      else if (record !== undefined) void this.#overlays?.remove(place);
    }
  }

  #pageKeys(vid: number): [number, number][] {
    this.#file.mustBeReadable();
    return [...this.#pages.getKeys({ start: [vid, 0], end: [vid + 1, 0] })];
  }
}
