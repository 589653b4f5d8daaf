/**
 * Read-ahead for a client that reads a disk from front to back with few requests at a time, as a copying program or the kernel
 * does: the next pieces are fetched before they are requested. Owns the pieces that were fetched and not used yet. A write
 * invalidates them: every change of an object must be announced with `forget`, before and after it is made.
 */
import type { ReadCount } from '../open-vdi.js';
import { MAX_PIECE_BYTES } from './pieces.js';
import { isLost } from './lost-owner.js';
import { oidKey } from '../../sheepdog/object-ids.js';

/** One request, for several reads of the kernel's usual 128 KiB. */
const PIECE_BYTES = MAX_PIECE_BYTES;
/** How far is read ahead, at most; begins with one piece and doubles. */
const WINDOW_BYTES = 4 * 1024 * 1024;
/** Reads in a row that make a reader sequential. */
const MIN_RUN = 2;
/** With so many reads of a disk in flight, its reader needs no read-ahead. */
const BUSY_READS = 4;
/** Reads after which such a reader is considered again: its number of reads in flight goes up and down. */
const BUSY_REST = 64;
/** Readers of one disk that are distinguished. */
const MAX_READERS = 8;
/** Pieces held for all disks together: 62 MiB. Beyond that the oldest pieces are dropped. */
const MAX_PIECES = 128;
/** Buffers kept for further pieces: a fresh one costs as much as filling it. */
const KEPT_BUFFERS = 24;
/** A piece older than this is not used: another client of the cluster may have written the disk meanwhile. */
const PIECE_LIFE_MS = 2_000;

/** A disk that is read: its map, and the size of its objects. */
export interface ReadableDisk {
  readonly map: Uint32Array;
  readonly record: { readonly size: number; readonly blockSizeShift: number };
}

interface Reader {
  /** Where its next read begins if it continues in order. */
  next: number;
  run: number;
  /** End of what was fetched or is being fetched. */
  ahead: number;
  window: number;
}

/** The readers of one disk. */
interface Reading extends ReadCount {
  readonly readers: Reader[];
  rest: number;
}

interface Piece {
  readonly object: number;
  readonly offset: number;
  readonly bytes: Buffer;
  /** True when it has arrived, false when it has failed. */
  readonly arrival: Promise<boolean>;
  readonly expires: number;
  /** Bytes used so far: when all are, it is dropped. */
  used: number;
  isStale: boolean;
}

export class ReadAhead {
  readonly #fetch: (vid: number, idx: number, offset: number, into: Buffer) => Promise<void>;
  readonly #disks = new WeakMap<ReadableDisk, Reading>();
  /** In the order of their requests. */
  readonly #pieces = new Set<Piece>();
  readonly #byObject = new Map<number, Set<Piece>>();
  /** Of PIECE_BYTES each. */
  readonly #spare: Buffer[] = [];

  constructor(fetch: (vid: number, idx: number, offset: number, into: Buffer) => Promise<void>) {
    this.#fetch = fetch;
  }

  /** `length` bytes of `disk` at `offset` are about to be read. The caller counts its reads in flight in the result. */
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
   * Fills `into` with the bytes at `offset` of the object, if all of them have been read ahead or are in flight. False: the
   * caller must read them; without a promise if no piece covers them.
   */
  read(vid: number, idx: number, offset: number, into: Buffer): false | Promise<boolean> {
    if (this.#pieces.size === 0) return false;
    const pieces = this.#covering(oidKey(vid, idx), offset, offset + into.length);
    return pieces !== undefined && this.#take(pieces, offset, into);
  }

  async #take(pieces: readonly Piece[], offset: number, into: Buffer): Promise<boolean> {
    for (const piece of pieces) if (!(await piece.arrival)) return false;
    // After all have arrived: one may have become stale while another was awaited.
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

  /** Call before and after the object is changed: invalidates its pieces. */
  forget(vid: number, idx: number): void {
    if (this.#pieces.size === 0) return;
    const pieces = this.#byObject.get(oidKey(vid, idx));
    if (pieces) for (const piece of [...pieces]) this.#drop(piece);
  }

  #goAhead(disk: ReadableDisk, reader: Reader): void {
    const objectSize = 2 ** disk.record.blockSizeShift;
    if (reader.ahead < reader.next) reader.ahead = reader.next;
    const end = Math.min(disk.record.size, reader.next + reader.window);
    // Not before half of the window is used, so that whole pieces are fetched.
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
    // Reuse the buffer only after the arrival: until then it is being received into. Waiters check isStale after that.
    void piece.arrival.then(() => {
      const { buffer, byteOffset } = piece.bytes;
      if (this.#spare.length < KEPT_BUFFERS) this.#spare.push(Buffer.from(buffer, byteOffset, PIECE_BYTES));
    });
  }
}
