/**
 * The log's share of what clients are told when the store fails them: a client sees a number, and whoever looks after the
 * machine needs the file and the cause. Owns that a client that asks again and again does not fill the log.
 */
import type { Logger } from 'pino';
import { deviceFailures, type DeviceFailure } from '../export/device-failures.js';

/** Of one kind (EIO, EPERM, ENOSPC) one line at once, and then one in this time, with the number of those between. */
const INTERVAL_MS = 10_000;

/** Returns what to call when no more is to be logged. */
export function logFailures(log: Logger, now: () => number = () => performance.now()): () => void {
  const kinds = new Map<string, { until: number; unsaid: number }>();
  const listener = (message: unknown): void => {
    const { code, error } = message as DeviceFailure;
    const time = now();
    const kind = kinds.get(code);
    if (kind !== undefined && time < kind.until) {
      kind.unsaid++;
      return;
    }
    log.error({ err: error, code, ...(kind && kind.unsaid > 0 && { more: kind.unsaid }) }, 'a request failed');
    kinds.set(code, { until: time + INTERVAL_MS, unsaid: 0 });
  };
  deviceFailures.subscribe(listener);
  return () => deviceFailures.unsubscribe(listener);
}
