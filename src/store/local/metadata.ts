/**
 * The LMDB file of a local store: VDI records, map pages, the format version. Only this file knows keys and encodings
 * (FORMAT.md); a call is one LMDB transaction, durable when its promise resolves. It decides nothing about objects.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { ABORT, open, type Database, type RootDatabase } from 'lmdb';
import { StoreError, type VdiRecord } from '../object-store.js';
import * as libc from './libc.js';
import { lmdbFileProblem } from './lmdb-file.js';
import { TimeSlice } from './time-slice.js';

export const FORMAT_VERSION = 1;
/** Map entries of one stored page; 4 KiB, so that a new object rewrites little and a full map is few pages. */
export const PAGE_ENTRIES = 1024;
/** Address space, not disk: room for the maps of some ten thousand snapshots of 1 TiB. */
const MAP_SIZE = 64 * 2 ** 30;
/** Pages of one transaction when a whole map is stored: the loop is held for about a millisecond each. */
const PAGES_PER_TRANSACTION = 128;
const PAGES_PER_READ = 64;
/** Kept allocated past the end of the file, so that a full disk can still record a delete or a flush. */
const RESERVE_BYTES = 4 * 1024 * 1024;

/** A page of a map as it is to be stored; all zeros means the page is removed. */
export interface PageWrite {
  readonly vid: number;
  readonly page: number;
  readonly entries: Buffer;
}

export interface MetadataChange {
  readonly records?: readonly VdiRecord[];
  /** Records that go, with all their pages. */
  readonly removed?: readonly number[];
  readonly pages?: readonly PageWrite[];
}

const ZERO_PAGE = Buffer.alloc(PAGE_ENTRIES * 4);

// Map pages are stored as they are in memory (FORMAT.md: little-endian): a map of 1 TiB is copied, not converted.
if (os.endianness() !== 'LE') throw new Error('the local store needs a little-endian machine');

/** The entries of one page of a map, copied: the map may change while the copy is on its way to disk. */
export function pageOf(map: Uint32Array, page: number): Buffer {
  const copy = new Uint32Array(PAGE_ENTRIES);
  copy.set(map.subarray(page * PAGE_ENTRIES, (page + 1) * PAGE_ENTRIES));
  return Buffer.from(copy.buffer);
}

/** All pages of a map, those of zeros too: storing them removes what an operation that failed may have left there. */
export function pagesOf(vid: number, map: Uint32Array): PageWrite[] {
  const pages: PageWrite[] = [];
  for (let page = 0; page * PAGE_ENTRIES < map.length; page++) pages.push({ vid, page, entries: pageOf(map, page) });
  return pages;
}

export class Metadata {
  readonly #env: RootDatabase<Buffer, string>;
  readonly #vdis: Database<VdiRecord, number>;
  readonly #pages: Database<Buffer, [number, number]>;
  readonly #state: Database<unknown, string>;
  readonly #fd: number;
  /** What is stored, by vid: asked for far more often than it changes. */
  readonly #records = new Map<number, VdiRecord>();
  #reservedTo = 0;

  private constructor(file: string) {
    this.#env = open<Buffer, string>({
      path: file,
      noSubdir: true,
      encoding: 'binary',
      // a commit is answered when it is on disk, not when it is only visible
      overlappingSync: false,
      mapSize: MAP_SIZE,
      maxDbs: 4,
      commitDelay: 0,
    });
    this.#vdis = this.#env.openDB<VdiRecord, number>({ name: 'vdis', encoding: 'json' });
    this.#pages = this.#env.openDB<Buffer, [number, number]>({ name: 'pages', encoding: 'binary' });
    this.#state = this.#env.openDB<unknown, string>({ name: 'state', encoding: 'json' });
    this.#fd = fs.openSync(file, 'r+');
    for (const { key, value } of this.#vdis.getRange({})) this.#records.set(key, value);
  }

  /** Open or make the metadata of the store in `directory`. Errors: FORMAT for a newer format, IO, NO_SPACE. */
  static async open(directory: string): Promise<{ metadata: Metadata; clean: boolean }> {
    const file = path.join(directory, 'meta.mdb');
    let metadata: Metadata;
    try {
      const problem = lmdbFileProblem(file);
      if (problem !== undefined) {
        throw new StoreError(
          'DAMAGED',
          `${file} cannot be used: ${problem}; restore it from a backup, or move it away`,
        );
      }
      metadata = new Metadata(file);
    } catch (error) {
      throw libc.asStoreError(error, `opening ${file}`);
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
    metadata.#keepReserve();
    await metadata.#transaction(() => {
      metadata.#putInfo('format', String(FORMAT_VERSION));
      metadata.#putInfo('clean', 'no');
    });
    return { metadata, clean };
  }

  records(): VdiRecord[] {
    return [...this.#records.values()];
  }

  record(vid: number): VdiRecord | undefined {
    return this.#records.get(vid);
  }

  /** The stored map of a VDI, as long as its size asks for. */
  map(record: VdiRecord): Uint32Array {
    const map = new Uint32Array(Math.ceil(record.size / 2 ** record.blockSizeShift));
    this.#readPages(record.vid, map, 0, Math.ceil(map.length / PAGE_ENTRIES));
    return map;
  }

  /** The same in pieces, for while others are served; the map of this vid must not be stored meanwhile. */
  async loadMap(record: VdiRecord): Promise<Uint32Array> {
    const map = new Uint32Array(Math.ceil(record.size / 2 ** record.blockSizeShift));
    const slice = new TimeSlice();
    for (let page = 0; page * PAGE_ENTRIES < map.length; page += PAGES_PER_READ) {
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

  /** Vids that have pages but no record: leftovers of a catalog operation that a crash cut off. */
  strayVids(): number[] {
    const strays: number[] = [];
    for (let from = 0; ;) {
      const [first] = [...this.#pages.getKeys({ start: [from, 0], limit: 1 })];
      if (!first) return strays;
      if (!this.#records.has(first[0])) strays.push(first[0]);
      from = first[0] + 1;
    }
  }

  /** Store pages of a vid that has no record yet; invisible until `commit` stores the record. */
  async preparePages(pages: readonly PageWrite[]): Promise<void> {
    for (let from = 0; from < pages.length; from += PAGES_PER_TRANSACTION) {
      const part = pages.slice(from, from + PAGES_PER_TRANSACTION);
      await this.#transaction(() => this.#putPages(part));
    }
  }

  /** One transaction: all of it or nothing. */
  async commit(change: MetadataChange): Promise<void> {
    const gone = (change.removed ?? []).map((vid) => ({ vid, keys: this.#pageKeys(vid) }));
    await this.#transaction(() => {
      for (const { vid, keys } of gone) {
        void this.#vdis.remove(vid);
        for (const key of keys) void this.#pages.remove(key);
      }
      this.#putPages(change.pages ?? []);
      for (const record of change.records ?? []) void this.#vdis.put(record.vid, record);
    });
    for (const { vid } of gone) this.#records.delete(vid);
    for (const record of change.records ?? []) this.#records.set(record.vid, record);
  }

  /** What src/vdi remembers of its clients; see StoreState. */
  state(): Map<string, unknown> {
    return new Map(Array.from(this.#state.getRange({}), ({ key, value }) => [key, value]));
  }

  /** One transaction; undefined removes. */
  async storeState(changes: ReadonlyMap<string, unknown>): Promise<void> {
    await this.#transaction(() => {
      for (const [key, value] of changes) {
        if (value === undefined) void this.#state.remove(key);
        else void this.#state.put(key, value);
      }
    });
  }

  async close(options: { clean: boolean }): Promise<void> {
    if (options.clean) await this.#transaction(() => this.#putInfo('clean', 'yes'));
    fs.closeSync(this.#fd);
    await this.#env.close();
  }

  #putInfo(key: string, value: string): void {
    void this.#env.put(key, Buffer.from(value));
  }

  #putPages(pages: readonly PageWrite[]): void {
    for (const { vid, page, entries } of pages) {
      if (entries.equals(ZERO_PAGE)) void this.#pages.remove([vid, page]);
      else void this.#pages.put([vid, page], entries);
    }
  }

  #pageKeys(vid: number): [number, number][] {
    return [...this.#pages.getKeys({ start: [vid, 0], end: [vid + 1, 0] })];
  }

  /** `body` puts and removes; if one of them throws, nothing of the transaction is stored. */
  async #transaction(body: () => void): Promise<void> {
    let failure: { readonly error: unknown } | undefined;
    try {
      await this.#env.childTransaction(() => {
        try {
          body();
        } catch (error) {
          failure = { error };
          return ABORT;
        }
      });
    } catch (error) {
      failure ??= { error };
    }
    if (failure) {
      const cause = failure.error as Error & { commitError?: Error };
      throw asMetadataError(cause.commitError ?? cause);
    }
    this.#keepReserve();
  }

  #keepReserve(): void {
    const { size } = fs.fstatSync(this.#fd);
    if (size + RESERVE_BYTES / 2 <= this.#reservedTo) return;
    if (libc.reserve(this.#fd, size, RESERVE_BYTES)) this.#reservedTo = size + RESERVE_BYTES;
  }
}

function asMetadataError(error: Error): StoreError {
  if (/no space|ENOSPC|MDB_MAP_FULL/i.test(error.message)) {
    return new StoreError('NO_SPACE', `storing metadata: ${error.message}`, { cause: error });
  }
  return libc.asStoreError(error, 'storing metadata');
}
