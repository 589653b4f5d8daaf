/**
 * Read-ahead for who reads a disk from front to back with few requests at a time, as a copying program or the kernel
 * does: what comes next is on its way before it is asked for. Owns the pieces that were fetched and not used yet, and
 * sees to it that none is used that is older than a write: every change of an object must be announced with `forget`,
 * before and after it is made.
 */
import type { ReadCount } from '../object-store.js';
import { MAX_PIECE_BYTES } from './pieces.js';
import { isLost } from './lost-owner.js';
import { oidKey } from '../../sheepdog/object-ids.js';

/** One request; it is used up by several reads of the kernel's usual 128 KiB. */
const PIECE_BYTES = MAX_PIECE_BYTES;
/** As far as is read ahead, at most; it begins with one piece and doubles. */
const WINDOW_BYTES = 4 * 1024 * 1024;
/** Reads in a row after which a reader is taken for a sequential one. */
const MIN_RUN = 2;
/** Reads of a disk under way with which its reader does well enough by itself. */
const BUSY_READS = 4;
/** Reads after which such a reader is looked at again: what it has under way goes up and down. */
const BUSY_REST = 64;
/** Readers of one disk that are told apart. */
const MAX_READERS = 8;
/** Pieces held for all disks together: 62 MiB. What is not fetched by then is dropped, the oldest first. */
const MAX_PIECES = 128;
/** Buffers kept for further pieces: a fresh one costs as much as filling it. */
const KEPT_BUFFERS = 24;
/** A piece nobody asked for in this time is not used any more: another gateway may have written the disk meanwhile. */
const PIECE_LIFE_MS = 2_000;

/** A disk that is read: its map of owners, and the size of its objects. */
export interface ReadableDisk {
  readonly map: Uint32Array;
  readonly record: { readonly size: number; readonly blockSizeShift: number };
}

interface Reader {
  /** Where its next read begins if it goes on. */
  next: number;
  run: number;
  /** Up to where pieces have been asked for. */
  ahead: number;
  window: number;
}

/** What is known of who reads a disk. */
interface Reading extends ReadCount {
  readonly readers: Reader[];
  rest: number;
}

interface Piece {
  readonly object: number;
  readonly offset: number;
  readonly bytes: Buffer;
  /** Whether it has come; or failed, and is of no use. */
  readonly arrival: Promise<boolean>;
  readonly expires: number;
  /** Bytes used so far: with the last one it goes. */
  used: number;
  isStale: boolean;
}

export class ReadAhead {
  readonly #fetch: (vid: number, idx: number, offset: number, into: Buffer) => Promise<void>;
  readonly #disks = new WeakMap<ReadableDisk, Reading>();
  /** In the order in which they were asked for. */
  readonly #pieces = new Set<Piece>();
  readonly #byObject = new Map<number, Set<Piece>>();
  /** Of PIECE_BYTES each. */
  readonly #spare: Buffer[] = [];

  constructor(fetch: (vid: number, idx: number, offset: number, into: Buffer) => Promise<void>) {
    this.#fetch = fetch;
  }

  /** `length` bytes of `disk` at `offset` are about to be read. The caller counts what it has under way in what it gets. */
  note(disk: ReadableDisk, offset: number, length: number): ReadCount {
    let reading = this.#disks.get(disk);
    if (!reading) this.#disks.set(disk, (reading = { inFlight: 0, readers: [], rest: 0 }));
    if (reading.inFlight >= BUSY_READS) reading.rest = BUSY_REST;
    else if (reading.rest > 0) reading.rest--;
    const { readers } = reading;
    const at = readers.findIndex(({ next }) => next === offset);
    if (at < 0) {
      if (readers.length >= MAX_READERS) readers.shift();
      readers.push({ next: offset + length, run: 1, ahead: 0, window: PIECE_BYTES });
      return reading;
    }
    const [reader] = readers.splice(at, 1) as [Reader];
    readers.push(reader);
    reader.next = offset + length;
    reader.run++;
    if (reader.run >= MIN_RUN && reading.rest === 0) this.#goAhead(disk, reader);
    return reading;
  }

  /**
   * Fill `into` with the bytes at `offset` of the object, as far as all of them have been read ahead; waits for what is on
   * its way. False if they must be read after all, at once if nothing is known of them.
   */
  read(vid: number, idx: number, offset: number, into: Buffer): false | Promise<boolean> {
    if (this.#pieces.size === 0) return false;
    const pieces = this.#covering(oidKey(vid, idx), offset, offset + into.length);
    return pieces !== undefined && this.#take(pieces, offset, into);
  }

  async #take(pieces: readonly Piece[], offset: number, into: Buffer): Promise<boolean> {
    for (const piece of pieces) if (!(await piece.arrival)) return false;
    // Looked at when all have come: one may have become old while another was waited for.
    if (pieces.some(({ isStale }) => isStale)) return false;
    const end = offset + into.length;
    for (const piece of pieces) {
      const from = Math.max(offset, piece.offset);
      const to = Math.min(end, piece.offset + piece.bytes.length);
      piece.bytes.copy(into, from - offset, from - piece.offset, to - piece.offset);
      piece.used += to - from;
      if (piece.used >= piece.bytes.length) this.#drop(piece);
    }
    return true;
  }

  /** The pieces of an object that hold these bytes, in order; undefined if some are missing. */
  #covering(object: number, from: number, to: number): Piece[] | undefined {
    const known = this.#byObject.get(object);
    if (!known) return undefined;
    const now = performance.now();
    const pieces: Piece[] = [];
    for (let at = from; at < to;) {
      let found: Piece | undefined;
      for (const piece of known) {
        if (at < piece.offset || at >= piece.offset + piece.bytes.length) continue;
        if (piece.expires >= now) found = piece;
        else this.#drop(piece);
      }
      if (!found) return undefined;
      pieces.push(found);
      at = found.offset + found.bytes.length;
    }
    return pieces;
  }

  /** The object is being changed, or has just been: nothing fetched of it so far is true. */
  forget(vid: number, idx: number): void {
    if (this.#pieces.size === 0) return;
    const pieces = this.#byObject.get(oidKey(vid, idx));
    if (pieces) for (const piece of [...pieces]) this.#drop(piece);
  }

  #goAhead(disk: ReadableDisk, reader: Reader): void {
    const objectSize = 2 ** disk.record.blockSizeShift;
    if (reader.ahead < reader.next) reader.ahead = reader.next;
    const end = Math.min(disk.record.size, reader.next + reader.window);
    // Not before half of it is used up, so that it goes in whole pieces.
    if (end - reader.ahead < Math.min(reader.window / 2, PIECE_BYTES)) return;
    while (reader.ahead < end) {
      const idx = Math.floor(reader.ahead / objectSize);
      const within = reader.ahead - idx * objectSize;
      const objectEnd = Math.min(objectSize, disk.record.size - idx * objectSize);
      const length = Math.min(PIECE_BYTES - (within % PIECE_BYTES), objectEnd - within);
      const owner = disk.map[idx];
      if (owner && !isLost(owner)) this.#ask(owner, idx, within, length);
      reader.ahead += length;
    }
    reader.window = Math.min(WINDOW_BYTES, reader.window * 2);
  }

  #ask(vid: number, idx: number, offset: number, length: number): void {
    const object = oidKey(vid, idx);
    if (this.#covering(object, offset, offset + length)) return;
    while (this.#pieces.size >= MAX_PIECES) {
      const [oldest] = this.#pieces;
      if (oldest) this.#drop(oldest);
    }
    const bytes = (this.#spare.pop() ?? Buffer.allocUnsafeSlow(PIECE_BYTES)).subarray(0, length);
    const arrival = this.#fetch(vid, idx, offset, bytes).then(
      () => true,
      () => false,
    );
    const piece: Piece = {
      object,
      offset,
      bytes,
      arrival,
      expires: performance.now() + PIECE_LIFE_MS,
      used: 0,
      isStale: false,
    };
    this.#pieces.add(piece);
    const others = this.#byObject.get(object);
    if (others) others.add(piece);
    else this.#byObject.set(object, new Set([piece]));
  }

  #drop(piece: Piece): void {
    if (piece.isStale) return;
    piece.isStale = true;
    this.#pieces.delete(piece);
    const others = this.#byObject.get(piece.object);
    others?.delete(piece);
    if (others?.size === 0) this.#byObject.delete(piece.object);
    // Not before it has come: until then it is being received into. Who waits for it looks at isStale after that.
    void piece.arrival.then(() => {
      const { buffer, byteOffset } = piece.bytes;
      if (this.#spare.length < KEPT_BUFFERS) this.#spare.push(Buffer.from(buffer, byteOffset, PIECE_BYTES));
    });
  }
}
