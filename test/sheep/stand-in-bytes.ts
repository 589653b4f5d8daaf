/**
 * The bytes of the stand-in's objects, nearly all of which are zeros: tests look at them, copy them and send them thousands of
 * times, so no zeros are copied, and no memory is taken that is not used. Owns the memory of inodes.
 */

export const INODE_BYTES = 12_587_576;
/** Where the table of an inode begins and ends (sheepdog_proto.h, struct sd_inode). */
export const TABLE = 4664;
export const GREF = 4_198_968;

const HEADER = 48;
const PAGE = 4096;
const SECTOR = 512;
const ZEROS = Buffer.alloc(2 ** 22);
/** So much is compared with zeros at once. */
const STEPS = [2 ** 20, 2 ** 16, 2 ** 13, SECTOR];
/**
 * Inodes that share one piece of memory. The engine collects garbage each time 64 MiB were taken, which took half of the time
 * of some tests when each inode had its own memory. The system provides a page only when it is written.
 */
const INODES_PER_PIECE = 16;

let piece = new ArrayBuffer(0);
let pieceUsed = 0;

/** An inode of zeros. */
export function newInode(): Buffer {
  if (pieceUsed + INODE_BYTES > piece.byteLength) {
    piece = new ArrayBuffer(INODES_PER_PIECE * INODE_BYTES);
    pieceUsed = 0;
  }
  const inode = Buffer.from(piece, pieceUsed, INODE_BYTES);
  pieceUsed += INODE_BYTES;
  return inode;
}

/** A copy of an object. */
export function copyOf(object: Buffer): Buffer {
  const copy = object.length === INODE_BYTES ? newInode() : Buffer.alloc(object.length);
  for (let at = 0; at < object.length; at += PAGE) {
    if (!isZero(object.subarray(at, at + PAGE))) object.copy(copy, at, at, at + PAGE);
  }
  return copy;
}

export function isZero(bytes: Buffer): boolean {
  return bytes.equals(ZEROS.subarray(0, bytes.length));
}

/**
 * Without the sectors of zeros at both ends of `length` bytes, which nodes may leave out of an answer. If `bytes` are fewer, the
 * rest is zeros.
 */
export function sectorsWithData(bytes: Buffer, length: number): [from: number, to: number] {
  let from = 0;
  let to = length;
  for (const step of STEPS) {
    while (from + step <= to && isZero(bytes.subarray(from, from + step))) from += step;
    while (to - step >= from && isZero(bytes.subarray(to - step, to))) to -= step;
  }
  return [from, to];
}

/** Indexes of the objects in the table of an inode. */
export function entriesOf(inode: Buffer): number[] {
  const found: number[] = [];
  for (let at = TABLE; at < GREF; at += PAGE) {
    const end = Math.min(at + PAGE, GREF);
    if (isZero(inode.subarray(at, end))) continue;
    for (let entry = at; entry < end; entry += 4) if (inode.readUInt32LE(entry) !== 0) found.push((entry - TABLE) / 4);
  }
  return found;
}

/** A bitmap with one bit per vid, as the pieces of an answer. */
export function bitmapOf(vids: ReadonlySet<number>): Buffer[] {
  const pages = new Map<number, Buffer>();
  for (const vid of vids) {
    const at = vid >> 3;
    const number = Math.floor(at / PAGE);
    let page = pages.get(number);
    if (page === undefined) pages.set(number, (page = Buffer.alloc(PAGE)));
    page[at % PAGE] = (page[at % PAGE] as number) | (1 << (vid & 7));
  }
  const pieces: Buffer[] = [];
  let done = 0;
  const zerosUntil = (end: number): void => {
    if (end > done) pieces.push(ZEROS.subarray(0, end - done));
  };
  for (const [number, page] of [...pages].sort(([a], [b]) => a - b)) {
    zerosUntil(number * PAGE);
    pieces.push(page);
    done = (number + 1) * PAGE;
  }
  zerosUntil(2 ** 21);
  return pieces;
}

/** Puts the requests of one connection together, which arrive in pieces. No byte of a long request is copied twice. */
export class Requests {
  readonly #take: (header: Buffer, data: Buffer) => void;
  /** The request that is arriving: room for its header first, then for header and data. */
  #request: Buffer = Buffer.alloc(HEADER);
  #length = 0;

  constructor(take: (header: Buffer, data: Buffer) => void) {
    this.#take = take;
  }

  add(chunk: Buffer): void {
    for (let at = 0; at < chunk.length;) {
      const count = chunk.copy(this.#request, this.#length, at);
      at += count;
      this.#length += count;
      if (this.#length < this.#request.length) return;
      if (this.#length === HEADER) {
        const isWrite = (this.#request.readUInt16LE(2) & 1) !== 0;
        const whole = Buffer.allocUnsafe(HEADER + (isWrite ? this.#request.readUInt32LE(12) : 0));
        this.#request.copy(whole);
        this.#request = whole;
        if (whole.length > HEADER) continue;
      }
      const request = this.#request;
      this.#request = Buffer.alloc(HEADER);
      this.#length = 0;
      this.#take(request.subarray(0, HEADER), request.subarray(HEADER));
    }
  }
}
