/** The harness finds each mistake that is planted in the store, or in the disk below it. Without them it finds nothing. */
import { expect, test } from 'vitest';
import { memoryDirectory } from '../harness/daemon.js';
import { FAULTS, findFault } from './faults.js';

/** In this many states it must be found. */
const ENOUGH = 2000;
const TIMEOUT_MS = 20 * 60_000;

for (const fault of FAULTS) {
  test(
    `"${fault}" breaks a promise in one of ${ENOUGH} states`,
    async () => {
      const { failure, progress } = await findFault(fault, {
        seed: 'faults',
        place: memoryDirectory(),
        states: ENOUGH,
      });
      expect(failure?.error.name, `${progress.states} states`).toBe('Violation');
    },
    TIMEOUT_MS,
  );
}
