/**
 * Increments as qcow2 files: what differs from the backing file, written once from beginning to end, and read back. Owns the
 * layout (qemu's docs/interop/qcow2.txt, version 3, 64 KiB clusters, no snapshots, no compression). The header is written last,
 * so an unfinished file is not an image. Only files of this writer are read; all others are refused.
 */
import { OperationError } from '../../operations/operations.js';
import type { HostDisk } from '../../system/disk.js';
import type { OpenFile } from '../../system/open-file.js';
import { readAll } from '../read-all.js';
import { createFile, openRegular, readable } from '../target-files.js';

const CLUSTER_BITS = 16;
/** The unit of an increment: each is data, zeros, or as in the file below. */
export const CLUSTER_BYTES = 2 ** CLUSTER_BITS;
const MAGIC = 0x514649fb;
const VERSION = 3;
const HEADER_BYTES = 104;
const BACKING_FORMAT_EXTENSION = 0xe2792aca;
const MAX_BACKING_NAME_BYTES = 1023;
/** 16 bits each. */
const REFCOUNT_ORDER = 4;
const REFCOUNTS_PER_BLOCK = CLUSTER_BYTES / 2;
const ENTRY_BYTES = 8;
const ENTRIES_PER_TABLE = CLUSTER_BYTES / ENTRY_BYTES;
/** The bytes of the disk that one second-level table maps. */
const TABLE_SPAN_BYTES = ENTRIES_PER_TABLE * CLUSTER_BYTES;
/** Largest first-level table that qemu opens (QCOW_MAX_L1_SIZE). */
const MAX_L1_BYTES = 32 * 2 ** 20;
/** Parts of an entry: the cluster has one reference; it reads as zeros; its offset in the file. */
const COPIED = 1n << 63n;
const IS_ZERO = 1n;
const OFFSET_MASK = 0x00ff_ffff_ffff_fe00n;
/** Empty parts of a table are left as holes of the file: the tables of a small increment are nearly empty. */
const TABLE_PART_BYTES = 4096;
const NOTHING = Buffer.alloc(TABLE_PART_BYTES);

/** Fields of the header: offset of each, big-endian. */
const FIELD = {
  magic: 0,
  version: 4,
  backingOffset: 8,
  backingBytes: 16,
  clusterBits: 20,
  size: 24,
  cryptMethod: 32,
  l1Entries: 36,
  l1Offset: 40,
  refcountTableOffset: 48,
  refcountTableClusters: 56,
  snapshots: 60,
  incompatible: 72,
  refcountOrder: 96,
  headerBytes: 100,
} as const;

/** The backing file, by its name relative to the directory of the increment. */
export interface Backing {
  readonly name: string;
  readonly format: 'raw' | 'qcow2';
}

export class IncrementWriter {
  readonly #handle: OpenFile;
  readonly #size: number;
  readonly #backing: Backing;
  readonly #tables = new Map<number, Buffer>();
  /** The end of the file, in clusters; the first cluster is the header. */
  #end = 1;

  private constructor(handle: OpenFile, size: number, backing: Backing) {
    this.#handle = handle;
    this.#size = size;
    this.#backing = backing;
  }

  /** A new file for a disk of `size` bytes that reads as the one below it. */
  static async create(disk: HostDisk, file: string, size: number, backing: Backing): Promise<IncrementWriter> {
    return new IncrementWriter(await createFile(disk, file), size, backing);
  }

  /** Write data. `offset` is a multiple of CLUSTER_BYTES, and so is the length, except at the end of the disk. */
  async data(offset: number, data: Buffer): Promise<void> {
    const count = Math.ceil(data.length / CLUSTER_BYTES);
    const at = this.#end;
    this.#end += count;
    for (let i = 0; i < count; i++) {
      this.#enter(offset + i * CLUSTER_BYTES, (BigInt(at + i) << BigInt(CLUSTER_BITS)) | COPIED);
    }
    await this.#handle.write(data, at * CLUSTER_BYTES);
  }

  /** Make the range read as zeros, whatever the file below holds. */
  zeros(offset: number, length: number): void {
    for (let at = offset; at < offset + length; at += CLUSTER_BYTES) this.#enter(at, IS_ZERO);
  }

  /** Write the tables and then the header, durably. Returns the size of the file in bytes. */
  async finish(): Promise<number> {
    const l1 = Buffer.alloc(Math.ceil(this.#size / TABLE_SPAN_BYTES) * ENTRY_BYTES);
    for (const [index, table] of this.#tables) {
      const at = this.#end++;
      l1.writeBigUInt64BE((BigInt(at) << BigInt(CLUSTER_BITS)) | COPIED, index * ENTRY_BYTES);
      await this.#writeTable(table, at);
    }
    const l1At = this.#end;
    this.#end += Math.max(1, Math.ceil(l1.length / CLUSTER_BYTES));
    await this.#writeTable(l1, l1At);
    const refcounts = await this.#writeRefcounts();
    await this.#handle.truncate(this.#end * CLUSTER_BYTES);
    await this.#handle.sync();
    await this.#handle.write(this.#header(l1.length / ENTRY_BYTES, l1At, refcounts), 0);
    await this.#handle.sync();
    return this.#end * CLUSTER_BYTES;
  }

  /** To be called in any case, finished or not. */
  close(): Promise<void> {
    return this.#handle.close();
  }

  #enter(offset: number, entry: bigint): void {
    const index = Math.floor(offset / TABLE_SPAN_BYTES);
    let table = this.#tables.get(index);
    if (!table) this.#tables.set(index, (table = Buffer.alloc(CLUSTER_BYTES)));
    table.writeBigUInt64BE(entry, ((offset % TABLE_SPAN_BYTES) / CLUSTER_BYTES) * ENTRY_BYTES);
  }

  /** Every cluster has one reference, the clusters of the refcounts included. */
  async #writeRefcounts(): Promise<{ readonly at: number; readonly clusters: number }> {
    let blocks = 0;
    let tableClusters = 0;
    for (let needed = 1; blocks < needed;) {
      blocks = needed;
      tableClusters = Math.ceil((blocks * ENTRY_BYTES) / CLUSTER_BYTES);
      needed = Math.ceil((this.#end + blocks + tableClusters) / REFCOUNTS_PER_BLOCK);
    }
    const at = this.#end;
    const used = at + tableClusters + blocks;
    const table = Buffer.alloc(tableClusters * CLUSTER_BYTES);
    for (let n = 0; n < blocks; n++) {
      const blockAt = at + tableClusters + n;
      table.writeBigUInt64BE(BigInt(blockAt) << BigInt(CLUSTER_BITS), n * ENTRY_BYTES);
      const counts = Buffer.alloc(CLUSTER_BYTES);
      const filled = Math.min(REFCOUNTS_PER_BLOCK, used - n * REFCOUNTS_PER_BLOCK);
      for (let i = 0; i < filled; i++) counts.writeUInt16BE(1, i * 2);
      await this.#writeTable(counts, blockAt);
    }
    await this.#writeTable(table, at);
    this.#end = used;
    return { at, clusters: tableClusters };
  }

  async #writeTable(table: Buffer, cluster: number): Promise<void> {
    for (let from = 0; from < table.length; from += TABLE_PART_BYTES) {
      const part = table.subarray(from, from + TABLE_PART_BYTES);
      if (part.equals(NOTHING.subarray(0, part.length))) continue;
      await this.#handle.write(part, cluster * CLUSTER_BYTES + from);
    }
  }

  #header(l1Entries: number, l1At: number, refcounts: { readonly at: number; readonly clusters: number }): Buffer {
    const name = Buffer.from(this.#backing.name);
    if (name.length > MAX_BACKING_NAME_BYTES) {
      throw new OperationError('BAD_TARGET', `the name ${this.#backing.name} is too long for a qcow2 file to refer to`);
    }
    const format = Buffer.from(this.#backing.format);
    const header = Buffer.alloc(CLUSTER_BYTES);
    header.writeUInt32BE(MAGIC, FIELD.magic);
    header.writeUInt32BE(VERSION, FIELD.version);
    header.writeUInt32BE(CLUSTER_BITS, FIELD.clusterBits);
    header.writeBigUInt64BE(BigInt(this.#size), FIELD.size);
    header.writeUInt32BE(l1Entries, FIELD.l1Entries);
    header.writeBigUInt64BE(BigInt(l1At * CLUSTER_BYTES), FIELD.l1Offset);
    header.writeBigUInt64BE(BigInt(refcounts.at * CLUSTER_BYTES), FIELD.refcountTableOffset);
    header.writeUInt32BE(refcounts.clusters, FIELD.refcountTableClusters);
    header.writeUInt32BE(REFCOUNT_ORDER, FIELD.refcountOrder);
    header.writeUInt32BE(HEADER_BYTES, FIELD.headerBytes);
    let at = HEADER_BYTES;
    at = header.writeUInt32BE(BACKING_FORMAT_EXTENSION, at);
    at = header.writeUInt32BE(format.length, at);
    format.copy(header, at);
    at += Math.ceil(format.length / 8) * 8 + 8; // and the end of the extensions, eight zeros
    header.writeBigUInt64BE(BigInt(at), FIELD.backingOffset);
    header.writeUInt32BE(name.length, FIELD.backingBytes);
    name.copy(header, at);
    return header;
  }
}

/** A part of an increment: data at offset `at` of the file, zeros, or as in the file below. */
export interface Run {
  readonly offset: number;
  length: number;
  readonly kind: 'data' | 'zeros' | 'below';
  readonly at: number;
}

export class IncrementReader {
  readonly #handle: OpenFile;
  readonly file: string;
  /** Of the disk. */
  readonly size: number;
  readonly backing: Backing;
  readonly #l1: Buffer;
  readonly #fileBytes: number;
  /** The table used last: reading is sequential. */
  #table: { readonly index: number; readonly entries: Promise<Buffer | undefined> } | undefined;

  private constructor(
    handle: OpenFile,
    file: string,
    header: { readonly size: number; readonly backing: Backing; readonly l1: Buffer; readonly fileBytes: number },
  ) {
    this.#handle = handle;
    this.file = file;
    this.size = header.size;
    this.backing = header.backing;
    this.#l1 = header.l1;
    this.#fileBytes = header.fileBytes;
  }

  /** Errors: DAMAGED (not a finished file of IncrementWriter, or unreadable). */
  static open(disk: HostDisk, file: string): Promise<IncrementReader> {
    return readable(file, () => IncrementReader.#open(disk, file));
  }

  static async #open(disk: HostDisk, file: string): Promise<IncrementReader> {
    const handle = await openRegular(disk, file, 'r');
    try {
      const { size: fileBytes } = handle.status();
      if (fileBytes < CLUSTER_BYTES) throw damaged(file, 'it is too short');
      const header = Buffer.alloc(CLUSTER_BYTES);
      await readAll(handle, header, 0);
      const is = (field: number, value: number): boolean => header.readUInt32BE(field) === value;
      const isOurs =
        is(FIELD.magic, MAGIC) &&
        is(FIELD.version, VERSION) &&
        is(FIELD.clusterBits, CLUSTER_BITS) &&
        is(FIELD.cryptMethod, 0) &&
        is(FIELD.snapshots, 0) &&
        is(FIELD.refcountOrder, REFCOUNT_ORDER) &&
        header.readBigUInt64BE(FIELD.incompatible) === 0n;
      if (!isOurs) throw damaged(file, 'its header is not the one that was written');
      const size = Number(header.readBigUInt64BE(FIELD.size));
      const entries = header.readUInt32BE(FIELD.l1Entries);
      const l1Offset = Number(header.readBigUInt64BE(FIELD.l1Offset));
      const isWithin = entries * ENTRY_BYTES <= MAX_L1_BYTES && l1Offset + entries * ENTRY_BYTES <= fileBytes;
      if (!isWithin || entries !== Math.ceil(size / TABLE_SPAN_BYTES))
        throw damaged(file, 'its header does not match its length');
      const l1 = Buffer.alloc(entries * ENTRY_BYTES);
      await readAll(handle, l1, l1Offset);
      return new IncrementReader(handle, file, { size, backing: backingOf(header, file), l1, fileBytes });
    } catch (error) {
      await handle.close();
      throw error;
    }
  }

  dropCached(): Promise<void> {
    return this.#handle.dropCached();
  }

  /** The runs of the range in order, up to the end of the disk; neighbours of the same kind are joined. */
  async runs(offset: number, length: number): Promise<Run[]> {
    const runs: Run[] = [];
    const end = Math.min(offset + length, this.size);
    for (let from = offset; from < end;) {
      const index = Math.floor(from / TABLE_SPAN_BYTES);
      const table = await this.#tableAt(index);
      const next = table === undefined ? (index + 1) * TABLE_SPAN_BYTES : from - (from % CLUSTER_BYTES) + CLUSTER_BYTES;
      const to = Math.min(next, end);
      const run = this.#runOf(table, from, to - from);
      const last = runs.at(-1);
      const joins = last?.kind === run.kind && (run.kind !== 'data' || last.at + last.length === run.at);
      if (last && joins) last.length += run.length;
      else runs.push(run);
      from = to;
    }
    return runs;
  }

  /** The first offset, from `offset` on, that this file has data or zeros for; the size of the disk if there is none. */
  async nextOwn(offset: number): Promise<number> {
    for (let at = offset; at < this.size;) {
      const index = Math.floor(at / TABLE_SPAN_BYTES);
      const table = await this.#tableAt(index);
      for (let n = Math.floor((at % TABLE_SPAN_BYTES) / CLUSTER_BYTES); table && n < ENTRIES_PER_TABLE; n++) {
        const isOwn = table.readUInt32BE(n * ENTRY_BYTES) !== 0 || table.readUInt32BE(n * ENTRY_BYTES + 4) !== 0;
        if (isOwn) return Math.min(Math.max(at, index * TABLE_SPAN_BYTES + n * CLUSTER_BYTES), this.size);
      }
      at = (index + 1) * TABLE_SPAN_BYTES;
    }
    return this.size;
  }

  /** Fill `into` from a run of data. Errors: DAMAGED. */
  read(run: Run, into: Buffer): Promise<void> {
    return this.#fill(into, run.at);
  }

  close(): Promise<void> {
    return this.#handle.close();
  }

  #runOf(table: Buffer | undefined, offset: number, length: number): Run {
    const within = offset % CLUSTER_BYTES;
    const entry = table?.readBigUInt64BE((((offset % TABLE_SPAN_BYTES) - within) / CLUSTER_BYTES) * ENTRY_BYTES) ?? 0n;
    if (entry === 0n) return { offset, length, kind: 'below', at: 0 };
    if (entry === IS_ZERO) return { offset, length, kind: 'zeros', at: 0 };
    const at = Number(entry & OFFSET_MASK) + within;
    if ((entry & ~OFFSET_MASK) !== COPIED || at % CLUSTER_BYTES !== within || at + length > this.#fileBytes) {
      throw damaged(this.file, `its entry for offset ${offset} is invalid`);
    }
    return { offset, length, kind: 'data', at };
  }

  #tableAt(index: number): Promise<Buffer | undefined> {
    if (this.#table?.index !== index) this.#table = { index, entries: this.#readTable(index) };
    return this.#table.entries;
  }

  async #readTable(index: number): Promise<Buffer | undefined> {
    const entry = this.#l1.readBigUInt64BE(index * ENTRY_BYTES);
    if (entry === 0n) return undefined;
    const at = Number(entry & OFFSET_MASK);
    if (at + CLUSTER_BYTES > this.#fileBytes) throw damaged(this.file, `its table ${index} is outside the file`);
    const table = Buffer.alloc(CLUSTER_BYTES);
    await this.#fill(table, at);
    return table;
  }

  #fill(into: Buffer, at: number): Promise<void> {
    return readable(this.file, () => readAll(this.#handle, into, at));
  }
}

function backingOf(header: Buffer, file: string): Backing {
  const offset = Number(header.readBigUInt64BE(FIELD.backingOffset));
  const length = header.readUInt32BE(FIELD.backingBytes);
  if (offset < HEADER_BYTES || length === 0 || length > MAX_BACKING_NAME_BYTES || offset + length > CLUSTER_BYTES) {
    throw damaged(file, 'it does not name its backing file');
  }
  const formatBytes = header.readUInt32BE(HEADER_BYTES + 4);
  const isFormat = header.readUInt32BE(HEADER_BYTES) === BACKING_FORMAT_EXTENSION && formatBytes <= 'qcow2'.length;
  const format = isFormat ? header.toString('latin1', HEADER_BYTES + 8, HEADER_BYTES + 8 + formatBytes) : '';
  if (format !== 'raw' && format !== 'qcow2') throw damaged(file, 'it does not name the format of its backing file');
  return { name: header.toString('utf8', offset, offset + length), format };
}

function damaged(file: string, why: string): OperationError {
  return new OperationError('DAMAGED', `${file} is damaged: ${why}`);
}
