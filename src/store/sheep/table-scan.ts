/** Passes over tables; over those that may have many millions of entries in turns of the event loop of about a millisecond. */
import { bytesOfTable, ENTRY_BYTES } from '../../sheepdog/inode-table.js';

/** Table entries that are looked at in one turn of the loop. */
const ENTRIES_PER_TURN = 2 ** 15;
const ENTRIES_PER_PART = 1024;
const NO_OBJECTS = Buffer.alloc(ENTRIES_PER_PART * ENTRY_BYTES);

/** Calls `visit` with ranges [from, to) that cover the whole table, one in each turn. */
export async function inTurns(length: number, visit: (from: number, to: number) => void): Promise<void> {
  for (let from = 0; from < length; from += ENTRIES_PER_TURN) {
    visit(from, Math.min(from + ENTRIES_PER_TURN, length));
    await new Promise((resolve) => setImmediate(resolve));
  }
}

/** The idx at which there is an object, of a table that may have many millions of entries, in turns. */
export async function presentInLong(map: Uint32Array): Promise<number[]> {
  const present: number[] = [];
  await inTurns(map.length, (from, to) => addPresent(map, from, to, present));
  return present;
}

/** The idx at which there is an object, of the table of one inode: a million entries, most of them 0. */
export function presentIn(table: Uint32Array): number[] {
  const present: number[] = [];
  addPresent(table, 0, table.length, present);
  return present;
}

/** Parts without an object, as nearly all are in a large disk, are compared as bytes: that takes a tenth of the time. */
function addPresent(table: Uint32Array, from: number, to: number, present: number[]): void {
  const bytes = bytesOfTable(table);
  for (let at = from; at < to; at += ENTRIES_PER_PART) {
    const end = Math.min(at + ENTRIES_PER_PART, to);
    const size = (end - at) * ENTRY_BYTES;
    if (bytes.compare(NO_OBJECTS, 0, size, at * ENTRY_BYTES, end * ENTRY_BYTES) === 0) continue;
    for (let idx = at; idx < end; idx++) if (table[idx] !== 0) present.push(idx);
  }
}
