/**
 * Load with verification for clusters whose nodes come and go: a client writes and reads a disk at random, and knows all it
 * wrote. Owns the expected content and the bytes in flight; the caller gives the functions that read and write.
 */

/** The functions with which a client reads and writes its disk. */
export interface LoadedDisk {
  read(offset: number, into: Buffer): Promise<void>;
  write(offset: number, data: Buffer): Promise<void>;
}

export interface LoadOptions {
  readonly size: number;
  readonly objectSize: number;
  /** Requests in flight. */
  readonly depth: number;
  /** The share of reads among the requests, 0 to 1. */
  readonly readShare: number;
  /** The most writes to one object at the same time. */
  readonly writesPerObject?: number;
}

const SECTOR = 512;
const LONGEST = 64 * 1024;

export class VerifiedLoad {
  readonly expected: Buffer;
  readonly wrongReads: string[] = [];
  readonly errors: string[] = [];
  writes = 0;
  reads = 0;
  readonly #disk: LoadedDisk;
  readonly #options: LoadOptions;
  readonly #busy: { readonly from: number; readonly to: number; readonly isWrite: boolean }[] = [];
  readonly #lanes: Promise<void>[];
  #isEnding = false;
  #number = 0;

  constructor(disk: LoadedDisk, options: LoadOptions) {
    this.#disk = disk;
    this.#options = options;
    this.expected = Buffer.alloc(options.size);
    this.#lanes = Array.from({ length: options.depth }, () => this.#lane());
  }

  /** Sends no more requests; resolves when the last one is answered. */
  async end(): Promise<void> {
    this.#isEnding = true;
    await Promise.all(this.#lanes);
  }

  async #lane(): Promise<void> {
    while (!this.#isEnding) {
      try {
        await this.#one();
      } catch (error) {
        this.errors.push((error as Error).message);
        await new Promise((resolve) => setTimeout(resolve, 10));
      }
    }
  }

  /** One request, in a range without other requests in flight: its content is known. */
  async #one(): Promise<void> {
    const { objectSize } = this.#options;
    const isWrite = Math.random() >= this.#options.readShare;
    const length = SECTOR * (1 + Math.floor(Math.random() ** 3 * (LONGEST / SECTOR)));
    const at = SECTOR * Math.floor((Math.random() * (this.#options.size - length)) / SECTOR);
    const range = { from: at, to: at + length, isWrite };
    if (this.#busy.some(({ from, to }) => from < range.to && range.from < to)) return Promise.resolve();
    const objectsOf = (from: number, to: number): number[] => [
      Math.floor(from / objectSize),
      Math.floor((to - 1) / objectSize),
    ];
    const { writesPerObject } = this.#options;
    if (isWrite && writesPerObject !== undefined) {
      const mine = objectsOf(range.from, range.to);
      const others = this.#busy.filter(
        (other) => other.isWrite && objectsOf(other.from, other.to).some((idx) => mine.includes(idx)),
      );
      if (others.length >= writesPerObject) return new Promise((resolve) => setImmediate(resolve));
      if (mine[0] !== mine[1]) return Promise.resolve();
    }
    this.#busy.push(range);
    try {
      if (isWrite) await this.#write(at, length);
      else await this.#read(at, length);
    } finally {
      this.#busy.splice(this.#busy.indexOf(range), 1);
    }
  }

  async #write(at: number, length: number): Promise<void> {
    const number = ++this.#number;
    const data = Buffer.alloc(length);
    for (let n = 0; n < length; n += 8) {
      data.writeUInt32LE(number, n);
      data.writeUInt32LE((at + n) >>> 0, n + 4);
    }
    await this.#disk.write(at, data);
    data.copy(this.expected, at);
    this.writes++;
  }

  async #read(at: number, length: number): Promise<void> {
    const into = Buffer.alloc(length);
    await this.#disk.read(at, into);
    this.reads++;
    const expected = this.expected.subarray(at, at + length);
    if (into.equals(expected)) return;
    const first = firstDifference(into, expected);
    const now = new Date().toISOString();
    this.wrongReads.push(
      `${now} at ${at + first}: write ${into.readUInt32LE(first)}, not ${expected.readUInt32LE(first)}`,
    );
  }
}

/** Offset of the first eight bytes that differ. */
function firstDifference(a: Buffer, b: Buffer): number {
  for (let at = 0; at < a.length; at += 8) if (a.compare(b, at, at + 8, at, at + 8) !== 0) return at;
  return -1;
}

/** Objects in which `actual` differs from `expected`. */
export function differingObjects(actual: Buffer, expected: Buffer, objectSize: number): number[] {
  const differing: number[] = [];
  for (let idx = 0; idx * objectSize < expected.length; idx++) {
    const from = idx * objectSize;
    const to = Math.min(from + objectSize, expected.length);
    if (!actual.subarray(from, to).equals(expected.subarray(from, to))) differing.push(idx);
  }
  return differing;
}
