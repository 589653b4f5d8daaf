/**
 * The LMDB file of a local store: VDI records, map pages, the format version. Only this file knows keys and encodings
 * (FORMAT.md); a call is one LMDB transaction, durable when its promise resolves. It decides nothing about objects.
 */
import path from 'node:path';
import type { Database } from 'lmdb';
import { removeIfThereSync, type HostDisk } from '../../system/disk.js';
import { syncDirectory } from '../../system/durable-names.js';
import { StoreError, type Usage, type VdiRecord } from '../object-store.js';
import type { Environment } from './lmdb-environment.js';
import { lmdbFileProblem } from './lmdb-file.js';
import { asMetadataError } from './lmdb-failures.js';
import { isEmptyPage, PAGE_ENTRIES, storedBytes, type PageWrite } from './map-pages.js';
import { MetadataFile } from './metadata-file.js';
import { makeRoomIn } from './metadata-reserve.js';
import { RecordIndex } from './record-index.js';
import { TimeSlice } from './time-slice.js';

export const FORMAT_VERSION = 1;
/** Pages of one transaction when a whole map is stored: the loop is held for about a millisecond each. */
const PAGES_PER_TRANSACTION = 128;
const PAGES_PER_READ = 64;
export const META_FILE = 'meta.mdb';
/** What meta.mdb is called until it is complete. */
export const NEW_META_FILE = 'new.mdb';
/** Where LMDB had its lock file before that was in memory. */
const OLD_LOCK_FILE = 'meta.mdb-lock';

/** Why object files are kept that no map refers to, and the vids in their names, which nothing new may bear. */
export interface KeptObjects {
  readonly since: number;
  readonly why: string;
  readonly vids: readonly number[];
}

export interface MetadataChange {
  readonly records?: readonly VdiRecord[];
  /** The flushes that the stored maps have in them with this change. */
  readonly flushed?: readonly { readonly vid: number; readonly generation: number }[];
  /** Records that go, with all their pages. */
  readonly removed?: readonly number[];
  readonly pages?: readonly PageWrite[];
}

/** What `flushed` says of a VDI that is gone: whatever its log still tells is older than that. */
const REMOVED = Number.MAX_SAFE_INTEGER;

export class Metadata {
  #env!: Environment;
  #vdis!: Database<VdiRecord, number>;
  #pages!: Database<Buffer, [number, number]>;
  /** vid -> the last flush that is in its stored map. Older stores have none, and cannot get it where they are read-only. */
  #flushed: Database<number, number> | undefined;
  #state: Database<unknown, string> | undefined;
  readonly #file: MetadataFile;
  /** What is stored, by vid: asked for far more often than it changes. */
  readonly #records = new RecordIndex();

  private constructor(disk: HostDisk, file: string, readOnly: boolean) {
    this.#file = new MetadataFile(disk, file, { readOnly }, (env) => this.#use(env));
  }

  /** All of it or nothing: what this throws leaves the environment before in use. */
  #use(env: Environment): void {
    const vdis = env.openDB<VdiRecord, number>({ name: 'vdis', encoding: 'json' });
    const pages = env.openDB<Buffer, [number, number]>({ name: 'pages', encoding: 'binary' });
    const flushed = env.openDB<number, number>({ name: 'flushed', encoding: 'json' });
    const state = env.openDB<unknown, string>({ name: 'state', encoding: 'json' });
    const records = Array.from(vdis.getRange({}), ({ value }) => value);
    this.#env = env;
    this.#vdis = vdis;
    this.#pages = pages;
    this.#flushed = flushed;
    this.#state = state;
    this.#records.reset(records);
  }

  /** Make the metadata of a new store in `directory`. It is complete as soon as it has its name. Errors: IO, NO_SPACE. */
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
      this.#putInfo('format', String(FORMAT_VERSION));
      this.#putInfo('clean', 'no');
    });
  }

  /**
   * Open the metadata of the store in `directory`. `readOnly`: of a store on a read-only filesystem, which nobody changes.
   * Errors: FORMAT for a newer format, DAMAGED, IO, NO_SPACE.
   */
  static async open(
    disk: HostDisk,
    directory: string,
    { readOnly = false } = {},
  ): Promise<{ metadata: Metadata; clean: boolean }> {
    const file = path.join(directory, META_FILE);
    let metadata: Metadata;
    try {
      const problem = lmdbFileProblem(disk, file);
      if (problem !== undefined) {
        throw new StoreError(
          'DAMAGED',
          `${file} cannot be used: ${problem}; restore it from a backup, or move it away`,
        );
      }
      metadata = new Metadata(disk, file, readOnly);
    } catch (error) {
      throw asMetadataError(error, `opening ${file}`);
    }
    const format = metadata.#env.get('format')?.toString();
    if (format !== undefined && format !== String(FORMAT_VERSION)) {
      await metadata.close({ clean: false });
      throw new StoreError(
        'FORMAT',
        `${directory} has store format ${format}, this sheepgate knows format ${FORMAT_VERSION}; use the newer sheepgate`,
      );
    }
    const clean = format === undefined || metadata.#env.get('clean')?.toString() === 'yes';
    if (readOnly) return { metadata, clean };
    try {
      // It may be the last space of a full disk.
      removeIfThereSync(disk, path.join(directory, OLD_LOCK_FILE));
      metadata.#file.keepReserve();
      // A crash on a full disk has left it as it has to be.
      if (clean) await metadata.#markOpen();
    } catch (error) {
      await metadata.close({ clean: false }).catch(() => undefined);
      throw asMetadataError(error, `opening ${file}`);
    }
    return { metadata, clean };
  }

  /** The disk of the store has failed, with something that is not ours. */
  suspectDisk(): void {
    this.#file.suspectDisk();
  }

  /** In the order that people see; the array does not change. */
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

  /** Resolves when it can be read, or cannot for a reason of its own: it may be opened anew at the moment. */
  settled(): Promise<void> {
    return this.#file.settled();
  }

  /** The last flush that is in the stored map of `vid`; 0 if none, REMOVED if it was removed in this opening. */
  flushedGeneration(vid: number): number {
    this.#file.mustBeReadable();
    return this.#flushed?.get(vid) ?? 0;
  }

  /** Who had the store open last, as `begin` was told. */
  get session(): string | undefined {
    this.#file.mustBeReadable();
    return this.#env.get('session')?.toString();
  }

  /** Object files that an earlier start has left alone, if any. */
  get kept(): KeptObjects | undefined {
    this.#file.mustBeReadable();
    const json = this.#env.get('kept');
    return json === undefined ? undefined : (JSON.parse(json.toString()) as KeptObjects);
  }

  /** From here on logs of `session` count. `kept`: what `kept` shall say from now on; nothing if undefined. */
  async begin(session: string, kept: KeptObjects | undefined): Promise<void> {
    await this.#file.transaction(() => {
      this.#putInfo('session', session);
      for (const { key, value } of [...(this.#flushed?.getRange({}) ?? [])])
        if (value === REMOVED) void this.#flushed?.remove(key);
      this.#putKept(kept);
    });
  }

  /** What `kept` shall say from now on; nothing if undefined. */
  async keep(kept: KeptObjects | undefined): Promise<void> {
    await this.#file.transaction(() => this.#putKept(kept));
  }

  /** The stored map of a VDI, as long as its size asks for. */
  map(record: VdiRecord): Uint32Array {
    this.#file.mustBeReadable();
    const map = new Uint32Array(Math.ceil(record.size / 2 ** record.blockSizeShift));
    this.#readPages(record.vid, map, 0, Math.ceil(map.length / PAGE_ENTRIES));
    return map;
  }

  /** The same in pieces, for while others are served; the map of this vid must not be stored meanwhile. */
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
   * How many entries of each stored map are owned, and how many of those `isExclusive`; by vid, without maps that are empty.
   * In pieces: what is stored meanwhile is counted or not.
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

  /** Vids that have pages but no record: leftovers of a catalog operation that a crash cut off. */
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
   * Before anything that makes the metadata grow for good: `maps` are the maps that are stored anew. Deleting must be
   * possible after it, on a full disk, too. Errors: NO_SPACE, with nothing changed.
   */
  mustHaveRoom(...maps: readonly Uint32Array[]): void {
    this.#file.mustHaveRoom(maps.reduce((sum, map) => sum + storedBytes(map), 0));
  }

  /** One transaction: all of it or nothing. */
  async commit(change: MetadataChange): Promise<void> {
    const gone = (change.removed ?? []).map((vid) => ({ vid, keys: this.#pageKeys(vid) }));
    await this.#file.transaction(() => {
      for (const { vid, keys } of gone) {
        void this.#vdis.remove(vid);
        void this.#flushed?.put(vid, REMOVED);
        for (const key of keys) void this.#pages.remove(key);
      }
      this.#putPages(change.pages ?? []);
      for (const record of change.records ?? []) {
        void this.#vdis.put(record.vid, record);
        if (this.#flushed?.get(record.vid) === REMOVED) void this.#flushed.remove(record.vid);
      }
      for (const { vid, generation } of change.flushed ?? []) void this.#flushed?.put(vid, generation);
    });
    for (const { vid } of gone) this.#records.delete(vid);
    for (const record of change.records ?? []) this.#records.set(record);
  }

  /** What src/vdi remembers of its clients; see StoreState. */
  state(): Map<string, unknown> {
    this.#file.mustBeReadable();
    return new Map(Array.from(this.#state?.getRange({}) ?? [], ({ key, value }) => [key, value]));
  }

  /** One transaction; undefined removes. */
  async storeState(changes: ReadonlyMap<string, unknown>): Promise<void> {
    await this.#file.transaction(() => {
      for (const [key, value] of changes) {
        if (value === undefined) void this.#state?.remove(key);
        else void this.#state?.put(key, value);
      }
    });
  }

  /** `clean`: all that was answered is in it. Closed in any case; if that cannot be said in it, this fails. */
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

  #pageKeys(vid: number): [number, number][] {
    this.#file.mustBeReadable();
    return [...this.#pages.getKeys({ start: [vid, 0], end: [vid + 1, 0] })];
  }
}
