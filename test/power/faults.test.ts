/**
 * The harness finds each mistake that is planted in the store, or in the disk below it. Without them it finds nothing. Some are
 * found late, so this belongs to the long tests.
 */
import { expect, test } from 'vitest';
import { memoryDirectory } from '../harness/daemon.js';
import { testLength } from '../harness/length.js';
import { FAULTS, findFault } from './faults.js';

/** In this many states it must be found. */
const ENOUGH = 4000;
const TIMEOUT_MS = 20 * 60_000;

const isLong = testLength === 'long';
if (!isLong) console.log('skipped: planted faults: they take many minutes; npm run test:long runs them');

for (const fault of FAULTS) {
  test.skipIf(!isLong)(
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
