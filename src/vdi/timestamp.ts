/**
 * A point in time that is stored, and how long it is ago. A wall clock jumps; the time since the boot does not, but ends
 * with it. So both are kept: within one boot the latter decides, and after it the former, never by less than nothing. In a
 * container the boot may be its host's and the time its own: where that has gone back, it is not the same boot.
 */
import os from 'node:os';
import { bootId } from '../system/process-identity.js';

export interface Timestamp {
  /** Date.now() */
  readonly at: number;
  readonly boot: string;
  /** Milliseconds since the boot, a suspended machine's included. */
  readonly uptime: number;
}

export function timestampNow(): Timestamp {
  return { at: Date.now(), boot: bootId, uptime: os.uptime() * 1000 };
}

export function msSince(stamp: Timestamp): number {
  const uptime = os.uptime() * 1000;
  if (stamp.boot === bootId && uptime >= stamp.uptime) return uptime - stamp.uptime;
  // eslint-disable-next-line no-restricted-syntax -- from another boot: there is no other clock
  return Math.max(0, Date.now() - stamp.at);
}

/** What was read from a disk, which anybody may have written. */
export function isTimestamp(value: unknown): value is Timestamp {
  const { at, boot, uptime } = (value ?? {}) as Partial<Timestamp>;
  return Number.isFinite(at) && typeof boot === 'string' && Number.isFinite(uptime);
}
