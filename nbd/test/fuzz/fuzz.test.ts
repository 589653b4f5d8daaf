/** A short run of the fuzzer with every test run. The long one is `npm run fuzz`; see nbd/README.md. */

import { expect, test } from 'vitest';
import { fuzz } from './run.js';

test('a thousand random and broken connections harm neither server nor client', async () => {
  expect((await fuzz(1, 1000)).inputs).toBe(1000);
});
