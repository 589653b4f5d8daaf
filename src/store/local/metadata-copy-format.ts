/**
 * The bytes of a copy of the metadata (FORMAT.md, copies/): a header of text, the entries of all databases in compressed blocks,
 * and a checksum of everything. Owns this layout. Does not decide when a copy is made, or which one is used.
 */
import { createHash, type Hash } from 'node:crypto';
import { promisify } from 'node:util';
import zlib from 'node:zlib';
import type { HostDisk } from '../../system/disk.js';
import { readToEnd, writeFully } from '../../system/whole-io.js';
import { readAll } from './lmdb-pages.js';

export const COPY_HEADER_BYTES = 512;
const MAGIC = 'sheepgate metadata copy 1';
/** Of a block: its bytes when unpacked, its bytes in the file, and the CRC-32 of these; u32 little-endian. */
const BLOCK_HEADER = 12;
/** Unpacked; an entry may make a block longer. */
const BLOCK_BYTES = 256 * 1024;
/** A longer block is damage. The largest value by far is a page of a map. */
const MAX_BLOCK_BYTES = 64 * 2 ** 20;
const HASH_BYTES = 32;
/** In a block: [kind, u16 length, name], the following entries are of this database. */
const DATABASE = 1;
/** In a block: [kind, u16 length of the key, u32 length of the value, key, value]. */
const ENTRY = 2;
const ENTRY_HEADER = 7;

const deflate = promisify(zlib.deflateRaw) as (data: Buffer, options: zlib.ZlibOptions) => Promise<Buffer>;
const inflate = promisify(zlib.inflateRaw) as (data: Buffer, options: zlib.ZlibOptions) => Promise<Buffer>;

/** The header of a copy. */
export interface CopyHeader {
  /** The identity of the store; see Metadata. */
  readonly store: string;
  /** The session of the store in which it was taken. */
  readonly session: string;
  /** LMDB's number of the transaction whose state it has. */
  readonly transaction: number;
  /** Milliseconds since 1970. */
  readonly takenAt: number;
  /** The last change of the change record (change-record.ts) that the copy is certain to have. */
  readonly change: number;
}

/** An entry of a database of meta.mdb, as LMDB has it. */
export interface CopiedEntry {
  readonly database: string;
  readonly key: Buffer;
  readonly value: Buffer;
}

/** The file is not a whole copy. */
export class CopyDamaged extends Error {}

function headerBytes(header: CopyHeader): Buffer {
  const bytes = Buffer.alloc(COPY_HEADER_BYTES);
  const { store, session, transaction, takenAt, change } = header;
  bytes.write(
    `${MAGIC}\nstore ${store}\nsession ${session}\ntransaction ${transaction}\ntaken ${takenAt}\nchange ${change}\n`,
  );
  return bytes;
}

/** Undefined if the bytes are not the header of a copy. */
export function parseHeader(bytes: Buffer): CopyHeader | undefined {
  const text = bytes.toString('latin1', 0, COPY_HEADER_BYTES);
  const found =
    /^sheepgate metadata copy 1\nstore (\S*)\nsession (\S*)\ntransaction (\d{1,15})\ntaken (\d{1,15})\nchange (\d{1,15})\n\0*$/.exec(
      text,
    );
  if (!found || bytes.length < COPY_HEADER_BYTES) return undefined;
  const [, store = '', session = '', transaction, takenAt, change] = found;
  return { store, session, transaction: Number(transaction), takenAt: Number(takenAt), change: Number(change) };
}

/** Writes a copy into an empty file. Errors of all methods: those of the disk. */
export class CopyWriter {
  readonly #disk: HostDisk;
  readonly #fd: number;
  readonly #hash: Hash = createHash('sha256');
  #length = 0;
  #parts: Buffer[] = [];
  #pending = 0;
  #database: string | undefined;
  #blocks = 0;

  constructor(disk: HostDisk, fd: number) {
    this.#disk = disk;
    this.#fd = fd;
  }

  /** Bytes written so far. */
  get length(): number {
    return this.#length;
  }

  begin(header: CopyHeader): Promise<void> {
    return this.#append(headerBytes(header));
  }

  /** `key` and `value` are copied. Resolves to whether a block was written. */
  async add(database: string, key: Buffer, value: Buffer): Promise<boolean> {
    this.use(database);
    const entry = Buffer.allocUnsafe(ENTRY_HEADER + key.length + value.length);
    entry.writeUInt8(ENTRY, 0);
    entry.writeUInt16LE(key.length, 1);
    entry.writeUInt32LE(value.length, 3);
    key.copy(entry, ENTRY_HEADER);
    value.copy(entry, ENTRY_HEADER + key.length);
    this.#put(entry);
    if (this.#pending < BLOCK_BYTES) return false;
    await this.#writeBlock();
    return true;
  }

  /** The database exists, even if it has no entries. */
  use(database: string): void {
    if (database === this.#database) return;
    const name = Buffer.from(database);
    const head = Buffer.from([DATABASE, 0, 0]);
    head.writeUInt16LE(name.length, 1);
    this.#put(Buffer.concat([head, name]));
    this.#database = database;
  }

  async end(): Promise<void> {
    if (this.#pending > 0) await this.#writeBlock();
    const last = Buffer.alloc(BLOCK_HEADER);
    last.writeUInt32LE(this.#blocks, 4);
    await this.#append(last);
    await this.#append(this.#hash.copy().digest());
  }

  #put(bytes: Buffer): void {
    this.#parts.push(bytes);
    this.#pending += bytes.length;
  }

  async #writeBlock(): Promise<void> {
    const plain = Buffer.concat(this.#parts);
    this.#parts = [];
    this.#pending = 0;
    this.#blocks++;
    // In the thread pool: the event loop is for clients.
    const packed = await deflate(plain, { level: 1 });
    const head = Buffer.alloc(BLOCK_HEADER);
    head.writeUInt32LE(plain.length, 0);
    head.writeUInt32LE(packed.length, 4);
    head.writeUInt32LE(zlib.crc32(packed), 8);
    await this.#append(Buffer.concat([head, packed]));
  }

  async #append(bytes: Buffer): Promise<void> {
    await writeFully(this.#disk, this.#fd, bytes, this.#length);
    this.#hash.update(bytes);
    this.#length += bytes.length;
  }
}

/**
 * The header and then the entries of the copy open as `fd`. An entry is certain only when the last one was read: until then the
 * rest may be damaged. Errors: CopyDamaged, and those of the disk.
 */
export async function* readCopy(disk: HostDisk, fd: number): AsyncGenerator<CopiedEntry, CopyHeader> {
  const hash = createHash('sha256');
  let at = 0;
  const take = async (length: number): Promise<Buffer> => {
    const bytes = Buffer.allocUnsafe(length);
    if ((await readToEnd(disk, fd, bytes, at)) < length) throw new CopyDamaged('it is truncated');
    at += length;
    return bytes;
  };
  const head = await take(COPY_HEADER_BYTES);
  hash.update(head);
  const header = parseHeader(head);
  if (!header) throw new CopyDamaged('its header is damaged');
  let database = '';
  for (let blocks = 0; ; blocks++) {
    const blockHead = await take(BLOCK_HEADER);
    hash.update(blockHead);
    const [plainLength, length, check] = [0, 4, 8].map((offset) => blockHead.readUInt32LE(offset)) as [
      number,
      number,
      number,
    ];
    if (plainLength === 0) {
      if (length !== blocks || check !== 0) throw new CopyDamaged('a part of it is missing');
      const expected = await take(HASH_BYTES);
      if (!hash.digest().equals(expected)) throw new CopyDamaged('its checksum is wrong');
      if (disk.fstatSync(fd).size !== at) throw new CopyDamaged('it is longer than it should be');
      return header;
    }
    if (plainLength > MAX_BLOCK_BYTES || length > MAX_BLOCK_BYTES) throw new CopyDamaged('a block of it is damaged');
    const packed = await take(length);
    hash.update(packed);
    if (zlib.crc32(packed) !== check) throw new CopyDamaged('a block of it is damaged');
    const plain = await inflate(packed, { maxOutputLength: plainLength });
    for (const entry of entriesIn(plain)) {
      if (entry.key === undefined) database = entry.name;
      else yield { database, key: entry.key, value: entry.value };
    }
  }
}

type Parsed =
  | { readonly name: string; readonly key?: undefined }
  | { readonly key: Buffer; readonly value: Buffer; readonly name?: undefined };

/** Only of blocks whose checksum is right: these were written as they are. */
function* entriesIn(plain: Buffer): Generator<Parsed> {
  for (let at = 0; at < plain.length;) {
    const kind = plain.readUInt8(at);
    const length = plain.readUInt16LE(at + 1);
    if (kind === DATABASE) {
      yield { name: plain.toString('utf8', at + 3, at + 3 + length) };
      at += 3 + length;
      continue;
    }
    const from = at + ENTRY_HEADER + length;
    const end = from + plain.readUInt32LE(at + 3);
    yield { key: plain.subarray(at + ENTRY_HEADER, from), value: plain.subarray(from, end) };
    at = end;
  }
}

/** Why the copy open as `fd` is not whole; undefined if it is. Reads all of it. Errors: those of the disk. */
export async function copyProblem(disk: HostDisk, fd: number): Promise<string | undefined> {
  try {
    await readAll(readCopy(disk, fd));
    return undefined;
  } catch (error) {
    if (error instanceof CopyDamaged) return error.message;
    throw error;
  }
}
