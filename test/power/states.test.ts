/**
 * Crash states of the local store and of backup targets: none of 2,000 distinct ones breaks a promise. `npm run power` checks
 * more of them. Each run has a new seed; a state that fails is named, with the command that checks it again.
 */
import { expect, test } from 'vitest';
import { memoryDirectory } from '../harness/daemon.js';
import { enumerate, newProgress } from './enumerate.js';

const STATES = 2000;
const TIMEOUT_MS = 20 * 60_000;

test(
  `${STATES} distinct states after a power loss, a lost disk, the death of the process, or two of these, break no promise`,
  async () => {
    const seed = Date.now().toString(36);
    console.log(`seed ${seed}`);
    const progress = await enumerate(
      {
        seed,
        place: memoryDirectory(),
        states: STATES,
        failed: ({ state, error }) => {
          throw new Error(`${error.message}\n  again: npm run power -- --state ${state}`, { cause: error });
        },
      },
      newProgress(),
    );
    expect(progress.states).toBe(STATES);
    for (const kind of ['strict', 'ext4', 'death', 'away', 'strict, then strict', 'death, then death'])
      expect(progress.kinds[kind], kind).toBeGreaterThan(0);
  },
  TIMEOUT_MS,
);
