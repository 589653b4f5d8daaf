/**
 * Making one disk read as another, and proving that it does. Owns the units in which two disks are read, compared and copied, and
 * which parts of a unit are written. The caller chooses the disks and marks the units.
 */
import type { DataPage, Disk } from '../operations/operations.js';
import { runsOf, type BufferRun } from './buffer-runs.js';
import { hashOf, NO_HASH, type BlockHashes } from './block-hashes.js';
import { withRequestsInFlight } from './requests-in-flight.js';
import { PagedRanges, type Range } from './paged-ranges.js';
import type { Progress } from './reporting.js';

/** The unit of reading and copying: a data object of the usual size, so that a new one is written whole. */
export const UNIT_BYTES = 4 * 2 ** 20;
/** Differences are exact to blocks of this size. */
const BLOCK_BYTES = 4096;
/** Differing data with a gap of at most this is written in one request. */
const BRIDGE_BYTES = 32 * 2 ** 10;
/** Differing units that a message names. */
const MAX_MISMATCHES = 8;

export interface Work {
  readonly progress: Pick<Progress, 'advance'>;
  readonly signal: AbortSignal;
}

/** The units of a disk that have to be read, of `unitBytes` each; the last one may be shorter. */
export class Units {
  readonly size: number;
  readonly unitBytes: number;
  readonly #marked: Uint8Array;

  constructor(size: number, unitBytes = UNIT_BYTES) {
    this.size = size;
    this.unitBytes = unitBytes;
    this.#marked = new Uint8Array(Math.ceil(size / unitBytes));
  }

  /** Mark the units of a range. Bytes behind the end are ignored. */
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

function dataOf(disk: Disk): PagedRanges {
  return new PagedRanges((offset) => disk.dataPage(offset));
}

export interface Written {
  /** Bytes that were written. */
  copiedBytes: number;
  /** Bytes that were zeroed. */
  zeroedBytes: number;
}

/** Make the marked units of `target` read as `source`, writing only what differs. */
export async function makeSame(source: Disk, target: Disk, units: Units, work: Work): Promise<Written> {
  const written: Written = { copiedBytes: 0, zeroedBytes: 0 };
  const wanted = dataOf(source);
  const present = dataOf(target);
  await withRequestsInFlight(async (requests) => {
    /** Neighbouring units that become zeros, in one request: an object larger than a unit is then given up whole. */
    let zeros: Range | undefined;
    const zero = async (): Promise<void> => {
      const range = zeros;
      zeros = undefined;
      if (!range) return;
      written.zeroedBytes += range.to - range.from;
      await requests.add(() => target.zero(range.from, range.to - range.from));
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
      await requests.add(async () => {
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
  for (const { from, to, kind } of differences(want, have)) {
    if (kind === 'zeros') {
      await target.zero(at + from, to - from);
      written.zeroedBytes += to - from;
    } else {
      await target.write(at + from, want.subarray(from, to));
      written.copiedBytes += to - from;
    }
  }
}

/** Where `want` differs from `have`, or from zeros without `have`. Ascending; short gaps between data count as data. */
export function differences(want: Buffer, have: Buffer | undefined): BufferRun[] {
  const found: BufferRun[] = [];
  for (const run of runsOf(want, BLOCK_BYTES, have)) {
    if (run.kind === 'same' || (run.kind === 'zeros' && !have)) continue;
    const data = run.kind === 'data' ? found.findLast(({ kind }) => kind === 'data') : undefined;
    if (data && run.from - data.to <= BRIDGE_BYTES) {
      found.length = found.indexOf(data) + 1; // zeros in between are written with it
      data.to = run.to;
    } else found.push(run);
  }
  return found;
}

/** Read the unit [from, to), which holds zeros outside of `data`. */
async function readPart(disk: Disk, from: number, to: number, data: Range): Promise<Buffer> {
  const whole = data.from === from && data.to === to;
  const buffer = whole ? Buffer.allocUnsafe(to - from) : Buffer.alloc(to - from);
  await disk.read(data.from, buffer.subarray(data.from - from, data.to - from));
  return buffer;
}

/** The hashes of the blocks that were compared: all blocks of a disk, or some. */
export interface Fingerprint {
  readonly hashes: BlockHashes;
  /** Whether every block's hash is known. */
  readonly isWhole: boolean;
}

/** Hash the marked units of both disks into `hashes`, whose blocks they are. Returns the units that differ. */
export async function compare(
  source: Disk,
  target: Disk,
  units: Units,
  hashes: BlockHashes,
  work: Work,
): Promise<Range[]> {
  const differing: Range[] = [];
  const left = dataOf(source);
  const right = dataOf(target);
  await withRequestsInFlight(async (requests) => {
    for (const { from, to } of units.ranges()) {
      work.signal.throwIfAborted();
      const data = await left.within(from, to);
      const other = await right.within(from, to);
      await requests.add(async () => {
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

/** For a message: which bytes of the units differ. */
export async function describeDifferences(source: Disk, target: Disk, units: readonly Range[]): Promise<string> {
  const places: string[] = [];
  for (const { from, to } of units.slice(0, MAX_MISMATCHES)) {
    const [want, have] = await Promise.all([
      readPart(source, from, to, { from, to }),
      readPart(target, from, to, { from, to }),
    ]);
    const changed = runsOf(want, BLOCK_BYTES, have).filter(({ kind }) => kind !== 'same');
    // If it was changed once more since it was hashed, the unit as a whole is all that is known.
    const first = changed[0]?.from ?? 0;
    const end = changed.at(-1)?.to ?? want.length;
    places.push(`bytes ${from + first} to ${from + end - 1}`);
  }
  if (units.length > MAX_MISMATCHES) places.push(`${units.length - MAX_MISMATCHES} more places`);
  return places.join(', ');
}
