/**
 * The content of a file in memory, as chunks that never change: a write makes new chunks. So a journal can keep what a file was
 * at any moment without a copy, and crash states share what they have in common. Owns the layout. Knows no names and no disks.
 */

/** Bytes of a chunk: a page of the page cache. */
export const CHUNK = 4096;
/** What a disk writes whole or not at all. */
export const SECTOR = 512;
const SECTORS = CHUNK / SECTOR;
/** All sectors of a chunk. */
export const WHOLE_CHUNK = 2 ** SECTORS - 1;
const ZEROS = Buffer.alloc(CHUNK);

/** A hole is undefined. */
export type Chunk = Buffer | undefined;

/** What a chunk is after a change, and which of its sectors the change has touched (bit n: sector n). */
export interface ChunkChange {
  readonly index: number;
  readonly after: Chunk;
  readonly sectors: number;
}

export class Content {
  size = 0;
  chunks: Chunk[] = [];

  static of(bytes: Buffer): Content {
    const content = new Content();
    content.write(bytes, 0);
    return content;
  }

  /** Shares the chunks. */
  copy(): Content {
    const copy = new Content();
    copy.size = this.size;
    copy.chunks = this.chunks.slice();
    return copy;
  }

  /** Bytes that are allocated. */
  get allocated(): number {
    let count = 0;
    for (const chunk of this.chunks) if (chunk !== undefined) count++;
    return count * CHUNK;
  }

  /** Returns how many bytes there were. */
  read(into: Buffer, offset: number): number {
    const end = Math.min(offset + into.length, this.size);
    for (let at = offset; at < end;) {
      const within = at % CHUNK;
      const length = Math.min(CHUNK - within, end - at);
      const chunk = this.chunks[Math.floor(at / CHUNK)];
      if (chunk) chunk.copy(into, at - offset, within, within + length);
      else into.fill(0, at - offset, at - offset + length);
      at += length;
    }
    return Math.max(0, end - offset);
  }

  bytes(): Buffer {
    const all = Buffer.alloc(this.size);
    this.read(all, 0);
    return all;
  }

  write(data: Buffer, offset: number): ChunkChange[] {
    const changes: ChunkChange[] = [];
    for (let done = 0; done < data.length;) {
      const at = offset + done;
      const within = at % CHUNK;
      const length = Math.min(CHUNK - within, data.length - done);
      const index = Math.floor(at / CHUNK);
      const before = this.chunks[index];
      const after = Buffer.allocUnsafe(CHUNK);
      if (length < CHUNK) {
        if (before) before.copy(after);
        else after.fill(0);
      }
      data.copy(after, within, done, done + length);
      this.#set(index, after);
      changes.push({ index, after, sectors: sectorsOf(within, length) });
      done += length;
    }
    this.size = Math.max(this.size, offset + data.length);
    return changes;
  }

  /** Makes the range zeros, with holes where whole chunks are zeroed; or without holes (`allocated`). Keeps the size. */
  zero(offset: number, length: number, allocated: boolean): ChunkChange[] {
    const changes: ChunkChange[] = [];
    const end = Math.min(offset + length, Math.ceil(this.size / CHUNK) * CHUNK);
    for (let at = offset; at < end;) {
      const within = at % CHUNK;
      const count = Math.min(CHUNK - within, end - at);
      const index = Math.floor(at / CHUNK);
      const before = this.chunks[index];
      let after: Chunk = allocated ? ZEROS : undefined;
      if (count < CHUNK && before) {
        const rest = Buffer.from(before);
        after = rest.fill(0, within, within + count);
      }
      if (after !== before) {
        this.#set(index, after);
        changes.push({ index, after, sectors: sectorsOf(within, count) });
      }
      at += count;
    }
    return changes;
  }

  resize(size: number): ChunkChange[] {
    const changes = size < this.size ? this.zero(size, this.size - size + CHUNK, false) : [];
    this.chunks.length = Math.min(this.chunks.length, Math.ceil(size / CHUNK));
    this.size = size;
    return changes;
  }

  /** The next byte at or after `offset` in data, or (`hole`) in a hole; -1 if there is none, the end of the file for a hole. */
  next(offset: number, hole: boolean): number {
    if (offset > this.size || (offset === this.size && !hole)) return -1;
    const end = Math.min(this.chunks.length, Math.ceil(this.size / CHUNK));
    let index = Math.floor(offset / CHUNK);
    while (index < end && (this.chunks[index] === undefined) !== hole) index++;
    // Behind the last chunk all is a hole: segment files are long.
    if (index >= end && !hole) return -1;
    return Math.min(this.size, Math.max(offset, index * CHUNK));
  }

  #set(index: number, chunk: Chunk): void {
    while (this.chunks.length < index) this.chunks.push(undefined);
    this.chunks[index] = chunk;
  }
}

function sectorsOf(within: number, length: number): number {
  const first = Math.floor(within / SECTOR);
  const last = Math.floor((within + length - 1) / SECTOR);
  return ((1 << (last + 1)) - 1) & ~((1 << first) - 1);
}

/** The sectors of `from` in `mask`, and the others of `rest`. */
export function compose(rest: Chunk, from: Chunk, mask: number): Chunk {
  if (mask === WHOLE_CHUNK) return from;
  if (mask === 0 || rest === from) return rest;
  const made = Buffer.from(rest ?? ZEROS);
  for (let sector = 0; sector < SECTORS; sector++) {
    if ((mask & (1 << sector)) !== 0)
      (from ?? ZEROS).copy(made, sector * SECTOR, sector * SECTOR, (sector + 1) * SECTOR);
  }
  return made;
}
