/**
 * Copying between a Disk and a file or stream, sparse in both directions: zeros are neither read nor written where they are
 * known in advance, and become holes where they are found. Owns the size of requests and the number in flight.
 */
import type { Writable } from 'node:stream';
import { runsOf } from './buffer-runs.js';
import { MAX_IN_FLIGHT, withRequestsInFlight, type RequestsInFlight } from './requests-in-flight.js';
import { readAll } from './read-all.js';
import type { Progress } from './reporting.js';
import { OperationError, type Disk } from '../operations/operations.js';
import { OpenFile } from '../system/open-file.js';
import { hostDisk } from '../system/real-disk.js';

/** The size of a request. */
const CHUNK_BYTES = 2 ** 20;
/** Zeros that are skipped at a time: the signal is checked in between. */
const ZERO_PIECE_BYTES = 256 * 2 ** 20;
/** Zeros are searched in units of this size, a multiple of the allocation unit of most filesystems. */
const ZERO_UNIT_BYTES = 64 * 2 ** 10;
/** The end of a stream that is kept, to recognise image formats with a footer. */
const TAIL_BYTES = 512;

export interface Copied {
  /** Bytes that were copied. */
  dataBytes: number;
  /** Bytes that are zeros, and were not copied. */
  zeroBytes: number;
}

interface CopyOptions {
  readonly progress: Pick<Progress, 'advance'>;
  readonly signal: AbortSignal;
}

/**
 * Copy `size` bytes of the file to the beginning of the disk. `isEmpty`: the disk reads as zeros already, so zeros need not
 * be written. Errors: CHANGED (the file became shorter).
 */
export async function copyFileToDisk(
  fd: number,
  size: number,
  disk: Disk,
  options: CopyOptions & { readonly isEmpty: boolean },
): Promise<Copied> {
  const copied: Copied = { dataBytes: 0, zeroBytes: 0 };
  const file = new OpenFile(hostDisk, fd);
  await withRequestsInFlight(async (requests) => {
    for (let at = 0; at < size;) {
      options.signal.throwIfAborted();
      const found = await hostDisk.nextData(fd, at);
      const data = found < 0 ? size : Math.min(found, size);
      if (data > at) await addZeros(requests, disk, at, data - at, copied, options);
      if (data >= size) return;
      const end = Math.min(await hostDisk.nextHole(fd, data), size);
      for (let from = data; from < end; from += CHUNK_BYTES) {
        options.signal.throwIfAborted();
        const length = Math.min(CHUNK_BYTES, end - from);
        await requests.add(async () => {
          const buffer = Buffer.allocUnsafe(length);
          await readAll(file, buffer, from);
          await writeSparsely(disk, from, buffer, copied, options);
        });
      }
      at = end;
    }
  });
  return copied;
}

/**
 * Copy `chunks` (of chunksOf) to the beginning of the disk. Returns also their length and their last TAIL_BYTES. Errors:
 * TOO_LONG (longer than `limit`).
 */
export async function copyStreamToDisk(
  chunks: AsyncIterable<Buffer>,
  disk: Disk,
  options: CopyOptions & { readonly isEmpty: boolean; readonly limit: number },
): Promise<Copied & { size: number; tail: Buffer }> {
  const copied: Copied = { dataBytes: 0, zeroBytes: 0 };
  const { limit } = options;
  let size = 0;
  let tail: Buffer = Buffer.alloc(0);
  await withRequestsInFlight(async (requests) => {
    for await (const buffer of chunks) {
      options.signal.throwIfAborted();
      if (size + buffer.length > limit) {
        const of = limit === disk.size ? 'of the disk' : 'that --size says';
        throw new OperationError('TOO_LONG', `the input is longer than the ${limit} bytes ${of}`);
      }
      const at = size;
      size += buffer.length;
      const end = buffer.subarray(Math.max(0, buffer.length - TAIL_BYTES));
      tail = end.length === TAIL_BYTES ? end : Buffer.concat([tail, end]).subarray(-TAIL_BYTES);
      await requests.add(() => writeSparsely(disk, at, buffer, copied, options));
    }
  });
  return { ...copied, size, tail };
}

/** Make the disk read as zeros from `from` to its end. */
export async function zeroRest(disk: Disk, from: number): Promise<void> {
  if (from < disk.size) await disk.zero(from, disk.size - from);
}

/**
 * Copy the disk to the beginning of a file or device. `zero` makes a range of it read as zeros; without it, ranges that are
 * not written read as zeros already (a new file).
 */
export async function copyDiskToFile(
  disk: Disk,
  fd: number,
  options: CopyOptions & { readonly zero?: (offset: number, length: number) => Promise<void> },
): Promise<Copied> {
  const copied: Copied = { dataBytes: 0, zeroBytes: 0 };
  const { progress, signal, zero } = options;
  const file = new OpenFile(hostDisk, fd);
  await withRequestsInFlight(async (requests) => {
    for await (const { offset, length, isData } of piecesOf(disk, ZERO_PIECE_BYTES)) {
      signal.throwIfAborted();
      if (!isData) {
        copied.zeroBytes += length;
        if (zero) await requests.add(() => zero(offset, length).then(() => progress.advance(length)));
        else progress.advance(length);
        continue;
      }
      await requests.add(async () => {
        const buffer = Buffer.allocUnsafe(length);
        await disk.read(offset, buffer);
        for (const { from, to, kind } of runsOf(buffer, ZERO_UNIT_BYTES)) {
          if (kind === 'zeros') {
            await zero?.(offset + from, to - from);
            copied.zeroBytes += to - from;
            continue;
          }
          await file.write(buffer.subarray(from, to), offset + from);
          copied.dataBytes += to - from;
        }
        progress.advance(length);
      });
    }
  });
  return copied;
}

/** Write the disk to a stream, in order, zeros included. */
export async function copyDiskToStream(disk: Disk, stream: Writable, options: CopyOptions): Promise<Copied> {
  const copied: Copied = { dataBytes: 0, zeroBytes: 0 };
  const ahead: { readonly buffer: Promise<Buffer>; readonly isData: boolean }[] = [];
  const writeFirst = async (): Promise<void> => {
    const first = ahead.shift();
    if (!first) return;
    const buffer = await first.buffer;
    await writeTo(stream, buffer, options.signal);
    if (first.isData) copied.dataBytes += buffer.length;
    else copied.zeroBytes += buffer.length;
    options.progress.advance(buffer.length);
  };
  try {
    for await (const { offset, length, isData } of piecesOf(disk)) {
      options.signal.throwIfAborted();
      if (ahead.length >= MAX_IN_FLIGHT) await writeFirst();
      const buffer = isData ? Buffer.allocUnsafe(length) : Buffer.alloc(length);
      const ready = isData ? disk.read(offset, buffer).then(() => buffer) : Promise.resolve(buffer);
      ready.catch(() => undefined); // reported when its turn to be written comes
      ahead.push({ buffer: ready, isData });
    }
    while (ahead.length > 0) await writeFirst();
  } finally {
    await Promise.allSettled(ahead.map(({ buffer }) => buffer));
  }
  return copied;
}

/** Resolves when the stream has taken `data`. An abort does not wait for a reader that has stopped reading. */
function writeTo(stream: Writable, data: Buffer, signal: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const onAbort = (): void => reject(signal.reason as Error);
    signal.addEventListener('abort', onAbort, { once: true });
    stream.write(data, (error) => {
      signal.removeEventListener('abort', onAbort);
      if (error) reject(error);
      else resolve();
    });
  });
}

/** The disk in order, split by its allocation map: data in pieces of at most CHUNK_BYTES, zeros of at most `maxZeroBytes`. */
async function* piecesOf(
  disk: Disk,
  maxZeroBytes = CHUNK_BYTES,
): AsyncGenerator<{ readonly offset: number; readonly length: number; readonly isData: boolean }> {
  let done = 0;
  function* upTo(end: number, isData: boolean): Generator<{ offset: number; length: number; isData: boolean }> {
    while (done < end) {
      const piece = { offset: done, length: Math.min(isData ? CHUNK_BYTES : maxZeroBytes, end - done), isData };
      done += piece.length;
      yield piece;
    }
  }
  for (let next: number | null = 0; next !== null;) {
    const page = await disk.dataPage(next);
    for (const { offset, length } of page.ranges) {
      yield* upTo(offset, false);
      yield* upTo(offset + length, true);
    }
    next = page.next;
  }
  yield* upTo(disk.size, false);
}

async function addZeros(
  requests: RequestsInFlight,
  disk: Disk,
  offset: number,
  length: number,
  copied: Copied,
  options: CopyOptions & { readonly isEmpty: boolean },
): Promise<void> {
  copied.zeroBytes += length;
  if (!options.isEmpty) await requests.add(() => disk.zero(offset, length));
  options.progress.advance(length);
}

async function writeSparsely(
  disk: Disk,
  offset: number,
  buffer: Buffer,
  copied: Copied,
  options: CopyOptions & { readonly isEmpty: boolean },
): Promise<void> {
  for (const { from, to, kind } of runsOf(buffer, ZERO_UNIT_BYTES)) {
    if (kind === 'data') {
      await disk.write(offset + from, buffer.subarray(from, to));
      copied.dataBytes += to - from;
      continue;
    }
    if (!options.isEmpty) await disk.zero(offset + from, to - from);
    copied.zeroBytes += to - from;
  }
  options.progress.advance(buffer.length);
}

/** The stream in buffers of CHUNK_BYTES, the last one shorter. */
export async function* chunksOf(stream: AsyncIterable<Buffer>): AsyncGenerator<Buffer> {
  let filling = Buffer.allocUnsafe(CHUNK_BYTES);
  let filled = 0;
  for await (const piece of stream) {
    for (let at = 0; at < piece.length;) {
      const taken = piece.copy(filling, filled, at);
      at += taken;
      filled += taken;
      if (filled < CHUNK_BYTES) continue;
      yield filling;
      filling = Buffer.allocUnsafe(CHUNK_BYTES);
      filled = 0;
    }
  }
  if (filled > 0) yield filling.subarray(0, filled);
}
