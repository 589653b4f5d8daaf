/** A pair of connected ends (see pair-end.ts), destroyed at the end of the test. */

import { onTestFinished } from 'vitest';
import { connectedEnds, type PairEnd } from './pair-end.js';

export type { PairEnd } from './pair-end.js';

export function duplexPair(): { readonly client: PairEnd; readonly server: PairEnd } {
  const ends = connectedEnds();
  onTestFinished(() => {
    ends.client.destroy();
    ends.server.destroy();
  });
  return ends;
}
