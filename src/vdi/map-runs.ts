/**
 * Runs of entries in object maps, found by comparing memory: an empty disk of 4 TiB has a million entries, and a loop over them
 * takes a hundred times as long. Pure functions; entries behind the end of a map count as 0.
 */

/** Entries compared one by one first: most questions are about few objects, and most runs are short. */
const NEAR = 64;
/** Entries covered by one comparison of memory. */
const PIECE = 2 ** 14;
const ENTRY_BYTES = Uint32Array.BYTES_PER_ELEMENT;
const ZEROS = Buffer.alloc(PIECE * ENTRY_BYTES);

/** The first index in [from, end) whose entry is not 0; `end` if there is none. */
export function endOfZeros(map: Uint32Array, from: number, end: number): number {
  const last = Math.min(end, map.length);
  let idx = from;
  for (const near = Math.min(last, from + NEAR); idx < near; idx++) if (map[idx] !== 0) return idx;
  if (idx >= last) return end;
  const bytes = bytesOf(map);
  while (idx < last) {
    const next = Math.min(last, idx + PIECE);
    if (bytes.compare(ZEROS, 0, (next - idx) * ENTRY_BYTES, idx * ENTRY_BYTES, next * ENTRY_BYTES) !== 0) {
      while (map[idx] === 0) idx++;
      return idx;
    }
    idx = next;
  }
  return end;
}

/** The first index in [from, end) at which the two differ; `end` if there is none. */
export function endOfSame(one: Uint32Array, other: Uint32Array, from: number, end: number): number {
  const last = Math.min(end, one.length, other.length);
  let idx = from;
  for (const near = Math.min(last, from + NEAR); idx < near; idx++) if (one[idx] !== other[idx]) return idx;
  if (idx < last) {
    const [bytes, otherBytes] = [bytesOf(one), bytesOf(other)];
    while (idx < last) {
      const next = Math.min(last, idx + PIECE);
      const [at, to] = [idx * ENTRY_BYTES, next * ENTRY_BYTES];
      if (bytes.compare(otherBytes, at, to, at, to) !== 0) {
        while (one[idx] === other[idx]) idx++;
        return idx;
      }
      idx = next;
    }
  }
  return idx >= end ? end : endOfZeros(one.length > other.length ? one : other, idx, end);
}

/** The first index in (from, end) at which the two are the same, given that they differ at `from`; `end` if there is none. */
export function endOfDifferent(one: Uint32Array, other: Uint32Array, from: number, end: number): number {
  let idx = from + 1;
  while (idx < end && (one[idx] ?? 0) !== (other[idx] ?? 0)) idx++;
  return idx;
}

function bytesOf(map: Uint32Array): Buffer {
  return Buffer.from(map.buffer, map.byteOffset, map.byteLength);
}
