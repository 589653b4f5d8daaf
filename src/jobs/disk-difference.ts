/**
 * Making one disk read as another, and proving that it does: which parts must be looked at, what is written there, and
 * the hashes of both sides. Owns the units in which that is done and the requests in flight; knows no names, snapshots or
 * stores.
 */
import type { DataPage, Disk } from '../operations/operations.js';
import { hashOf, NO_HASH, type BlockHashes } from './block-hashes.js';
import { inFlight } from './requests-in-flight.js';
import { isZeros } from '../system/zeros.js';
import type { Progress } from './reporting.js';

/** What is read and copied at a time: a data object of the usual size, so that a new one is written whole. */
export const UNIT_BYTES = 4 * 2 ** 20;
/** Differences are found in blocks of this size. */
const BLOCK_BYTES = 4096;
/** Differences that are no further apart than this are written in one request. */
const BRIDGE_BYTES = 32 * 2 ** 10;
/** Ranges that a mismatch spells out. */
const MAX_MISMATCHES = 8;

export interface Range {
  readonly from: number;
  readonly to: number;
}

export interface Work {
  readonly progress: Pick<Progress, 'advance'>;
  readonly signal: AbortSignal;
}

/** The units of a disk of `size` bytes that must be looked at: of `unitBytes` each, the last one shorter. */
export class Units {
  readonly size: number;
  readonly unitBytes: number;
  readonly #marked: Uint8Array;

  constructor(size: number, unitBytes = UNIT_BYTES) {
    this.size = size;
    this.unitBytes = unitBytes;
    this.#marked = new Uint8Array(Math.ceil(size / unitBytes));
  }

  /** What lies behind the end does not count. */
  mark(offset: number, length: number): void {
    const end = Math.min(offset + length, this.size);
    if (end <= offset) return;
    this.#marked.fill(1, Math.floor(offset / this.unitBytes), Math.ceil(end / this.unitBytes));
  }

  /** Mark the ranges of all pages, from the first on. */
  async markPages(page: (offset: number) => Promise<DataPage>, signal: AbortSignal): Promise<void> {
    for (let next: number | null = 0; next !== null;) {
      signal.throwIfAborted();
      const answer: DataPage = await page(next);
      for (const { offset, length } of answer.ranges) this.mark(offset, length);
      next = answer.next;
    }
  }

  /** How many bytes are marked. */
  get bytes(): number {
    let bytes = 0;
    for (const { from, to } of this.ranges()) bytes += to - from;
    return bytes;
  }

  *ranges(): Generator<Range> {
    for (let n = 0; n < this.#marked.length; n++) {
      if (this.#marked[n] === 0) continue;
      yield { from: n * this.unitBytes, to: Math.min((n + 1) * this.unitBytes, this.size) };
    }
  }
}

/** Where a disk has data, asked for in ascending order. */
class DataMap {
  readonly #disk: Disk;
  #ranges: DataPage['ranges'] = [];
  #at = 0;
  /** What is known reaches from the first of the ranges to here. */
  #known = 0;

  constructor(disk: Disk) {
    this.#disk = disk;
  }

  /** The smallest range that holds all data within [from, to), or undefined if it is all zeros. */
  async within(from: number, to: number): Promise<Range | undefined> {
    let first: number | undefined;
    let last = from;
    for (let begin = from; begin < to;) {
      if (begin >= this.#known) {
        const page = await this.#disk.dataPage(begin);
        this.#ranges = page.ranges;
        this.#at = 0;
        this.#known = page.next ?? this.#disk.size;
      }
      const end = Math.min(to, this.#known);
      for (; this.#at < this.#ranges.length; this.#at++) {
        const { offset, length } = this.#ranges[this.#at] as DataPage['ranges'][number];
        if (offset >= end) break;
        if (offset + length > begin) {
          first ??= Math.max(offset, begin);
          last = Math.min(offset + length, end);
        }
        // It may reach into what is asked for next.
        if (offset + length > end) break;
      }
      begin = end;
    }
    return first === undefined ? undefined : { from: first, to: last };
  }
}

export interface Written {
  /** Bytes that were carried over. */
  copiedBytes: number;
  /** Bytes that were something and are zeros now. */
  zeroedBytes: number;
}

/** Make the marked units of `target` read as `source`, writing only what differs. */
export async function makeSame(source: Disk, target: Disk, units: Units, work: Work): Promise<Written> {
  const written: Written = { copiedBytes: 0, zeroedBytes: 0 };
  const wanted = new DataMap(source);
  const present = new DataMap(target);
  await inFlight(async (flight) => {
    /** Units that become zeros, together: objects may be larger than a unit, and are given up whole. */
    let zeros: Range | undefined;
    const zero = async (): Promise<void> => {
      const range = zeros;
      zeros = undefined;
      if (!range) return;
      written.zeroedBytes += range.to - range.from;
      await flight.add(() => target.zero(range.from, range.to - range.from));
    };
    for (const { from, to } of units.ranges()) {
      work.signal.throwIfAborted();
      const data = await wanted.within(from, to);
      const old = await present.within(from, to);
      if (data === undefined) {
        work.progress.advance(to - from);
        if (old === undefined) continue;
        if (zeros && zeros.to !== from) await zero();
        zeros = { from: zeros?.from ?? from, to };
        continue;
      }
      await zero();
      await flight.add(async () => {
        const [want, have] = await Promise.all([
          readPart(source, from, to, data),
          old && readPart(target, from, to, old),
        ]);
        await writeDifferences(target, from, want, have, written);
        work.progress.advance(to - from);
      });
    }
    await zero();
  });
  return written;
}

async function writeDifferences(
  target: Disk,
  at: number,
  want: Buffer,
  have: Buffer | undefined,
  written: Written,
): Promise<void> {
  for (const { from, to, isZero } of differences(want, have)) {
    if (isZero) {
      await target.zero(at + from, to - from);
      written.zeroedBytes += to - from;
    } else {
      await target.write(at + from, want.subarray(from, to));
      written.copiedBytes += to - from;
    }
  }
}

/** Where `want` is not what `have` is; no `have` is zeros. Ascending; short gaps between data are data. */
export function differences(want: Buffer, have: Buffer | undefined): (Range & { readonly isZero: boolean })[] {
  const runs: { from: number; to: number; isZero: boolean }[] = [];
  for (let from = 0; from < want.length; from += BLOCK_BYTES) {
    const to = Math.min(from + BLOCK_BYTES, want.length);
    const isZero = isZeros(want.subarray(from, to));
    if (have ? have.compare(want, from, to, from, to) === 0 : isZero) continue;
    const last = runs.at(-1);
    if (isZero) {
      if (last?.isZero && last.to === from) last.to = to;
      else runs.push({ from, to, isZero });
      continue;
    }
    const data = runs.findLast((run) => !run.isZero);
    if (data && from - data.to <= BRIDGE_BYTES) {
      runs.length = runs.indexOf(data) + 1; // zeros in between are written with it
      data.to = to;
    } else runs.push({ from, to, isZero });
  }
  return runs;
}

/** The unit [from, to) of a disk whose data in it lies within `data`. */
async function readPart(disk: Disk, from: number, to: number, data: Range): Promise<Buffer> {
  const whole = data.from === from && data.to === to;
  const buffer = whole ? Buffer.allocUnsafe(to - from) : Buffer.alloc(to - from);
  await disk.read(data.from, buffer.subarray(data.from - from, data.to - from));
  return buffer;
}

/** Hashes of the blocks of a disk, by which it is compared; all of them, or those of the blocks that were compared. */
export interface Fingerprint {
  readonly hashes: BlockHashes;
  /** Whether every block's hash is known. */
  readonly isWhole: boolean;
}

/** Read the marked units of both disks, which are the blocks of `hashes`, into it. Returns the units that differ. */
export async function compare(
  source: Disk,
  target: Disk,
  units: Units,
  hashes: BlockHashes,
  work: Work,
): Promise<Range[]> {
  const differing: Range[] = [];
  const left = new DataMap(source);
  const right = new DataMap(target);
  await inFlight(async (flight) => {
    for (const { from, to } of units.ranges()) {
      work.signal.throwIfAborted();
      const data = await left.within(from, to);
      const other = await right.within(from, to);
      await flight.add(async () => {
        const [digest, otherDigest] = await Promise.all([
          hashOfUnit(source, from, to, data),
          hashOfUnit(target, from, to, other),
        ]);
        hashes.set(from / units.unitBytes, digest);
        if (!digest.equals(otherDigest)) differing.push({ from, to });
        work.progress.advance(to - from);
      });
    }
  });
  return differing.sort((a, b) => a.from - b.from);
}

async function hashOfUnit(disk: Disk, from: number, to: number, data: Range | undefined): Promise<Buffer> {
  return data ? hashOf(await readPart(disk, from, to, data)) : NO_HASH;
}

/** For people: where exactly the units differ. */
export async function describeDifferences(source: Disk, target: Disk, units: readonly Range[]): Promise<string> {
  const places: string[] = [];
  for (const { from, to } of units.slice(0, MAX_MISMATCHES)) {
    const [want, have] = await Promise.all([
      readPart(source, from, to, { from, to }),
      readPart(target, from, to, { from, to }),
    ]);
    const blocks: number[] = [];
    for (let at = 0; at < want.length; at += BLOCK_BYTES) {
      const end = Math.min(at + BLOCK_BYTES, want.length);
      if (have.compare(want, at, end, at, end) !== 0) blocks.push(at);
    }
    // Changed once more since it was hashed: the unit as a whole is all that is known.
    const first = blocks[0] ?? 0;
    const last = blocks.at(-1) ?? want.length - 1;
    places.push(`bytes ${from + first} to ${from + Math.min(last + BLOCK_BYTES, want.length) - 1}`);
  }
  if (units.length > MAX_MISMATCHES) places.push(`${units.length - MAX_MISMATCHES} more places`);
  return places.join(', ');
}
