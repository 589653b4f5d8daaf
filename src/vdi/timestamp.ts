/**
 * A point in time that is stored, and how long ago it is. The wall clock may jump. The time since the boot does not jump, but
 * starts at zero with every boot. So a timestamp has both: within one boot the time since the boot decides, afterwards the wall
 * clock, and never less than zero. In a container the boot id may be the host's and the uptime its own: if the uptime has gone
 * back, it is another boot.
 */
import os from 'node:os';
import { bootId } from '../system/process-identity.js';

export interface Timestamp {
  /** Date.now() */
  readonly at: number;
  readonly boot: string;
  /** Milliseconds since the boot, including time that the machine was suspended. */
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

/** `value` was read from a store, whose content may come from anywhere. */
export function isTimestamp(value: unknown): value is Timestamp {
  const { at, boot, uptime } = (value ?? {}) as Partial<Timestamp>;
  return Number.isFinite(at) && typeof boot === 'string' && Number.isFinite(uptime);
}
