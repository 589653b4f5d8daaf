/** A buffer in runs of data and zeros, or of what differs from another buffer: what must be written, and what need not be. */
import { isZeros } from '../system/zeros.js';

export type RunKind = 'data' | 'zeros' | 'same';

/** The bytes [from, to) of a buffer. */
export interface BufferRun {
  readonly from: number;
  to: number;
  /** 'same': as in the other buffer, whether that is zeros or not. */
  readonly kind: RunKind;
}

/**
 * The runs of `want`, exact to units of `unitBytes`, of which the last one may be shorter. Ascending, without gaps; neighbours
 * are of different kinds. Without `have` no run is 'same'.
 */
export function runsOf(want: Buffer, unitBytes: number, have?: Buffer): BufferRun[] {
  const runs: BufferRun[] = [];
  let last: BufferRun | undefined;
  for (let from = 0; from < want.length; from += unitBytes) {
    const to = Math.min(from + unitBytes, want.length);
    const kind = kindOf(want, from, to, have);
    if (last?.kind === kind) last.to = to;
    else runs.push((last = { from, to, kind }));
  }
  return runs;
}

function kindOf(want: Buffer, from: number, to: number, have: Buffer | undefined): RunKind {
  if (have?.compare(want, from, to, from, to) === 0) return 'same';
  return isZeros(want.subarray(from, to)) ? 'zeros' : 'data';
}
