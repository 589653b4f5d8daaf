/** Runs: table entries with consecutive idx, which one request writes. */
import { inParallel } from '../../system/in-parallel.js';

/** Runs that one batch writes at a time. */
const PARALLEL_RUNS = 8;

export interface EntryChange {
  readonly idx: number;
  /** 0: none. */
  readonly owner: number;
}

/** Writes the changes, each run with one call of `write`; entries between runs stay as they are. */
export async function inRuns(
  changes: readonly EntryChange[],
  write: (idx: number, owners: readonly number[]) => Promise<void>,
): Promise<void> {
  const sorted = [...changes].sort((a, b) => a.idx - b.idx);
  const runs: { idx: number; owners: number[] }[] = [];
  for (const { idx, owner } of sorted) {
    const last = runs.at(-1);
    if (last && last.idx + last.owners.length === idx) last.owners.push(owner);
    else runs.push({ idx, owners: [owner] });
  }
  await inParallel(PARALLEL_RUNS, runs, (run) => write(run.idx, run.owners));
}
