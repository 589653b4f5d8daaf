/** How long ago something was, by two clocks of which each can mislead. */
import os from 'node:os';
import { expect, onTestFinished, test, vi } from 'vitest';
import { msSince, timestampNow } from '../../src/vdi/timestamp.js';

test('an uptime that has gone back is not of the same boot: the wall clock tells', () => {
  const stamp = { ...timestampNow(), at: Date.now() - 60_000 };
  const uptime = vi.spyOn(os, 'uptime').mockReturnValue(1);
  onTestFinished(() => uptime.mockRestore());
  expect(msSince(stamp)).toBeGreaterThanOrEqual(60_000);
});
