/** How long ago a timestamp is, by two clocks that can both mislead. */
import os from 'node:os';
import { expect, onTestFinished, test, vi } from 'vitest';
import { msSince, timestampNow } from '../../src/vdi/timestamp.js';

test('an uptime that has gone back is of another boot: the wall clock decides', () => {
  const stamp = { ...timestampNow(), at: Date.now() - 60_000 };
  const uptime = vi.spyOn(os, 'uptime').mockReturnValue(1);
  onTestFinished(() => uptime.mockRestore());
  expect(msSince(stamp)).toBeGreaterThanOrEqual(60_000);
});
