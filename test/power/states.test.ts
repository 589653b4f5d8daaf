/**
 * Crash states of the local store and of backup targets: none breaks a promise. `npm run power` checks more of them, of other
 * seeds; a state that fails is named, with the command that checks it again.
 */
import { expect, test } from 'vitest';
import { memoryDirectory } from '../harness/daemon.js';
import { byLength } from '../harness/length.js';
import { enumerate, newProgress } from './enumerate.js';

const STATES = byLength({ quick: 200, full: 2000, long: 20_000 });
const SEED = process.env['SHEEPGATE_POWER_SEED'] ?? 'q4';
const TIMEOUT_MS = 60 * 60_000;

test(
  `${STATES} distinct states after a power loss, a lost disk, the death of the process, or two of these, break no promise`,
  async () => {
    const seed = SEED;
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
    if (STATES < 1000) return; // not all kinds are among them
    for (const kind of ['strict', 'ext4', 'death', 'away', 'strict, then strict', 'death, then death'])
      expect(progress.kinds[kind], kind).toBeGreaterThan(0);
  },
  TIMEOUT_MS,
);
