/** Passes over tables that may have many millions of entries, in turns of the event loop of about a millisecond. */

/** Table entries that are looked at in one turn of the loop. */
const ENTRIES_PER_TURN = 2 ** 15;

/** Calls `visit` with ranges [from, to) that cover the whole table, one in each turn. */
export async function inTurns(length: number, visit: (from: number, to: number) => void): Promise<void> {
  for (let from = 0; from < length; from += ENTRIES_PER_TURN) {
    visit(from, Math.min(from + ENTRIES_PER_TURN, length));
    await new Promise((resolve) => setImmediate(resolve));
  }
}

/** The idx at which there is an object. Hyper volumes have many millions of places, and few objects. */
export async function presentIn(map: Uint32Array): Promise<number[]> {
  const present: number[] = [];
  await inTurns(map.length, (from, to) => {
    for (let idx = from; idx < to; idx++) if (map[idx] !== 0) present.push(idx);
  });
  return present;
}
