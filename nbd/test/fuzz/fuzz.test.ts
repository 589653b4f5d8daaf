/** A small run of the fuzzer with every test run. The long one is `npm run fuzz`; see nbd/README.md. */

import { expect, test } from 'vitest';
import { fuzz } from './run.js';

test('a thousand random and broken handshakes and transmissions, either way, do no harm', async () => {
  expect((await fuzz(1, 1000)).inputs).toBe(1000);
});
